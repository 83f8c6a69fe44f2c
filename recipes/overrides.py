"""`key=value` changes from the command line: `stages.glue.tokens=2M layers.keep=1,3`.

A path is written with dots; a stage is addressed by its name. The value is what follows the first `=`; values that
begin with `[`, `{` or a quote are read as YAML, all others as one plain value.
"""

from __future__ import annotations

from typing import Any

from ..distill.errors import UserError
from . import rules, yaml_text
from .yaml_text import Path

# Below these, keys are the user's own words and may hold dots.
OPEN_MAPPINGS = (("data", "mix"), ("layers", "overrides"))


def apply(raw: dict[str, Any], texts: list[str], places: dict[Path, str]) -> None:
    """Make the changes in `raw`, in order, and note in `places` that they came from the command line.

    Raises:
        UserError: every override that cannot be placed, one per line.
    """
    problems = []
    for text in texts:
        try:
            _apply_one(raw, text, places)
        except ValueError as error:
            problems.append(f"command line: {text}: {error}")
    if problems:
        raise UserError("\n".join(problems))


def parse(text: str) -> tuple[list[str], Any]:
    """The path and the value of one override.

    Raises:
        ValueError: no `=`, an empty part in the path, or a list or mapping that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError("expected KEY=VALUE, for example stages.glue.tokens=2M")
    parts = key.strip().split(".")
    for prefix in OPEN_MAPPINGS:
        if tuple(parts[:2]) == prefix and len(parts) > 3:
            parts = [*prefix, ".".join(parts[2:])]
    if not all(parts):
        raise ValueError(f"{key!r} is not a path of keys joined by dots")
    if value.strip()[:1] not in ("[", "{", '"', "'"):
        return parts, yaml_text.scalar(value.strip())
    try:
        tree = yaml_text.read(value, "value", lambda path: True)
    except UserError as error:
        raise ValueError(
            f"the value is {str(error).partition(': ')[2].partition('. Mend')[0]}; quote it for the shell"
        ) from None
    if tree.faults:
        raise ValueError(tree.faults[0][2])
    return parts, tree.value


def none_is_word(path: Path) -> bool:
    """Whether a bare `none` may be meant at a path, rather than `null`."""
    words = (("layers", "keep"), ("layers", "convert"), ("data", "separator"), ("engine", "offload"))
    return path[:1] == ("mixers",) or path in words


def forget_alternative(raw: dict[str, Any], section: str, key: str) -> None:
    """Remove what excludes `section.key`, which is being set: `keep` where `convert` is given."""
    for where, first, second in rules.ALTERNATIVES:
        if section == where and key in (first, second) and isinstance(raw.get(section), dict):
            raw[section].pop(second if key == first else first, None)


def _apply_one(raw: dict[str, Any], text: str, places: dict[Path, str]) -> None:
    parts, value = parse(text)
    if value in ("None", "none", "NONE") and not none_is_word(tuple(parts)):
        raise ValueError(f"{value} is a text here; write null, or nothing after the =, for no value")
    here: Any = raw
    path: list[str | int] = []
    if parts[0] == "stages" and len(parts) > 1:
        if len(parts) == 2:
            raise ValueError(f"name a setting of the stage, for example stages.{parts[1]}.tokens=2M")
        here, path, parts = _stage(raw, parts)
    elif value is not None and len(parts) == 2:
        forget_alternative(raw, parts[0], parts[1])
    for i, part in enumerate(parts):
        if not isinstance(here, dict):
            raise ValueError(f"{'.'.join(map(str, path))} is a plain value and has no {part!r} below it")
        path.append(part)
        last = i == len(parts) - 1
        if last or here.get(part) is None:
            _forget_below(places, tuple(path))
            places[tuple(path)] = f"command line: {text}"
            here[part] = value if last else {}
        here = here[part]


def _stage(raw: dict[str, Any], parts: list[str]) -> tuple[Any, list[str | int], list[str]]:
    """The settings of the stage that `parts` addresses, their path, and the rest of `parts`."""
    stages = raw.get("stages")
    names = [rules.stage_name(item) for item in stages] if isinstance(stages, list) else []
    if parts[1] not in names:
        known = [name for name in names if name]
        raise ValueError(
            f"there is no stage {parts[1]!r}.{rules.nearest(parts[1], known)} Stages are addressed by name: "
            f"{', '.join(known) or 'this recipe has none'}"
        )
    index = names.index(parts[1])
    assert isinstance(stages, list)
    kind = next(iter(stages[index]))
    if stages[index][kind] is None:
        stages[index][kind] = {}
    return stages[index][kind], ["stages", index, kind], parts[2:]


def _forget_below(places: dict[Path, str], path: Path) -> None:
    """Places of a value that is being replaced."""
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
