"""The types of a recipe's values: how each is read from YAML or the command line, and what is said of a wrong one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from ..mixers import registry
from .layers import check_form
from .units import listed, parse_count


@dataclass(frozen=True)
class Words:
    """How a key's type is named in errors and in the reference, where the annotation alone says too little."""

    text: str


class Faults(ValueError):
    """Several mistakes below one key, each with its path from there."""

    def __init__(self, items: list[tuple[tuple[str | int, ...], str]]) -> None:
        super().__init__("; ".join(message for _, message in items))
        self.items = items


class Section(BaseModel):
    """Base of all sections: nothing unknown, nothing coerced, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Placed(Section):
    """The top of a recipe: knows where its keys were written."""

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def place(self, path: str) -> str:
        """Where a dotted path was written, for errors found later: `mine.yaml:7: layers.keep`."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            known = self._places.get(".".join(parts[:end]))
            if known:
                return f"{known}: {path}"
        return path

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every key, in the recipe's own form."""
        return self.model_dump(mode="json", by_alias=True)


def _length(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        length = parse_count(value)
    except ValueError:
        length = 0
    if length < 2:
        raise ValueError(f"expected auto or a number of tokens, at least 2, such as 512, found {value!r}")
    return length


def _held_out(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 0.5:
        return float(value)
    raise ValueError(f"expected a file, or a share of the documents above 0 and up to 0.5, found {value!r}")


def _betas(value: Any) -> Any:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        first, second = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"expected two numbers such as [0.9, 0.95], found {value!r}") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(f"both betas lie from 0 to below 1, found {value!r}")
    return (first, second)


def _choice(value: Any) -> Any:
    return None if value is None else check_form(value)


def _mixer_name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected the name of a mixer, found {value!r}. Available: {', '.join(registry.names())}")
    return registry.resolve(value)


Count = Annotated[int, BeforeValidator(parse_count), Words("count")]
Length = Annotated[int | Literal["auto"], BeforeValidator(_length), Words("tokens or auto")]
LayerChoice = Annotated[Any, BeforeValidator(_choice), Words("layers")]
MixerName = Annotated[str, BeforeValidator(_mixer_name), Words("mixer")]
HeldOut = Annotated[str | float, BeforeValidator(_held_out), Words("file or share")]
Suites = Annotated[
    list[Literal["quick", "recall", "core", "long", "generation"]],
    BeforeValidator(listed),
    Words("`quick`, `recall`, `core`, `long`, `generation` or a list"),
]
Betas = Annotated[tuple[float, float], BeforeValidator(_betas), Field(strict=False), Words("two numbers")]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Schedule = Literal["cosine", "quarter_cosine", "linear", "constant", "wsd"]
Weight = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
