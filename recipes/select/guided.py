"""KL-guided selection: a short training for every layer that could be restored (arXiv 2512.20569, GA-S2)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ...distill import files
from ...distill.errors import UserError
from ...distill.glue import glue_stage
from ...distill.loop import run_stage
from ...distill.stage import Callbacks, StageSettings
from ...distill.student import assemble
from ..plan import stage_settings
from ..schema import GlueStage, Recipe
from ..session import Session
from .evaluate import Evaluator, content_key
from .forward import of_text
from .scores import Scores


def glue_settings(recipe: Recipe, context: int, tokens: int) -> StageSettings:
    """The recipe's first glue stage, cut to `tokens`.

    Raises:
        UserError: the recipe has none.
    """
    stage = next((stage for stage in recipe.stages if stage.kind == GlueStage.kind), None)
    if not isinstance(stage, GlueStage):
        raise UserError("--by kl-guided: the recipe has no glue stage to train with. Add one to stages: - glue: {}")
    settings = StageSettings(**stage_settings(recipe, stage, context))
    steps = max(1, tokens // (settings.batch * settings.seq_len))
    short = {"warmup": min(settings.warmup, steps // 10), "eval_every": None, "save_every": max(1, tokens // 4)}
    return replace(settings, tokens=tokens, **short)


def kl_guided(
    evaluator: Evaluator, recipe: Recipe, session: Session, tokens: int, stopped: Callable[[], bool]
) -> Scores | None:
    """Restore each layer in turn, train the student as in glue, and take its KL on held-out text; low: keep.

    Every layer's student sees the same batches. Each layer is written down when it ends, and a layer that was stopped
    goes on from its last save.

    Args:
        evaluator: for the mixers, the text and the folder.
        recipe: with a glue stage.
        session: for data, deadline and progress.
        tokens: of training for each layer.
        stopped: asked before every step.

    Returns:
        None where it was stopped.
    """
    settings = glue_settings(recipe, session.teacher.context, tokens)
    about: dict[str, Any] = {"settings": asdict(settings), "data": recipe.data.model_dump(mode="json")}
    key = content_key(evaluator.student_key, evaluator.text_key, about)
    folder = evaluator.folder / f"kl-guided-{key}"
    for layer in evaluator.layers:
        path = folder / f"{layer}.json"
        if path.exists():
            continue
        made = _train(
            evaluator,
            recipe.layers.attention.changes(),
            session,
            settings,
            folder / f"training-{layer}",
            layer,
            stopped,
        )
        if made is None:
            return None
        files.write_json(path, made)
        shutil.rmtree(folder / f"training-{layer}", ignore_errors=True)
    rows = [json.loads((folder / f"{layer}.json").read_text(encoding="utf-8")) for layer in evaluator.layers]
    scores = of_text("kl-guided", [torch.tensor(one, dtype=torch.float64) for one in rows])
    scores.details["tokens per layer"] = tokens
    return scores


def _train(
    evaluator: Evaluator,
    kept: dict[str, Any] | None,
    session: Session,
    settings: StageSettings,
    folder: Path,
    layer: int,
    stopped: Callable[[], bool],
) -> list[list[float]] | None:
    """A student's sums on the text after its training; None where that was stopped."""
    teacher, name = session.teacher, f"kl-guided layer {layer}"
    mixers = evaluator.hybrid.mixers_of(set(evaluator.layers) - {layer})
    student = assemble(teacher, mixers, kept)
    source = session.corpus.train(
        seq_len=settings.seq_len,
        batch=settings.batch,
        seed=settings.seed * 1009 + 997,  # the same for all layers, and no stage's own
        pack=session.recipe.data.pack,
        shuffle_buffer=session.recipe.data.shuffle_buffer,
    )
    session.progress.stage(name, settings.tokens)
    result = run_stage(
        glue_stage(teacher, student, settings, "kl-guided"),
        source,
        settings,
        folder=folder,
        resume=True,
        callbacks=Callbacks(
            progress=lambda record: session.progress.update(record["tokens"], loss=record["loss"]),
            should_stop=stopped,
        ),
        deadline=session.deadline,
    )
    session.progress.done()
    if result.status != "complete":
        return None
    evaluator.passes += 1
    return evaluator.student_text(student.eval()).tolist()
