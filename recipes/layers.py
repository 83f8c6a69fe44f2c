"""Which layers keep their attention and which mixer stands in the others: the grammar of `layers:` and its resolution.

    all | none | 3 | [3, 9, 15] | "0-15,18" | {every: 4, offset: 3} | {ratio: 0.75, place: lower|upper|uniform}
        | {scores: scores.json, top: 5}

A score file is JSON: {"scores": {"0": 0.31, "1": 0.02, ...}, "higher_is": "keep"}. Every layer has one finite score;
`higher_is` says whether a high score speaks for keeping the layer's attention or for converting it; other keys are
ignored. `keep: {top: 5}` takes the five layers that most deserve keeping, `convert: {top: 5}` the five that most
deserve converting; equal scores go to the lower layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from ..distill.errors import UserError
from ..mixers import registry

FORMS = 'all, none, a list such as [3, 9], a text such as "0-15,18", {every, offset}, {ratio, place} or {scores, top}'
PLACES = ("lower", "upper", "uniform")
_PIECE = re.compile(r"\s*(-?\d+)\s*(?:-\s*(-?\d+)\s*)?")


@dataclass(frozen=True)
class LayerMap:
    """The layers of one teacher, resolved.

    Attributes:
        num_layers: of the teacher.
        kept: layers whose attention stays, ascending.
        converted: layer -> (mixer, all of its options), ascending.
        attention: what is changed in kept layers (`rope`, `logit_scale`, `window`), None for nothing.
    """

    num_layers: int
    kept: list[int]
    converted: dict[int, tuple[str, dict[str, Any]]]
    attention: dict[str, Any] | None = None

    def layers_of(self, mixer: str) -> list[int]:
        """The layers that a mixer takes, ascending."""
        return [layer for layer, (name, _) in self.converted.items() if name == mixer]

    @property
    def letters(self) -> dict[str, str]:
        """Mixer -> its letter in the drawing: L for the first, then M, N, ..."""
        names = list(dict.fromkeys(name for name, _ in self.converted.values()))
        by_size = sorted(names, key=lambda name: -len(self.layers_of(name)))
        return {name: chr(ord("L") + i) for i, name in enumerate(by_size)}

    @property
    def drawing(self) -> str:
        """One letter per layer from the lowest: A for attention, L for the mixer that takes most layers."""
        letters = self.letters
        return "".join(
            letters[self.converted[layer][0]] if layer in self.converted else "A" for layer in range(self.num_layers)
        )

    @property
    def changes(self) -> str:
        """What is changed in kept layers, in words; empty for nothing."""
        given = self.attention or {}
        words = [] if given.get("rope", True) else ["no rotary embedding"]
        if given.get("logit_scale") is not None:
            words.append(f"scores × log_{given['logit_scale']:g}(t + {given['logit_scale']:g})")
        if given.get("window") is not None:
            words.append(f"window {given['window']}")
        return ", ".join(words)

    @property
    def legend(self) -> str:
        """What the letters of the drawing mean."""
        return ", ".join(["A attention", *(f"{letter} {name}" for name, letter in self.letters.items())])


def check_form(value: Any) -> Any:
    """A layer choice, checked as far as that goes without a teacher; returned unchanged.

    Raises:
        ValueError: not one of the grammar's forms.
    """
    if isinstance(value, bool) or value is None:
        raise ValueError(f"expected {FORMS}, found {value!r}")
    if isinstance(value, int):
        _written([value])
    elif isinstance(value, str):
        if value not in ("all", "none"):
            _written(_pieces(value))
    elif isinstance(value, list):
        if not value:
            raise ValueError("an empty list chooses no layer; write none")
        wrong = [item for item in value if isinstance(item, bool) or not isinstance(item, int)]
        if wrong:
            raise ValueError(f'a list holds layer numbers, found {wrong[0]!r}; ranges are written as a text: "0-15,18"')
        _written(value)
    elif isinstance(value, dict):
        _check_rule(value)
    else:
        raise ValueError(f"expected {FORMS}, found {value!r}")
    return value


def select(value: Any, num_layers: int, wanted: str = "keep") -> list[int]:
    """The layers that a form chooses, ascending.

    Args:
        value: any form of the grammar.
        num_layers: of the teacher.
        wanted: `keep` or `convert`, which end of a score file's ranking `top` takes.

    Raises:
        ValueError: wrong form, or layers that this teacher does not have.
    """
    check_form(value)
    if value == "all":
        return list(range(num_layers))
    if value == "none":
        return []
    if isinstance(value, dict):
        return _by_rule(value, num_layers, wanted)
    layers = _pieces(value) if isinstance(value, str) else [value] if isinstance(value, int) else value
    for layer in layers:
        if layer >= num_layers:
            raise ValueError(f"layer {layer} does not exist: the teacher has {_have(num_layers)}")
    return sorted(layers)


def resolve(
    section: Any,
    num_layers: int,
    mixers: Mapping[str, Mapping[str, Any]] | None = None,
    place: Callable[[str], str] = str,
) -> LayerMap:
    """The `layers:` section of a recipe on a teacher of `num_layers` layers.

    Args:
        section: has `mixer`, `keep`, `convert` (one of them None) and `overrides` (range -> what has `mixer`).
        num_layers: of the teacher.
        mixers: mixer -> options, where they differ from the defaults.
        place: dotted path -> how to name it in an error, e.g. with file and line.

    Raises:
        UserError: layers that do not exist, or an override on a layer that is kept or already overridden.
    """
    wanted = "keep" if section.keep is not None else "convert"
    chosen = _at(place(f"layers.{wanted}"), select, getattr(section, wanted), num_layers, wanted)
    rest = [layer for layer in range(num_layers) if layer not in set(chosen)]
    kept, converted = (chosen, rest) if wanted == "keep" else (rest, chosen)
    names = dict.fromkeys(converted, registry.resolve(section.mixer))
    taken: dict[int, str] = {}
    for text, override in (section.overrides or {}).items():
        where, mixer = place(f"layers.overrides.{text}"), override.mixer
        for layer in _at(where, select, text, num_layers):
            if layer in taken:
                raise UserError(
                    f"{where}: layer {layer} is already overridden by {taken[layer]!r}. "
                    "Each layer may be named once: shorten one of the two ranges"
                )
            if layer not in names:
                raise UserError(
                    f"{where}: layer {layer} keeps its attention, so {mixer} cannot stand there. "
                    f"Converted layers are {ranges(converted) or 'none'}: name some of them, or convert layer {layer}"
                )
            taken[layer] = text
            names[layer] = registry.resolve(mixer)
    options = {name: _options(name, (mixers or {}).get(name, {})) for name in dict.fromkeys(names.values())}
    return LayerMap(num_layers, kept, {layer: (name, dict(options[name])) for layer, name in names.items()})


def ranges(layers: list[int]) -> str:
    """Ascending layers as the grammar writes them: [0, 1, 2, 5] -> "0-2,5"."""
    pieces: list[list[int]] = []
    for layer in layers:
        if pieces and pieces[-1][1] == layer - 1:
            pieces[-1][1] = layer
        else:
            pieces.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pieces)


def _options(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return registry.spec(name).options.parse(dict(values)).to_dict()


def _at(place: str, function: Callable[..., list[int]], *args: Any) -> list[int]:
    try:
        return function(*args)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def _have(num_layers: int) -> str:
    return "1 layer, 0" if num_layers == 1 else f"{num_layers} layers, 0 to {num_layers - 1}"


def _written(layers: list[int]) -> None:
    """Refuse what is wrong with explicit layers on any teacher."""
    seen: set[int] = set()
    for layer in layers:
        if layer < 0:
            raise ValueError(
                f"layer {layer} is negative; layers are counted from 0 at the bottom, write the number itself"
            )
        if layer in seen:
            raise ValueError(f"layer {layer} is named twice; name each layer once")
        seen.add(layer)


def _pieces(text: str) -> list[int]:
    """Layers of "0-15,18", in the order written."""
    layers: list[int] = []
    for piece in text.split(","):
        match = _PIECE.fullmatch(piece)
        if match is None:
            raise ValueError(f"{piece.strip()!r} in {text!r} is not a layer or a range; expected {FORMS}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last >= 0:
            raise ValueError(f"the range {first}-{last} is empty; write {last}-{first}")
        if last - first > 100_000:
            raise ValueError(f"the range {first}-{last} is longer than any model")
        layers += [first, last] if last < 0 else range(first, last + 1)
    return layers


def _check_rule(rule: dict[str, Any]) -> None:
    """Refuse a wrong mapping form."""
    for head, tail in (("every", "offset"), ("ratio", "place"), ("scores", "top")):
        if head in rule:
            strange = sorted(set(rule) - {head, tail})
            if strange:
                raise ValueError(
                    f"{head!r} goes with {tail!r} only, found {strange[0]!r}; write {{{head}: ..., {tail}: ...}}"
                )
            break
    else:
        raise ValueError(
            f"expected {{every, offset}}, {{ratio, place}} or {{scores, top}}, found the keys {sorted(rule)}"
        )
    if "every" in rule:
        every = _whole(rule, "every", 1)
        offset = _whole(rule, "offset", 0) if "offset" in rule else every - 1
        if offset >= every:
            raise ValueError(f"offset {offset} must lie below every ({every}): layers with l % {every} == offset")
    elif "ratio" in rule:
        ratio = rule["ratio"]
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise ValueError(f"ratio: expected a number from 0 to 1, found {ratio!r}")
        if rule.get("place", "uniform") not in PLACES:
            raise ValueError(f"place: expected one of {', '.join(PLACES)}, found {rule['place']!r}")
    else:
        if "top" not in rule:
            raise ValueError("a score file needs top, the number of layers to take: {scores: FILE, top: 5}")
        _whole(rule, "top", 0)
        if not isinstance(rule["scores"], str):
            raise ValueError(f"scores: expected the path of a JSON file, found {rule['scores']!r}")


def _whole(rule: dict[str, Any], key: str, low: int) -> int:
    value = rule[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{key}: expected a whole number, at least {low}, found {value!r}")
    return value


def _by_rule(rule: dict[str, Any], num_layers: int, wanted: str) -> list[int]:
    """The layers of a mapping form that `_check_rule` has passed."""
    if "every" in rule:
        every = rule["every"]
        offset = rule.get("offset", every - 1)
        layers = [layer for layer in range(num_layers) if layer % every == offset]
        if not layers:
            raise ValueError(f"{{every: {every}, offset: {offset}}} chooses none of {_have(num_layers)}; write none")
        return layers
    if "scores" in rule:
        return _by_score(rule["scores"], rule["top"], num_layers, wanted)
    # Decimal, because 0.29 * 50 is 14.499999999999998 in floats.
    count = int((Decimal(str(rule["ratio"])) * num_layers).quantize(Decimal(1), ROUND_HALF_UP))
    if count == 0 and rule["ratio"] > 0:
        raise ValueError(
            f"ratio {rule['ratio']} of {num_layers} layers rounds to no layer; write none or a higher ratio"
        )
    place = rule.get("place", "uniform")
    if place == "lower":
        return list(range(count))
    if place == "upper":
        return list(range(num_layers - count, num_layers))
    return [(2 * i + 1) * num_layers // (2 * count) for i in range(count)]  # floor((i + 0.5) * L / n)


def _by_score(file: str, top: int, num_layers: int, wanted: str) -> list[int]:
    """The `top` layers of a score file for `wanted`."""
    if top > num_layers:
        raise ValueError(f"top {top} is more than the teacher has: {_have(num_layers)}")
    scores, higher_is = _read_scores(Path(file).expanduser())
    missing = [layer for layer in range(num_layers) if layer not in scores]
    if missing:
        raise ValueError(
            f"{file}: no score for layer {missing[0]}; the teacher has {_have(num_layers)}, each needs one"
        )
    strange = sorted(set(scores) - set(range(num_layers)))
    if strange:
        raise ValueError(
            f"{file}: scores layer {strange[0]}, but the teacher has {_have(num_layers)}: another teacher's file?"
        )
    sign = -1.0 if higher_is == wanted else 1.0
    return sorted(sorted(scores, key=lambda layer: (sign * scores[layer], layer))[:top])


def _read_scores(path: Path) -> tuple[dict[int, float], str]:
    """Layer -> score, and what a high score speaks for."""
    form = '{"scores": {"0": 0.3, "1": 0.1, ...}, "higher_is": "keep" or "convert"}'
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); expected a JSON file {form}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); expected {form}") from None
    if not isinstance(found, dict) or not isinstance(found.get("scores"), dict):
        raise ValueError(f"{path}: has no scores; expected {form}")
    if found.get("higher_is") not in ("keep", "convert"):
        raise ValueError(f"{path}: higher_is is {found.get('higher_is')!r}; expected {form}")
    scores: dict[int, float] = {}
    for layer, score in found["scores"].items():
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not layer.isdecimal() or not number:
            raise ValueError(f"{path}: {layer!r}: {score!r} is not a layer with a finite score; expected {form}")
        if int(layer) in scores:
            raise ValueError(f"{path}: layer {int(layer)} is scored twice; expected {form}")
        scores[int(layer)] = float(score)
    return scores, found["higher_is"]
