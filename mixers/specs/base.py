"""What every mixer says of itself without torch: its geometry, its options and the table of its tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Source = Literal["copied", "derived", "new"]


@dataclass(frozen=True)
class Geometry:
    """The attention that a mixer replaces, as the family's config.json states it.

    Attributes:
        hidden_size: width D of the layer input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads; divides `num_heads`.
        head_dim: channels per head; H * head_dim need not equal D (Qwen3).
        qkv_bias: q, k and v projections carry a bias (Qwen2).
        o_bias: the output projection carries a bias.
        qk_norm: per-head RMSNorm on queries and keys before the rotary embedding (Qwen3).
        norm_eps: epsilon of that RMSNorm.
        rope: queries and keys are rotated.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rope: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def inner_size(self) -> int:
        """Channels over all query heads: H * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels over all key/value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class TensorSpec:
    """One row of a mixer's tensor table.

    Attributes:
        name: parameter name inside the mixer, e.g. `q_proj.weight`.
        shape: its shape.
        source: `copied` (equal to a tensor of the attention), `derived` (computed from one) or `new`.
        origin: the attention tensor it comes from (`q_proj.weight`), or how a new one is initialised, in words.
        fp32: kept in fp32 whatever the model's dtype (decays and their like).
    """

    name: str
    shape: tuple[int, ...]
    source: Source
    origin: str
    fp32: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A dataclass field of a mixer's options: its default, what it does, and its bounds (inclusive)."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class MixerOptions:
    """Base of every mixer's options. Fields are declared with `option`: typed, bounded and documented."""

    form: str = option(
        "auto",
        "form of the recurrence: step by step, chunked in plain torch, or chosen for the device",
        choices=("auto", "chunked", "recurrent"),
    )

    @classmethod
    def parse(cls, values: dict[str, Any]) -> MixerOptions:
        """Options from a plain dict, as a recipe or config.json holds them.

        Raises:
            ValueError: naming every unknown key, wrong type and value out of bounds, one per line.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        problems = []
        for key, value in values.items():
            if key not in fields:
                problems.append(f"{key}: unknown option (known: {', '.join(fields)})")
                continue
            problem = _problem(fields[key], value)
            if problem:
                problems.append(f"{key}: {problem}")
        if problems:
            raise ValueError("\n".join(problems))
        return cls(**{k: _coerce(fields[k], v) for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return dataclasses.asdict(self)


def _coerce(field: dataclasses.Field, value: Any) -> Any:
    return float(value) if field.type == "float" and isinstance(value, int) else value


def _problem(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with `value` for `field`, or None."""
    names = str(field.type).split(" | ")
    accepted: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (float, int),
        "str": (str,),
        "None": (type(None),),
    }
    kinds = tuple(t for name in names for t in accepted[name])
    if not isinstance(value, kinds) or (isinstance(value, bool) and "bool" not in names):
        return f"expected {field.type}, found {value!r}"
    meta = field.metadata
    if meta["choices"] and value not in meta["choices"]:
        return f"expected one of {', '.join(map(str, meta['choices']))}, found {value!r}"
    if value is None or isinstance(value, str):
        return None
    if meta["low"] is not None and value < meta["low"]:
        return f"must be at least {meta['low']}, found {value}"
    if meta["high"] is not None and value > meta["high"]:
        return f"must be at most {meta['high']}, found {value}"
    return None


def chunk_length(head_dim: int, chosen: int | None) -> int:
    """Tokens per chunk: as chosen, else the fastest as measured on CPUs (small heads like small chunks)."""
    return chosen or (16 if head_dim <= 16 else 32)


def attention_rows(geometry: Geometry, *, expand_kv: bool, conv: int) -> list[TensorSpec]:
    """The rows that every mixer takes from attention: projections, their biases, q/k norms; and what follows them.

    Args:
        geometry: of the attention being replaced.
        expand_kv: give every query head keys and values of its own (derived by repeating each head's rows).
        conv: taps of the convolution on queries, keys and values; 0 for none.
    """
    hidden, inner = geometry.hidden_size, geometry.inner_size
    widths = {"q": inner, "k": inner if expand_kv else geometry.kv_size, "v": inner if expand_kv else geometry.kv_size}
    rows = []
    for part, width in widths.items():
        repeats = expand_kv and part != "q" and geometry.num_kv_heads != geometry.num_heads
        shapes: dict[str, tuple[int, ...]] = {f"{part}_proj.weight": (width, hidden)}
        if geometry.qkv_bias:
            shapes[f"{part}_proj.bias"] = (width,)
        for name, shape in shapes.items():
            origin = f"repeat_heads({name})" if repeats else name
            rows.append(TensorSpec(name, shape, "derived" if repeats else "copied", origin))
    rows.append(TensorSpec("o_proj.weight", (hidden, inner), "copied", "o_proj.weight"))
    if geometry.o_bias:
        rows.append(TensorSpec("o_proj.bias", (hidden,), "copied", "o_proj.bias"))
    if geometry.qk_norm:
        rows += [TensorSpec(f"{p}_norm.weight", (geometry.head_dim,), "copied", f"{p}_norm.weight") for p in "qk"]
    if conv:
        origin = "identity: 1 at the token itself, 0 before it"
        rows.append(TensorSpec("conv", (sum(widths.values()), conv), "new", origin))
    return rows


def recurrent_bytes(geometry: Geometry, *, expand_kv: bool, conv: int) -> int:
    """Bytes of an fp32 (H, d, d) state, and of the last taps of the convolution where there is one."""
    kv = geometry.inner_size if expand_kv else geometry.kv_size
    buffers = max(0, conv - 1) * (geometry.inner_size + 2 * kv)
    return 4 * (geometry.num_heads * geometry.head_dim**2 + buffers)


def attention_flops(geometry: Geometry, *, expand_kv: bool) -> int:
    """Forward FLOPs per token of the q, k, v and o projections."""
    kv = geometry.inner_size if expand_kv else geometry.kv_size
    return 2 * geometry.hidden_size * (2 * geometry.inner_size + 2 * kv)


class MixerSpec:
    """A mixer without torch. A subclass in `specs/NAME.py` fills the class attributes and the methods."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    options: ClassVar[type[MixerOptions]]
    aliases: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def tensors(geometry: Geometry, options: Any, *, first: bool, position: float) -> list[TensorSpec]:
        """The table of the mixer's parameters, by name (their order is that of the card, not of the module).

        Args:
            geometry: of the attention being replaced.
            options: the mixer's own options.
            first: True for the lowest layer that this mixer takes (RWKV-7: it has no value residual).
            position: layer index / (layers - 1), for depth-dependent initial values.
        """
        raise NotImplementedError

    @staticmethod
    def flops_per_token(geometry: Geometry, options: Any) -> int:
        """Forward FLOPs per token in the chunked form (a multiply-add counts two), projections included."""
        raise NotImplementedError

    @staticmethod
    def state_bytes(geometry: Geometry, options: Any) -> int:
        """Bytes that one sequence carries from token to token in one layer (fp32 state, plus any short buffers)."""
        raise NotImplementedError
