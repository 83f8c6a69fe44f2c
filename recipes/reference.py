"""The reference page of the recipe, made from the schema.

`python -m relinear.recipes.reference > docs/reference/recipe.md`; a test holds the committed page against it.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ..mixers import registry
from .fields import Section, Words
from .schema import (
    STAGES,
    AttentionSection,
    LoraSection,
    LossWeights,
    OverrideSection,
    Recipe,
    SpikeSection,
    Stage,
    TeacherLogitsSection,
    TrainingStage,
)
from .stream_section import StreamSection

_HEADER = ["| key | value | default | meaning |", "|---|---|---|---|"]

_INTRO = """\
# The recipe

<!-- Made from the schema: python -m relinear.recipes.reference > docs/reference/recipe.md -->

A recipe is one YAML file. `relinear check FILE` reads it, `relinear plan FILE` shows what it will do, `relinear
run FILE` does it. Shipped recipes are named without path: `relinear ls recipes`, `relinear show rwkv7`.

```yaml
schema: 1
teacher: {model: Qwen/Qwen2.5-0.5B}
layers:
  mixer: gated_deltanet
  keep: {every: 4, offset: 3}
data: {source: stories.txt, seq_len: 512}
stages:
  - transfer: {}
  - align: {tokens: 2M, batch: 8, lr: 3e-3}
  - glue: {tokens: 2M, batch: 8, lr: 1e-3, schedule: cosine, loss: {kl: 1.0}}
```

## How it is read

- **Strict.** A key that is not on this page is an error, with file, line and the nearest right name. All errors
  are reported at once.
- **Plain YAML 1.2 values.** `1e-3` is a number; `yes`, `no`, `on` and `off` are texts, so write `true` and
  `false`; `012` is 12; no value is `null`, and a bare `None` is refused. A key that stands twice is an error.
- **Counts** of tokens take a suffix: `k`, `M`, `B` are decimal, `Ki` and `Mi` binary: `64k`, `1.5M`, `2B`.
  Lengths are written out: `16384`.
- **`batch`** counts sequences over all ranks, **`tokens`** non-padding input tokens.
- **Windows** are never longer than the teacher's context: a longer `seq_len` is cut to it, and `auto` is 512 or
  the context, whichever is shorter. `relinear plan` and the run say so.
- **Paths** are relative to where the command runs.

## Changes on the command line

`relinear run rwkv7 teacher.model=FOLDER data.source=FILE stages.glue.tokens=4M`: a path of keys, `=`, a value.
A stage is addressed by its name. Values that begin with `[`, `{` or a quote are read as YAML. Setting
`layers.convert` removes `layers.keep`, and the other way round; the same holds for `data.source` and
`data.mix`.

## extends

`extends: NAME_OR_PATH` at the top lays the file over a shipped recipe or another file (relative to this one),
which may not extend a third. Mappings are merged key by key. Lists, `layers.keep`, `layers.convert`,
`layers.overrides`, `data.mix` and `loss` are replaced as a whole. `stages` as a mapping changes the other
recipe's stages by name:

```yaml
extends: rwkv7
stages:
  glue: {tokens: 4M}
```
"""

_LAYERS = """\
### The layer grammar

`keep` and `convert` take one of these forms, and exactly one of the two is given: the other is its complement.
Layers are counted from 0 at the bottom.

| form | chooses |
|---|---|
| `all`, `none` | every layer, no layer |
| `3` | one layer |
| `[3, 9, 15]` | these layers |
| `"0-15,18"` | ranges, ends included, and single layers |
| `{every: 4, offset: 3}` | layers with l % 4 == 3; `offset` is `every - 1` where it is left out |
| `{ratio: 0.75, place: lower}` | the lowest three quarters; the number of layers is rounded half up |
| `{ratio: 0.75, place: upper}` | the highest three quarters |
| `{ratio: 0.25, place: uniform}` | a quarter, spread: floor((i + 0.5) · L / n); `uniform` where `place` is left out |
| `{scores: scores.json, top: 5}` | the 5 layers that a score file ranks first |

A score file is JSON: `{"scores": {"0": 0.31, "1": 0.02, …}, "higher_is": "keep"}`. Every layer has one finite
score; `higher_is` is `keep` or `convert` and says what a high score speaks for. `keep: {…, top: 5}` takes the
five that most deserve keeping, `convert` the five that most deserve converting; equal scores go to the lower
layer. Other keys are ignored.

Errors, not guesses: layers that the teacher does not have, negative layers, a layer named twice, an empty
range, a ratio that rounds to no layer, an override on a layer that keeps its attention or that another override
names.
"""

_STAGES = """\
## stages

A list, carried out in order: `transfer` first, then `calibrate`, `matrix`, `align`, `glue`, `extend`. Each item is one
key with its settings. Names must differ, so a second `glue` needs one: `- glue: {name: polish, tokens: 1M}`.
"""


def markdown() -> str:
    """The whole page."""
    parts = [_INTRO, table("The top level", Recipe, list(Recipe.model_fields), 2)]
    for name, info in Recipe.model_fields.items():
        section = info.annotation
        if name == "mixers":
            parts.append(_mixers())
        elif name == "stages":
            parts.append(_stages())
        elif isinstance(section, type) and issubclass(section, Section):
            parts.append(table(name, section, list(section.model_fields), 2))
        if name == "layers":
            parts.append(table("layers.overrides", OverrideSection, list(OverrideSection.model_fields)))
            parts += [table("layers.attention", AttentionSection, list(AttentionSection.model_fields)), _LAYERS]
    return "\n".join(parts)


def table(title: str, section: type[Section], keys: list[str], level: int = 3) -> str:
    """A section's keys as a table of Markdown, below a heading."""
    lines = [f"{'#' * level} {title}", "", section.__doc__ or "", "", *_HEADER]
    for name, info in section.model_fields.items():
        if name in keys:
            lines.append(
                f"| `{info.alias or name}` | {_value(info)} | {_default(info)} | {_cell(info.description or '')} |"
            )
    return "\n".join(lines) + "\n"


def _mixers() -> str:
    lines = ["## mixers", "", "Options by mixer, such as `mixers: {gated_deltanet: {conv: 4}}`.", ""]
    for name in registry.names():
        spec = registry.spec(name)
        aliases = ", ".join(f"`{alias}`" for alias in spec.aliases)
        lines += [f"### mixers.{name}", "", f"{spec.title}, {spec.paper}. Also called {aliases}.", ""]
        lines += _HEADER
        for field in dataclasses.fields(spec.options):
            low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
            if choices:
                words = ", ".join(f"`{_yaml(choice)}`" for choice in choices)
            else:
                words = " or ".join(_PLAIN.get(kind, kind) for kind in str(field.type).split(" | "))
                words += _bounds(low, high)
            lines.append(f"| `{field.name}` | {words} | `{_yaml(field.default)}` | {_cell(field.metadata['help'])} |")
        lines.append("")
    return "\n".join(lines)


def _stages() -> str:
    parts = [
        _STAGES,
        table("stages: what every training stage can set", TrainingStage, list(TrainingStage.model_fields)),
        table("spike of every training stage", SpikeSection, list(SpikeSection.model_fields)),
    ]
    for kind, stage in STAGES.items():
        title = "stages: transfer" if kind == "transfer" else f"stages: what {kind} adds or has another default for"
        parts.append(
            table(title, stage, list(Stage.model_fields) if kind == "transfer" else list(stage.__annotations__))
        )
        if kind == "align":
            parts.append(table("stream of align", StreamSection, list(StreamSection.model_fields)))
        if kind == "glue":
            parts.append(table("loss of glue and extend", LossWeights, list(LossWeights.model_fields)))
            parts.append(table("lora of glue and extend", LoraSection, list(LoraSection.model_fields)))
            fields = list(TeacherLogitsSection.model_fields)
            parts.append(table("teacher_logits of glue and extend", TeacherLogitsSection, fields))
        if kind == "extend":
            parts.append("All other keys are those of `glue`.\n")
    return "\n".join(parts)


_PLAIN = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "None": "null"}


def _value(info: FieldInfo) -> str:
    """The type and the bounds of a key in words."""
    return _words(info.annotation, info.metadata) + _bounds(*_limits(info.metadata))


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    for item in metadata:
        if isinstance(item, Words):
            return item.text
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(args[0], args[1:]) + _bounds(*_limits(args[1:]))
    if origin is Literal:
        return ", ".join(f"`{_yaml(arg)}`" for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args)
    if origin is dict:
        return "mapping"
    if origin is list:
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return _PLAIN["None" if annotation is type(None) else annotation.__name__]


def _limits(metadata: Iterable[Any]) -> tuple[str | None, str | None]:
    low = high = None
    for item in metadata:
        low = f"above {item.gt:g}" if getattr(item, "gt", None) is not None else low
        low = f"at least {item.ge:g}" if getattr(item, "ge", None) is not None else low
        high = f"at most {item.le:g}" if getattr(item, "le", None) is not None else high
    return low, high


def _bounds(low: Any, high: Any) -> str:
    named = [low if isinstance(low, str) else f"at least {low:g}"] if low is not None else []
    named += [high if isinstance(high, str) else f"at most {high:g}"] if high is not None else []
    return f", {', '.join(named)}" if named else ""


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        given = value.model_dump(exclude_defaults=True)
        return f"`{_yaml(given)}`" if given else ""
    return "" if value == {} or value == "" else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
