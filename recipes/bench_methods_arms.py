"""The arms of `bench methods`: published procedures as recipes, brought to one budget on one teacher. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..distill.errors import UserError
from ..mixers import registry
from . import loader, rules
from .plan import layer_map
from .schema import EMBEDDED, CalibrateStage, Recipe, TrainingStage
from .teacher_config import TeacherConfig, locate, read_teacher_config

VERSION = 1
"""Part of every key: raise it when a change of the code lets the same recipes train to other students."""

GROUPS = ("linear", "window", "hybrid")
"""Arms are compared within these: all layers converted; a window beside them; some attention kept."""

FIELDS = ("Paper", "Starts from", "Kept layer", "Faithful", "Scaled", "Left out")
"""What the header comment of a method's file says, beside its first line."""

CONTEXT = 1024
"""Sequences are as long as the teacher's context, up to so many tokens."""

EVALUATIONS, EVAL_TOKENS = 15, 10_000
"""Measurements along the way of an arm, and held-out tokens of each."""

BEFORE, AFTER = ("matrix", "align"), ("glue", "extend")
"""Kinds of stages whose rates are scaled together: layer by layer, and end to end."""


@dataclass(frozen=True)
class Rates:
    """What tuning may change: factors of a recipe's learning rates, and the batch.

    Attributes:
        before: factor of the rates of matrix and align.
        after: factor of the rates of glue and extend.
        batch: sequences per step in every stage; None leaves them as they are.
    """

    before: float = 1.0
    after: float = 1.0
    batch: int | None = None


@dataclass(frozen=True)
class Place:
    """What all arms share.

    Attributes:
        teacher: folder, Hub id, or `embedded`.
        text: training text; None for the embedded one.
        valid: held-out text; None sets a twentieth of the documents aside.
        tokens: of training, for all stages of an arm together.
    """

    teacher: str
    text: str | None
    valid: str | None
    tokens: int

    @property
    def name(self) -> str:
        """The teacher's name in files and tables: no path."""
        return Path(self.teacher).name


def names() -> list[str]:
    """All arms; recipes that are only the first part of another one are not among them."""
    found = [name.partition("/")[2] for name in loader.methods()]
    parts = {header(name).get("Starts from") for name in found}
    return [name for name in found if name not in parts]


def chosen(text: str | None) -> list[str]:
    """Arms out of `a,b`, or all.

    Raises:
        UserError: an arm that does not exist.
    """
    known = names()
    if text is None:
        return known
    asked = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in asked:
        if name not in known:
            raise UserError(f"--arms: no arm {name!r}.{rules.nearest(name, known)} There are: {', '.join(known)}")
    return asked


@cache
def header(name: str) -> dict[str, str]:
    """`title` and the `FIELDS` that a method's file begins with."""
    lines = []
    for line in loader.text_of(f"methods/{name}").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    found = {"title": lines[0].strip()}
    field = ""
    for line in lines[1:]:
        key, colon, rest = line.strip().partition(": ")
        if colon and key in FIELDS:
            field = key
            found[field] = rest
        elif field and line.strip():
            found[field] += " " + line.strip()
    return found


def phases(name: str) -> list[str]:
    """The recipes that an arm runs, one after the other, each from the mixers of the one before."""
    first = header(name).get("Starts from")
    return [first, name] if first else [name]


def recipes(name: str, place: Place, seed: int, rates: Rates, kept: int | None, work: Path) -> list[Recipe]:
    """The recipes of an arm on a teacher, at the budget that all arms have.

    Tokens are scaled so that all training stages of all phases together see `place.tokens`; a warm-up is at most a
    tenth of its stage. Calibration keeps its tokens, which train nothing, where they are few beside the others.

    Args:
        name: of the arm.
        place: teacher, text and tokens.
        seed: of weights and data.
        rates: factors of its rates.
        kept: the layer that keeps its attention, where the arm keeps one; None leaves the recipe's own.
        work: folder for the runs.
    """
    changes = overrides(name, place, seed, rates, kept, work)
    return [loader.load(f"methods/{phase}", own) for phase, own in zip(phases(name), changes, strict=True)]


def overrides(name: str, place: Place, seed: int, rates: Rates, kept: int | None, work: Path) -> list[list[str]]:
    """What `recipes` changes in each phase's file, as on the command line; arguments as there."""
    length = min(teacher_config(place.teacher).context, CONTEXT)
    shared = [
        f"teacher.model={place.teacher}",
        f"data.source={place.text or EMBEDDED}",
        f"data.valid={place.valid or 0.05}",
        f"data.seq_len={length}",
        f"seed={seed}",
        f"eval.every={max(1, place.tokens // EVALUATIONS)}",
        f"eval.tokens={EVAL_TOKENS}",
        "eval.assembled=true",
        f"save.every={place.tokens}",
    ]
    raw = [loader.load(f"methods/{phase}", shared) for phase in phases(name)]
    total = sum(stage.tokens for recipe in raw for stage in recipe.stages if isinstance(stage, TrainingStage))
    made = []
    for phase, recipe in zip(phases(name), raw, strict=True):
        changes = [*shared, f"save.dir={work / phase}"]
        if kept is not None and recipe.layers.keep is not None and phase == name:
            changes.append(f"layers.keep=[{kept}]")
        for stage in recipe.stages:
            if isinstance(stage, TrainingStage):
                changes += _scaled(stage, place.tokens / total, length, rates)
            elif isinstance(stage, CalibrateStage):  # it looks at no more than a ninth beside the training
                changes.append(f"stages.{stage.name}.tokens={min(stage.tokens, place.tokens // 9)}")
        made.append(changes)
    return made


def _scaled(stage: TrainingStage, share: float, length: int, rates: Rates) -> list[str]:
    """Overrides that bring a stage to its size."""
    tokens = max(1, round(stage.tokens * share))
    batch = rates.batch or stage.batch
    found: dict[str, Any] = {
        "tokens": tokens,
        "batch": batch,
        "warmup": min(stage.warmup, tokens // (batch * length) // 10),
    }
    if stage.kind == "extend":
        found["seq_len"] = length
    factor = rates.before if stage.kind in BEFORE else rates.after
    for key in ("lr", "lr_final", "lr_mixers", "lr_matrices"):
        value = getattr(stage, key, None)
        if value is not None and factor != 1.0:
            found[key] = float(f"{value * factor:.4g}")
    return [f"stages.{stage.name}.{key}={value}" for key, value in found.items()]


@cache
def teacher_config(model: str) -> TeacherConfig:
    """config.json of the teacher, read once."""
    return read_teacher_config(model)


@dataclass(frozen=True)
class Shape:
    """What an arm's student carries.

    Attributes:
        group: one of `GROUPS`.
        kept: layers that keep their attention.
        window: tokens of the softmax window in converted layers, 0 where there is none.
        state_bytes: what one sequence carries in a converted layer, the window included; the largest of all layers.
        window_bytes: how much of it is the window.
        reach: tokens back that windows alone can carry anything over all converted layers, 0 without windows.
    """

    group: str
    kept: list[int]
    window: int
    state_bytes: int
    window_bytes: int
    reach: int


def shape(recipe: Recipe) -> Shape:
    """What the student of an arm's last recipe carries; from config.json alone."""
    teacher = teacher_config(recipe.teacher.model)
    layers = layer_map(recipe, teacher.num_layers)
    window, held, near = 0, 0, 0
    for layer, (name, values) in layers.converted.items():
        spec, geometry = registry.spec(name), teacher.geometry(layer)
        options = spec.options.parse(values)
        own = getattr(options, "window", 0) or 0
        window, held = max(window, own), max(held, spec.state_bytes(geometry, options))
        near = max(
            near,
            8 * own * (geometry.inner_size if getattr(options, "expand_kv", False) else geometry.kv_size) if own else 0,
        )
    group = "hybrid" if layers.kept else "window" if window else "linear"
    return Shape(group, layers.kept, window, held, near, max(0, window - 1) * len(layers.converted))


def content_key(recipes: list[Recipe], teacher: str) -> str:
    """What a result depends on, as a hash: resolved recipes, the teacher's weights, the text, `VERSION`."""
    plain = []
    for recipe in recipes:
        values = recipe.to_dict()
        for key in ("save", "track", "publish", "max_hours", "teacher"):
            values.pop(key)
        for key in ("source", "valid"):
            if isinstance(values["data"][key], str) and values["data"][key] != EMBEDDED:
                values["data"][key] = files_hash(values["data"][key])
        plain.append(values)
    content = json.dumps([VERSION, files_hash(locate(teacher)), plain], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@cache
def files_hash(source: str) -> str:
    """Of a file's content, or of a model folder's config and weights."""
    path = Path(source).expanduser()
    found = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("config.json")])
    if not found:
        raise UserError(f"{source}: no such file, and no folder with weights; results are keyed by what is in it")
    digest = hashlib.sha256()
    for file in found:
        digest.update(file.name.encode() if path.is_dir() else b"")
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def plain_rates(rates: Rates) -> dict[str, Any]:
    """For JSON."""
    return {"before": rates.before, "after": rates.after, "batch": rates.batch}
