"""What a run measures on held-out text: while a stage trains, and of the model that mixers make between stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..distill import files
from ..distill.align import align_step
from ..distill.data.batch import Batch
from ..distill.matrix import matrix_rows, matrix_step
from ..distill.stage import StageSettings
from ..distill.student import assemble
from ..distill.teacher import Teacher
from ..distill.watchdog import beat
from ..eval.fidelity import measure
from .logit_caches import teacher_back
from .session import Session, eval_set

T = TypeVar("T")
R = TypeVar("R")
Losses = Callable[[Teacher, dict[int, Any], StageSettings, Batch], tuple[dict[str, torch.Tensor], int]]


def reference(session: Session) -> Any | None:
    """The model that the student is compared with; None where the recipe wants none."""
    return session.teacher.model if session.recipe.eval.against == "teacher" else None


def measure_assembled(session: Session, name: str) -> None:
    """Fidelity of the model that the mixers make now, before any glue; kept as that of the stage `name`."""
    if not len(session.corpus.valid):
        return
    path = session.folder / "measured" / f"{name}.json"
    if path.exists() and session.resume:
        session.measured[name] = json.loads(path.read_text(encoding="utf-8"))
        return
    session.measured[name] = _assembled_fidelity(session)
    files.write_json(path, session.measured[name])
    value = session.measured[name]
    text = f"after {name}: held-out perplexity {value['student']['perplexity']:.3f}"
    if "kl" in value:
        text += f" ({value['perplexity_ratio']:.3f} of the teacher's), KL {value['kl']:.4f}"
    session.progress.note(text)


def layer_evaluation(
    session: Session, teacher: Teacher, mixers: dict[int, Any], settings: StageSettings, losses: Losses
) -> Callable[[], dict[str, Any]] | None:
    """Held-out losses per layer; `score` is their mean. With `eval.assembled` the student's fidelity too."""
    if not len(session.corpus.valid):
        return None
    device = session.engine.world.device

    def of_batch(item: tuple[Batch, Any]) -> tuple[dict[str, float], int]:
        made, counted = losses(teacher, mixers, settings, item[0].to(device))
        return {name: float(value) for name, value in made.items()}, counted

    def evaluate() -> dict[str, Any]:
        sums: dict[str, float] = {}
        total = 0
        held_out = list(eval_set(session, session.recipe.eval.tokens, settings.seq_len))
        for made, counted in _spread(session, held_out, of_batch):
            total += counted
            for name, value in made.items():
                sums[name] = sums.get(name, 0.0) + value
        values = {name: value / total for name, value in sums.items()}
        found = {"score": values.pop("loss"), "losses": values}
        if session.recipe.eval.assembled and not session.engine.sharded:
            found["assembled"] = _assembled_fidelity(session, settings.seq_len)
        return found

    return evaluate


def glue_evaluation(
    session: Session, teacher: Teacher, student: Any, settings: StageSettings
) -> Callable[[], dict[str, Any]] | None:
    """Fidelity on held-out text; `score` is the KL to the teacher, or without one the student's own loss."""
    if not len(session.corpus.valid):
        return None

    def evaluate() -> dict[str, Any]:
        batches = eval_set(session, session.recipe.eval.tokens, settings.seq_len)
        place = session.engine.world.device

        def spread(items: list[T], work: Callable[[T], R]) -> list[R]:
            return _spread(session, items, work)

        if session.recipe.eval.against == "text":
            value = measure(student, None, batches, place, spread=spread)
            return {"score": value["student"]["loss"], **value}
        with teacher_back(teacher, place):
            value = measure(student, teacher.model, batches, place, spread=spread)
        return {"score": value["kl"], **value}

    return evaluate


def align_losses(
    teacher: Teacher, mixers: dict[int, Any], settings: StageSettings, batch: Batch
) -> tuple[dict[str, torch.Tensor], int]:
    """Sums of a batch's align losses, and over how many tokens."""
    loss, precision = str(settings.loss), settings.precision
    return align_step(teacher, mixers, batch, 1, loss, precision, backward=False), batch.tokens


def matrix_losses(
    teacher: Teacher, mixers: dict[int, Any], settings: StageSettings, batch: Batch
) -> tuple[dict[str, torch.Tensor], int]:
    """Sums of a batch's matrix losses, and over how many rows."""
    return matrix_step(teacher, mixers, batch, 1, settings.precision, backward=False), matrix_rows(batch)


def _assembled_fidelity(session: Session, seq_len: int | None = None) -> dict[str, Any]:
    """Fidelity of the student that the mixers make as they are now; no random number of the run is used up."""
    with torch.random.fork_rng(devices=[]):
        student = assemble(session.teacher, session.mixers)
    device = next(student.parameters()).device
    batches = eval_set(session, session.recipe.eval.tokens, seq_len)
    return measure(student, reference(session), batches, device)


def _spread(session: Session, items: list[T], work: Callable[[T], R]) -> list[R]:
    """What the work gives for every item, in their order: each rank does its share of it.

    Where weights lie in shards every forward pass needs all ranks, so they go through it side by side.
    """

    def alive(item: T) -> R:
        beat("the evaluation")
        return work(item)

    return session.engine.world.spread(items, alive, session.engine.sharded)
