"""Glue where the teacher's weights are not: the student comes from another run's export, its targets from a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..distill import files, run_folder
from ..distill.errors import UserError
from ..distill.modeling.classes import student_classes
from ..distill.teacher import Teacher, load_bare, load_model, read_config
from .schema import CalibrateStage, GlueStage, Recipe, TrainingStage
from .teacher_config import locate


def possible(recipe: Recipe) -> bool:
    """Nothing in a run of this recipe needs the teacher's weights, if another run gives the student.

    All that trains does so end to end, on a cache of the teacher's logits or on the text alone, and nothing is measured
    against the teacher.
    """
    trains = [stage for stage in recipe.stages if isinstance(stage, TrainingStage)]
    if not trains or recipe.eval.against != "text" or any(isinstance(s, CalibrateStage) for s in recipe.stages):
        return False
    return all(isinstance(stage, GlueStage) and _reads_no_teacher(stage) for stage in trains)


def _reads_no_teacher(stage: GlueStage) -> bool:
    loss = stage.loss
    return stage.teacher_logits is not None or loss.kl + loss.reverse_kl + loss.align == 0


def load(recipe: Recipe, start: Path | None) -> Teacher | None:
    """The teacher without weights, known from the run that gives the student; None where they are needed.

    Raises:
        UserError: `start` is no run, or of another teacher.
    """
    if start is None or not possible(recipe):
        return None
    known = run_folder.read(start)["teacher"]
    if known["source"] != recipe.teacher.model:
        raise UserError(
            f"{start}: was made from teacher {known['source']}, this run from {recipe.teacher.model}. Start from a run "
            "of the same teacher"
        )
    revision = recipe.teacher.revision
    return load_bare(locate(recipe.teacher.model), revision, recipe.teacher.dtype, known["fingerprint"])


def take_student(session: Any, start: Path) -> None:
    """The student of an open session: what `start` exported.

    Raises:
        UserError: it has no export, or one of other layers, mixers or options.
    """
    export = start / "export"
    if not (export / "config.json").exists():
        raise UserError(f"{start}: has no export to start from. Make it: relinear export {start} --out {export}")
    theirs = run_folder.read(start)["layers"]
    ours = {str(layer): list(value) for layer, value in session.layers.converted.items()}
    if theirs != ours:
        different = sorted(layer for layer in theirs.keys() | ours.keys() if theirs.get(layer) != ours.get(layer))
        raise UserError(
            f"{start}: converts layers {', '.join(different)} otherwise than this recipe. Without the teacher's "
            "weights nothing is transferred: write the layers and mixers of that run"
        )

    def make() -> Any:
        return load_model(export, device=session.engine.home)[0].requires_grad_(True)

    def shell() -> Any:
        classes = student_classes(read_config(export)["base_model_type"])
        config = classes.config.from_pretrained(export)
        return classes.causal_lm._from_config(config).eval().requires_grad_(True)

    student = session.engine.between(make, shell)
    kept = session.layers.attention
    if kept is not None and getattr(student.config, "kept_attention", None) != kept:
        raise UserError(
            f"{export}: keeps attention otherwise than layers.attention says. Write what that run has, or start with "
            "the teacher's weights (eval.against=teacher)"
        )
    session.student = student
    report = {layer: {"from": str(export), "transferred": []} for layer in ours}
    session.engine.world.first(lambda: files.write_json(session.folder / "transfer.json", report))
    session.progress.note(f"start: the student is loaded from {export}; the teacher's weights are not needed")
