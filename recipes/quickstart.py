"""The main job on the embedded default: convert all layers, then all but one; measure, export, verify, generate."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..distill import checkpoint, files
from ..distill.errors import RunFailed
from ..distill.hybrid import Hybrid
from ..distill.student import assemble, transfer
from ..distill.teacher import Teacher, load_model, load_teacher
from ..distill.verify import verify
from ..eval import plots
from ..eval.cache import cache_bytes
from ..eval.fidelity import measure
from ..eval.recall import recall
from ..eval.tables import Row, to_json, to_text
from . import loader
from .runner import run
from .schema import AlignStage, Recipe
from .session import Progress, Silent, eval_set, open_session
from .teacher_config import locate

LENGTHS = (1024, 8192, 32768)
"""Contexts at which the decode cache is measured, in tokens."""

TRIAL_TOKENS = 8_000
"""Held-out tokens on which each restored layer is tried."""

PROMPT = "Once upon a time"


def quickstart(out: Path, progress: Progress | None = None, overrides: list[str] | None = None) -> dict[str, Any]:
    """Convert the embedded teacher twice and put everything that was measured into one table.

    The hybrid starts from the aligned mixers of the all-linear run: align treats every layer by itself, so nothing
    about them depends on which others are converted. Which layer keeps its attention is decided by trying each.

    Args:
        out: folder for both runs and the summary. Finished parts of an earlier, interrupted call are taken up.
        progress: whom to tell.
        overrides: of the shipped recipe, e.g. smaller stages.

    Returns:
        What summary.json holds, and `table`, the same as text.

    Raises:
        UserError: `out` holds other runs.
        RunFailed: an export does not pass its verification.
    """
    progress = progress or Silent()
    began = time.monotonic()
    if (out / "summary.json").exists():
        progress.note(f"{out}: holds a finished quickstart; here it is. To repeat it: --out ANOTHER_FOLDER")
        held = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        return held | {"table": (out / "summary.txt").read_text(encoding="utf-8").rstrip("\n")}
    changes = list(overrides or [])
    linear_recipe = loader.load("quickstart", [*changes, f"save.dir={out / 'all-linear'}"])
    linear = run(linear_recipe, resume=True, progress=progress)
    if linear["status"] != "complete":
        return linear
    teacher = load_teacher(locate(linear_recipe.teacher.model))
    chosen = _best_layer(linear_recipe, teacher, out, progress)
    layer = chosen["layer"]
    hybrid_recipe = loader.load(
        "quickstart",
        [*changes, f"save.dir={out / 'hybrid'}", f"layers.keep={layer}", *_without_align(linear_recipe)],
    )
    hybrid = run(hybrid_recipe, resume=True, progress=progress, start=out / "all-linear")
    if hybrid["status"] != "complete":
        return hybrid
    rows, models, cells = _rows(linear, hybrid, layer, teacher, progress)
    reports = {name: _verified(Path(result["export"]), progress) for name, result in _named(linear, hybrid).items()}
    text = to_text(rows, title=f"The embedded teacher ({linear['teacher']}), converted")
    table = f"{text}\n\n{_sample(models['hybrid'], teacher)}"
    summary = {
        "rows": to_json(rows),
        "recall_cells": cells,
        "chosen": chosen,
        "verified": reports,
        "runs": {name: result["run"] for name, result in _named(linear, hybrid).items()},
        "export": hybrid["export"],
        "seconds": round(time.monotonic() - began, 1),
        "environment": checkpoint.environment(),
    }
    plots.recall_by_distance(rows, out / "recall.png")
    plots.cache_over_length(rows, out / "cache.png")
    plots.fidelity_bars(rows, out / "fidelity.png")
    files.write_text(out / "summary.txt", table + "\n")
    files.write_json(out / "summary.json", summary)
    return summary | {"table": table}


def _named(linear: dict[str, Any], hybrid: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"all-linear": linear, "hybrid": hybrid}


def _without_align(recipe: Recipe) -> list[str]:
    """The override that takes the align stage out: its work is loaded."""
    stages = [{stage.kind: _plain(stage)} for stage in recipe.stages if not isinstance(stage, AlignStage)]
    return [f"stages={stages}"]


def _plain(stage: Any) -> dict[str, Any]:
    return stage.model_dump(mode="json", exclude_defaults=True)


def _best_layer(recipe: Recipe, teacher: Teacher, out: Path, progress: Progress) -> dict[str, Any]:
    """Try each layer's attention in the aligned all-linear model; forward passes only.

    Returns:
        {"layer": the one that brings the model nearest to the teacher, "kl": {layer: KL in nats per token}}.
    """
    path = out / "restored.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    session = open_session(recipe, resume=True, max_hours=None, progress=Silent(), start=None)
    mixers, _ = transfer(teacher, session.layers.converted, recipe.seed)
    name = next(stage.name for stage in recipe.stages if isinstance(stage, AlignStage))
    weights = checkpoint.Checkpoints(session.folder / "checkpoints").require_complete(name).weights()
    for layer, mixer in mixers.items():
        mixer.load_state_dict({key: weights[f"{layer}.{key}"] for key in mixer.state_dict()})
    batches = list(eval_set(session, TRIAL_TOKENS))
    session.close()
    progress.note("which layer keeps its attention: trying each in the aligned model")
    kl = {}
    hybrid = Hybrid(teacher, mixers)
    for layer in mixers:
        student = assemble(teacher, hybrid.mixers_of(mixers.keys() - {layer}))
        kl[str(layer)] = measure(student, teacher.model, batches)["kl"]
    best = min(kl, key=lambda layer: kl[layer])
    progress.note(
        "attention restored in one layer, KL: " + ", ".join(f"{layer}: {value:.3f}" for layer, value in kl.items())
    )
    chosen = {"layer": int(best), "kl": kl}
    files.write_json(path, chosen)
    return chosen


def _rows(
    linear: dict[str, Any], hybrid: dict[str, Any], layer: int, teacher: Teacher, progress: Progress
) -> tuple[list[Row], dict[str, Any], dict[str, Any]]:
    """One row per model, everything measured on the exported folders; the models; their recall cell by cell."""
    models = {"teacher": teacher.model}
    models |= {name: load_model(result["export"])[0] for name, result in _named(linear, hybrid).items()}
    measured = {}
    for name, model in models.items():
        progress.note(f"{name}: recall and decode cache")
        with torch.no_grad():
            measured[name] = {
                "recall": recall(model, teacher.tokenizer),
                "cache_bytes": cache_bytes(model, LENGTHS),
            }
    spent = {
        "all-linear": {"tokens": linear["tokens"], "seconds": linear["seconds"]},
        # The hybrid's own training, and what it shares with the other run.
        "hybrid": {
            "tokens": hybrid["tokens"] + linear["tokens"] - _of("glue", linear)["tokens"],
            "seconds": hybrid["seconds"] + linear["seconds"] - _of("glue", linear)["seconds"],
        },
    }
    rows = [Row.of_teacher("teacher", linear["fidelity"], **measured["teacher"])]
    for name, result in _named(linear, hybrid).items():
        rows.append(Row.of_student(name, result["fidelity"], **measured[name], **spent[name]))
    rows[2] = replace(rows[2], name=f"hybrid (keeps {layer})")
    return rows, models, {name: values["recall"]["cells"] for name, values in measured.items()}


def _of(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """What a run says of one of its stages."""
    return next(stage for stage in result["stages"] if stage["name"] == name)


def _verified(export: Path, progress: Progress) -> dict[str, Any]:
    progress.note(f"verify {export}: a fresh process without relinear")
    report = verify(export)
    failed = [name for name, check in report["checks"].items() if not check["ok"]]
    if failed:
        raise RunFailed(f"{export}: {', '.join(failed)} failed. See: relinear verify {export}")
    return report


def _sample(model: Any, teacher: Teacher) -> str:
    """A few greedy tokens of the hybrid."""
    ids = teacher.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([torch.tensor([[teacher.tokenizer.bos_token_id]]), ids], dim=1)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            pad_token_id=teacher.tokenizer.pad_token_id or 0,
        )
    return "The hybrid continues: " + teacher.tokenizer.decode(out[0], skip_special_tokens=True)
