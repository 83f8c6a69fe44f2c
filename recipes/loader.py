"""From a recipe's name or path to a validated recipe: YAML, `extends`, overrides, and all errors at once.

Every mistake is one line, `file:line: dotted.path: what is wrong and what to write`, and all lines are in one error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path as FilePath
from typing import Any, Generic, TypeVar, get_args, get_origin

from pydantic import ValidationError

from ..distill.errors import UserError
from . import overrides as changes
from . import rules, yaml_text
from .fields import Placed
from .schema import EMBEDDED, STAGES, Faults, Recipe, Section
from .yaml_text import Path, Tree

# Words that users bring along from other trainers.
OTHER_WORDS = {
    "learning_rate": "lr",
    "min_lr": "lr_final",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "batch_size": "batch",
    "global_batch_size": "batch",
    "per_device_train_batch_size": "micro_batch",
    "max_tokens": "tokens",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "sequence_length": "seq_len",
    "context_length": "seq_len",
    "grad_clip": "clip",
    "max_grad_norm": "clip",
    "model_name": "model",
    "model_name_or_path": "model",
    "torch_dtype": "dtype",
    "output_dir": "dir",
    "keep_full_attention_layers": "keep",
    "dataset": "source",
    "path": "source",
    "file": "source",
}
OTHER_VALUES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "full": "all",
    "cos": "cosine",
}
# Replaced as a whole when a recipe that extends another one gives them.
_WHOLE = ({"layers.keep", "layers.convert", "layers.overrides", "data.mix"}, {"loss", "betas"})
_TO_GIVE = {"teacher.model": "PATH_OR_ID", "data.source": "FILE", "model": "RUN/export"}

R = TypeVar("R", bound=Placed)


@dataclass(frozen=True)
class Kind(Generic[R]):
    """What a YAML file is read as.

    Attributes:
        schema: its top.
        rules: what no single key can say: plain values -> (path, message) of every broken rule.
        folder: where below this package those lie that are shipped: "" or `NAME/`.
        sections: that are mappings where a file leaves them out, so that errors name the key below that is missing.
        example: a command that shows one.
    """

    schema: type[R]
    rules: Callable[[Any], list[tuple[Path, str]]]
    folder: str
    sections: tuple[str, ...]
    example: str

    def shipped(self) -> list[str]:
        """Names of those inside the package, sorted."""
        return _names(self.folder)

    def named(self, name: str) -> str:
        """What a user calls it as this module does: `sft` -> `posttrain/sft`; anything else as it is."""
        return f"{self.folder}{name}" if f"{self.folder}{name}" in self.shipped() else name


CONVERSION = Kind(Recipe, rules.check, "", ("teacher", "data"), "relinear show rwkv7")


def load(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """A validated recipe.

    Args:
        name_or_path: a shipped recipe's name, `methods/NAME`, or the path of a YAML file.
        overrides: `key=value` changes, applied in order.

    Raises:
        UserError: every mistake, one per line, each with its place.
    """
    recipe = load_as(CONVERSION, name_or_path, overrides)
    return _completed(recipe, name_or_path if name_or_path in shipped() else FilePath(name_or_path).stem)


def load_as(kind: Kind[R], name_or_path: str, overrides: list[str] | None = None) -> R:
    """A validated recipe of any kind; see `load`."""
    tree = _read(name_or_path)
    if not isinstance(tree.value, dict):
        found = "is empty" if tree.value is None else f"holds {type(tree.value).__name__} {str(tree.value)[:40]!r}"
        raise UserError(f"{name_or_path}: {found}; a recipe is a mapping of sections. To see one: {kind.example}")
    tree = _extended(kind, tree, name_or_path)
    foreign = {"method"} if kind is CONVERSION else {"teacher", "layers", "stages"}
    if foreign & set(tree.value):
        right = "relinear posttrain" if kind is CONVERSION else "relinear run"
        given = name_or_path if inside(name_or_path) else f"{name_or_path}: this recipe"
        raise UserError(f"{given} is one of {right}. Type: {right} {name_or_path}; to list them: relinear ls recipes")
    changes.apply(tree.value, overrides or [], tree.places)
    for section in kind.sections:
        tree.value.setdefault(section, {})
    recipe = _validated(kind, tree)
    recipe._places = {_dotted(path, tree.value): place for path, place in tree.places.items()}
    return recipe


def dump(recipe: Placed) -> str:
    """The resolved recipe as YAML with every key; `load` reads it back to an equal recipe."""
    return yaml_text.write(recipe.to_dict())


def shipped() -> list[str]:
    """Names of the recipes inside the package, sorted."""
    return _names("")


def methods() -> list[str]:
    """Published procedures inside the package as `methods/NAME`, sorted; `relinear bench methods` runs them."""
    return _names("methods/")


def posttrain() -> list[str]:
    """Recipes for training after conversion as `posttrain/NAME`, sorted; `relinear posttrain` runs them."""
    return _names("posttrain/")


def inside(name: str) -> bool:
    """The package has a recipe of that name."""
    return name in (*shipped(), *methods(), *posttrain())


def text_of(name_or_path: str) -> str:
    """A recipe's file as it stands.

    Raises:
        UserError: no such recipe, or not readable.
    """
    if inside(name_or_path):
        return (_folder() / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = FilePath(name_or_path).expanduser()
    if not path.exists():
        known = [*shipped(), *posttrain()]
        raise UserError(
            f"{name_or_path}: no such file, and no shipped recipe of that name."
            f"{rules.nearest(name_or_path, [*known, *methods()])} Shipped: {', '.join(known)}. "
            "To list them: relinear ls recipes"
        )
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{name_or_path}: cannot be read ({error.strerror}). Give a YAML file or a shipped recipe"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name_or_path}: not UTF-8 text (byte {error.start}). Give a YAML file") from None


def summary(name_or_path: str) -> str:
    """The first line of a recipe's header comment: what it does."""
    first = text_of(name_or_path).lstrip().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def keys_below(path: Path, root: type[Section] = Recipe) -> dict[str, type[Section] | None]:
    """The keys that the schema has below a path (as in the data: stages by number and kind), each with its section.

    Empty where the keys are the user's own words or the path leads nowhere.
    """
    here: type[Section] | None = root
    parts = list(path)
    if parts[:1] == ["stages"] and len(parts) >= 3:
        here, parts = STAGES.get(str(parts[2])), parts[3:]
    while parts and here is not None:
        here = _sections(here).get(str(parts.pop(0)))
    return _sections(here) if here is not None else {}


def _sections(section: type[Section]) -> dict[str, type[Section] | None]:
    found: dict[str, type[Section] | None] = {}
    for name, info in section.model_fields.items():
        kinds = [info.annotation, *get_args(info.annotation)]
        known = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        found[info.alias or name] = known[0] if known and get_origin(info.annotation) is not list else None
    return found


def _folder() -> Any:
    return resources.files(__package__ or "relinear.recipes")


def _names(folder: str) -> list[str]:
    """The YAML files of a folder below this package, as `FOLDER/NAME`."""
    place = _folder() / folder if folder else _folder()
    return sorted(
        f"{folder}{file.name.removesuffix('.yaml')}" for file in place.iterdir() if file.name.endswith(".yaml")
    )


def _read(name_or_path: str) -> Tree:
    label = f"{name_or_path}.yaml" if inside(name_or_path) else name_or_path
    return yaml_text.read(text_of(name_or_path), label, changes.none_is_word)


def _extended(kind: Kind[R], child: Tree, name_or_path: str) -> Tree:
    """The recipe on top of the one it extends; the recipe itself where it extends none."""
    if "extends" not in child.value:
        return child
    base = child.value.pop("extends")
    where = f"{child.places[('extends',)]}: extends"
    if not isinstance(base, str):
        raise UserError(f"{where}: expected a shipped recipe's name or a path, found {base!r}")
    base = kind.named(base)
    if base not in kind.shipped():
        base = str(FilePath(name_or_path).expanduser().parent / FilePath(base).expanduser())
    try:
        parent = _read(base)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(parent.value, dict):
        raise UserError(f"{where}: {base} is not a mapping of sections")
    if "extends" in parent.value:
        raise UserError(f"{where}: {base} extends another recipe itself; one level only. Extend that one, or copy it")
    merged = Tree(parent.value, parent.places, parent.faults + child.faults)
    _merge(merged, parent.value, child.value, (), (), child.places)
    return merged


def _merge(
    tree: Tree, below: dict[str, Any], above: dict[str, Any], path: Path, source: Path, places: dict[Path, str]
) -> None:
    """Lay `above` over `below`: mappings key by key, stages by name, everything else replaced.

    `path` is where we are in the merged data, `source` in the data of the recipe above.
    """
    for key, value in above.items():
        old = below.get(key)
        here, there = (*path, key), (*source, key)
        if len(path) == 1 and value is not None:
            changes.forget_alternative(tree.value, str(path[0]), key)
        if here == ("stages",) and isinstance(value, dict) and isinstance(old, list):
            _merge_stages(tree, old, value, places)
        elif (
            isinstance(value, dict)
            and isinstance(old, dict)
            and _dotted(here) not in _WHOLE[0]
            and key not in _WHOLE[1]
        ):
            tree.places[here] = places[there]
            _merge(tree, old, value, here, there, places)
        else:
            below[key] = value
            for known in [known for known in tree.places if known[: len(here)] == here]:
                del tree.places[known]
            _copy_places(tree.places, here, places, there)


def _merge_stages(tree: Tree, stages: list[Any], above: dict[str, Any], places: dict[Path, str]) -> None:
    """`stages: {glue: {tokens: 2M}}` on top of another recipe: its stages by name."""
    names = [rules.stage_name(item) for item in stages]
    for name, settings in above.items():
        place = places["stages", name]
        if name not in names:
            known = ", ".join(filter(None, names))
            message = (
                f"the extended recipe has no stage {name!r}; it has {known}. Write stages as a list to replace them"
            )
            tree.faults.append((("stages", name), place, message))
            continue
        index = names.index(name)
        kind = next(iter(stages[index]))
        if not isinstance(settings, dict):
            tree.faults.append((("stages", name), place, f"expected a mapping of settings, found {settings!r}"))
            continue
        stages[index][kind] = stages[index][kind] or {}
        _merge(tree, stages[index][kind], settings, ("stages", index, kind), ("stages", name), places)


def _copy_places(into: dict[Path, str], here: Path, places: dict[Path, str], there: Path) -> None:
    for path, place in places.items():
        if path[: len(there)] == there:
            into[here + path[len(there) :]] = place


def _validated(kind: Kind[R], tree: Tree) -> R:
    """The recipe, or one error with a line for every mistake, in the order of the file."""
    problems = [(place, _dotted(path, tree.value), message) for path, place, message in tree.faults]
    faulty = {path for path, _, _ in tree.faults}
    recipe = None
    found: list[tuple[Path, str]] = []
    try:
        recipe = kind.schema.model_validate(tree.value)
    except ValidationError as error:
        for item in error.errors():
            cause = item.get("ctx", {}).get("error")
            if isinstance(cause, Faults):
                found += [(item["loc"] + path, message) for path, message in cause.items]
            else:
                found.append((item["loc"], _message(item, tree.value, kind.schema)))
        found += [rule for rule in kind.rules(tree.value) if rule not in found]
    for path, message in found:
        if path not in faulty:
            problems.append((_place(tree.places, path), _dotted(path, tree.value), message))
    if problems or recipe is None:
        lines = [f"{place}: {path}: {message}" for place, path, message in sorted(problems, key=_by_line)]
        raise UserError("\n".join(dict.fromkeys(lines)))
    return recipe


def _by_line(problem: tuple[str, str, str]) -> tuple[str, int]:
    name, _, line = problem[0].rpartition(":")
    return (name, int(line)) if line.isdecimal() else ("", 0)


def _place(places: dict[Path, str], path: Path) -> str:
    """Where a path was written, or the nearest thing above it."""
    for end in range(len(path), -1, -1):
        if path[:end] in places:
            return places[path[:end]]
    return "recipe"


def _dotted(path: Path, raw: Any = None) -> str:
    """A path for people: stages by name instead of number and kind."""
    parts = [str(part) for part in path]
    if parts[:1] == ["stages"] and len(parts) > 1 and isinstance(path[1], int):
        stages = raw.get("stages") if isinstance(raw, dict) else None
        item = stages[path[1]] if isinstance(stages, list) and path[1] < len(stages) else None
        parts = ["stages", rules.stage_name(item) or f"item {path[1] + 1}", *parts[3:]]
    return ".".join(parts) or "recipe"


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


def _message(item: Any, raw: Any, root: type[Section]) -> str:
    """One of pydantic's errors in our words: expected, found, and what to write."""
    fault, value, context, path = item["type"], item["input"], item.get("ctx", {}), item["loc"]
    if fault == "extra_forbidden":
        return _unknown(path, root)
    if fault == "missing":
        dotted = _dotted(path, raw)
        example = _TO_GIVE.get(dotted) or ("2M" if path[-1] in ("tokens", "lr") else "VALUE")
        example = "1e-3" if path[-1] == "lr" else "1" if dotted == "schema" else example
        return f"required; add {dotted}={example} to the command, or write it in the recipe"
    if fault == "value_error":
        return str(context["error"])
    if fault == "literal_error":
        expected = f"one of {context['expected']}".replace("'", "").replace(" or ", ", ")
        expected = expected.removeprefix("one of ") if "," not in expected else expected
        return f"expected {expected}, found {value!r}.{_near_value(value, expected)}".rstrip(".")
    if fault in _EXPECTED:
        hint = _near_bool(value) if fault == "bool_type" else ""
        if fault == "string_type" and isinstance(value, int | float):
            hint = """; quotes make it a text: '"..."' on the command line"""
        return f"expected {_EXPECTED[fault]}, found {value!r}{hint}"
    bounds = {"greater_than": "above {gt}", "greater_than_equal": "at least {ge}", "less_than": "below {lt}"}
    bounds |= {"less_than_equal": "at most {le}"}
    if fault in bounds:
        limits = {name: f"{limit:g}" for name, limit in context.items()}
        return f"expected a number {bounds[fault].format(**limits)}, found {value!r}"
    if fault in ("string_too_short", "too_short"):
        return "is empty; give a value, or leave the key out"
    return f"{item['msg'][0].lower()}{item['msg'][1:]}, found {value!r}"


def _near_bool(value: Any) -> str:
    words = {"yes": "true", "on": "true", "no": "false", "off": "false"}
    return f"; write {words[value]}" if isinstance(value, str) and value in words else ""


def _near_value(value: Any, expected: str) -> str:
    if not isinstance(value, str):
        return ""
    known = re.split(r"[ ,]+", expected.removeprefix("one of "))
    other = OTHER_VALUES.get(value.lower())
    return f" Did you mean {other}?" if other in known else rules.nearest(value, known)


def _unknown(path: Path, root: type[Section]) -> str:
    """What to write instead of an unknown key."""
    key = str(path[-1])
    known = keys_below(path[:-1], root)
    better = OTHER_WORDS.get(key.lower(), key)
    if better in known:
        return f"unknown key. Did you mean {better}?"
    near = rules.nearest(key, [*known, "extends"] if len(path) == 1 else known)
    if near:
        return f"unknown key.{near}"
    for section, below in _sections(root).items():
        if below is not None and better in _sections(below):
            return f"unknown key. Did you mean {section}.{better}?"
    return f"unknown key. Known here: {', '.join(known)}"


def _completed(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the values that depend on others written out: options of all mixers used, the run folder."""
    from ..mixers import registry

    used = [recipe.layers.mixer, *(item.mixer for item in recipe.layers.overrides.values())]
    options = {mixer: registry.spec(mixer).options().to_dict() for mixer in dict.fromkeys(used)}
    model = recipe.teacher.model
    teacher = FilePath(model).expanduser().resolve().name if model.startswith((".", "~")) else FilePath(model).name
    folder = recipe.save.dir or (f"runs/{name}" if model == EMBEDDED else f"runs/{name}-{teacher}")
    update = {"mixers": options | recipe.mixers, "save": recipe.save.model_copy(update={"dir": folder})}
    return recipe.model_copy(update=update)
