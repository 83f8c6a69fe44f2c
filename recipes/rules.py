"""What no single key of a recipe can say: which keys exclude each other, and the order of the stages.

The rules read plain data and skip what is malformed, so that they can speak together with the errors of the schema.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

Path = tuple[str | int, ...]

# Setting one on top of a parent recipe, or on the command line, removes the other one from below.
ALTERNATIVES = (("layers", "keep", "convert"), ("data", "source", "mix"))
RESERVED = (
    "checkpoints",
    "export",
    "logs",
    "loss",
    "manifest",
    "measured",
    "metrics",
    "recipe",
    "replay",
    "result",
    "run",
)
"""Names in a run folder that no stage may have, as it writes files of its own name there."""
ORDER = ("transfer", "calibrate", "matrix", "align", "glue", "extend")


def check(raw: Any) -> list[tuple[Path, str]]:
    """Every broken rule as (path, message)."""
    if not isinstance(raw, dict):
        return []
    return [*_layers(raw), *_attention(raw), *_data(raw), *_stages(raw), *_stream(raw), *_measured(raw)]


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def stage_name(item: Any) -> str | None:
    """The name of a stage as written in a recipe, None where it is malformed."""
    if not isinstance(item, dict) or len(item) != 1:
        return None
    kind, settings = next(iter(item.items()))
    name = settings.get("name") if isinstance(settings, dict) else None
    return str(name or kind)


def _given(section: Any, key: str) -> bool:
    return isinstance(section, dict) and section.get(key) is not None


def _layers(raw: dict[str, Any]) -> list[tuple[Path, str]]:
    layers = raw.get("layers")
    if not isinstance(layers, dict):
        return []
    if _given(layers, "keep") and _given(layers, "convert"):
        return [
            (("layers", "convert"), "keep is given too, and each is the complement of the other; remove one of them")
        ]
    if not _given(layers, "keep") and not _given(layers, "convert"):
        return [(("layers",), "neither keep nor convert is given; write one of them, for example convert: all")]
    return []


def _attention(raw: dict[str, Any]) -> list[tuple[Path, str]]:
    layers, stages = raw.get("layers"), raw.get("stages")
    given = layers.get("attention") if isinstance(layers, dict) else None
    if not isinstance(given, dict) or not isinstance(stages, list):
        return []
    changed = given.get("rope") is False or _given(given, "logit_scale") or _given(given, "window")
    if changed and not any(isinstance(item, dict) and {"glue", "extend"} & set(item) for item in stages):
        message = "kept layers are changed when glue begins, and there is no glue stage; add one, or remove this"
        return [(("layers", "attention"), message)]
    return []


def _data(raw: dict[str, Any]) -> list[tuple[Path, str]]:
    data = raw.get("data", {})
    if not isinstance(data, dict):
        return []
    found: list[tuple[Path, str]] = []
    if _given(data, "source") and _given(data, "mix"):
        found.append((("data", "mix"), "source is given too; remove one of them"))
    elif not _given(data, "source") and not _given(data, "mix"):
        found.append((("data", "source"), "required, as no text is named; add data.source=FILE to the command"))
    if data.get("text", "") is None and not _given(data, "messages"):
        found.append((("data", "text"), "null, and messages is not given either; name the field that holds the text"))
    return found


def _stages(raw: dict[str, Any]) -> list[tuple[Path, str]]:
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return []
    found: list[tuple[Path, str]] = []
    names: set[str] = set()
    last = ""
    for i, item in enumerate(stages):
        name = stage_name(item)
        if name is None:
            continue
        kind, settings = next(iter(item.items()))
        if name in names:
            found.append(
                (("stages", i), f"a stage named {name!r} came before; give one of them another name: {{name: ...}}")
            )
        names.add(name)
        if name in RESERVED or (name in ORDER and name != kind):
            found.append((("stages", i, kind, "name"), f"{name!r} is taken in a run folder; choose another name"))
        if kind in ORDER:
            if i == 0 and kind != "transfer":
                found.append((("stages", i), f"the first stage is {kind}; put - transfer: {{}} before it"))
            if last and (ORDER.index(kind) < ORDER.index(last) or kind == last == "transfer"):
                found.append((("stages", i), f"{kind} cannot follow {last}; the order is {', '.join(ORDER)}"))
            last = kind
        found += [(("stages", i, kind, key), message) for key, message in _settings(settings)]
    return found


def _stream(raw: dict[str, Any]) -> list[tuple[Path, str]]:
    """What goes with a teacher that is never whole in memory before glue."""
    stages = raw.get("stages")
    items = [next(iter(item.items())) for item in stages or [] if isinstance(item, dict) and len(item) == 1]
    place = next((i for i, (kind, held) in enumerate(items) if kind == "align" and _given(held, "stream")), None)
    if place is None:
        return []
    where: Path = ("stages", place, "align", "stream")
    found: list[tuple[Path, str]] = []
    if any(kind == "matrix" for kind, _ in items):
        found.append((where, "matrix needs the whole teacher in memory; remove that stage, or this"))
    if sum(kind == "align" for kind, _ in items) > 1:
        found.append((where, "the only align stage can be streamed, and there are several; leave one"))
    if sum(kind == "calibrate" for kind, _ in items) > 1:
        found.append((where, "one calibrate stage can go before it, and there are several; leave one"))
    engine, measured = raw.get("engine"), raw.get("eval")
    if isinstance(engine, dict) and engine.get("parallel", "single") != "single":
        message = "runs in single processes; write engine.parallel=single, and start more of them for stream.blocks"
        found.append((where, message))
    if isinstance(measured, dict) and measured.get("assembled") is True:
        found.append((("eval", "assembled"), "needs the whole model in memory; write false beside a streamed align"))
    return found


def _measured(raw: dict[str, Any]) -> list[tuple[Path, str]]:
    """Options of benchmark tasks without the suite that reads them."""
    section = raw.get("eval")
    suite = section.get("suite") if isinstance(section, dict) else None
    chosen = suite if isinstance(suite, list) else [suite]
    found: list[tuple[Path, str]] = []
    for key in ("tasks", "limit", "data", "task_dir"):
        if _given(section, key) and "core" not in chosen:
            found.append((("eval", key), "is of the suite core; write suite: [quick, core] too, or remove this"))
    return found


def _settings(settings: Any) -> list[tuple[str, str]]:
    """Rules within one training stage."""
    if not isinstance(settings, dict):
        return []
    found = []
    batch, micro = settings.get("batch"), settings.get("micro_batch")
    if isinstance(batch, int) and isinstance(micro, int) and micro > 0 and batch % micro:
        found.append(("micro_batch", f"{micro} does not divide batch, which is {batch}"))
    if _given(settings, "lora") and settings.get("train") != "lora":
        found.append(("lora", "adapters train with train: lora only; write that too, or remove this"))
    found += [("teacher_logits", message) for message in _teacher_logits(settings)]
    lr, final = settings.get("lr"), settings.get("lr_final")
    if isinstance(lr, int | float) and isinstance(final, int | float) and final > lr:
        found.append(("lr_final", f"{final} is higher than lr, which is {lr}; learning rates fall"))
    return found


def _teacher_logits(settings: dict[str, Any]) -> list[str]:
    """What a cache of the teacher's logits cannot give."""
    cache, loss = settings.get("teacher_logits"), settings.get("loss")
    if not isinstance(cache, dict):
        return []
    found = []
    weights = loss if isinstance(loss, dict) else {"kl": 1.0}
    for term, needs in (("reverse_kl", "its logits of every token"), ("align", "its layers")):
        if weights.get(term):
            found.append(f"a cache does not hold what loss.{term} needs, {needs}; write {term}: 0, or remove this")
    if not weights.get("kl"):
        found.append("loss.kl is 0, so nothing would be read from it; give kl a weight, or remove this")
    kept, temperature = cache.get("temperature"), settings.get("temperature", 1.0)
    if isinstance(kept, int | float) and isinstance(temperature, int | float) and kept != temperature:
        found.append(f"kept at temperature {kept:g}, the stage's is {temperature:g}; write the same, or leave it out")
    return found
