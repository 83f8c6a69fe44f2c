"""The recall suite: every task over its cells, for a teacher and a student, by log-likelihood and by generation.

A student whose mixers have a window beside their linear part is scored three times: whole, with the linear part alone
and with the window alone. A window recalls what is near by itself and can hide a linear part that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..distill.errors import UserError
from .branches import branched, only
from .fidelity import check_same_vocabulary, versions
from .tasks.document import Document, Writer
from .tasks.generation import generated
from .tasks.likelihood import score
from .tasks.summary import Score, above_chance, chances, summarised
from .tasks.tasks import TASKS, Cell, Task, task_documents

LENGTHS = (256, 512, 1024)
SAMPLES = 8
BATCH_TOKENS = 8192

Progress = Callable[[int, int], None]


def recall_suite(
    model: Any,
    tokenizer: Any,
    teacher: Any | None = None,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    samples: int | None = None,
    seed: int = 0,
    generate: bool = False,
    filler: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, beside its teacher if one is given, on the recall tasks.

    Args:
        model: any Hugging Face causal language model.
        tokenizer: of both models.
        teacher: another one with the same vocabulary, or None.
        tasks: names of `TASKS`; all by default.
        lengths: tokens of whole documents; by default those of `LENGTHS` within both models' context.
        samples: documents per cell, `SAMPLES` by default; see `tasks.ANSWERS_PER_SAMPLE` for pairs.
        seed: of the documents.
        generate: also have the answers generated.
        filler: text file to take filler from; made-up prose if None.
        progress: called with (tokens of documents read, in all).

    Returns:
        {"suite": "recall", "lengths", "samples", "seed", "filler", "left_out": tasks that fit no length,
        "tasks": {name: {"about", "axes": names of a cell's coordinates, "chance": {"exact", "choice"},
        "signal": figures in which the teacher (without one, the model) is above chance, "models": {model: figures}}}}.
        Models are "teacher" and "student" (alone: "model"), then "linear alone" and "window alone". Figures are what
        `summarised` gives, "generated" (likewise, if asked for) and "cells": the same per cell, with its coordinates
        by the names of the axes and its "chance".

    Raises:
        UserError: an unknown task, lengths that no task can have or that exceed a context, or a filler file that
            cannot be used.
    """
    chosen = _chosen(tasks)
    given = {"model": model} if teacher is None else {"teacher": teacher, "student": model}
    limit = _context(list(given.values()))
    lengths = _lengths(lengths, limit)
    samples = samples or SAMPLES
    writer = Writer(tokenizer, filler)
    made = {task.name: task_documents(task, writer, lengths, samples, seed, limit) for task in chosen}
    if not any(made.values()):
        raise UserError(f"--lengths {','.join(map(str, lengths))}: too short for every task; e.g. --lengths 512,1024")
    variants = [(name, one, "both") for name, one in given.items()]
    if branched(model):
        variants += [(f"{branch} alone", model, branch) for branch in ("linear", "window")]
    meter = Meter(progress, sum(len(d.ids) for own in made.values() for cell in own.values() for d in cell), variants)
    result: dict[str, Any] = {}
    for task in chosen:
        documents = made[task.name]
        if not documents:
            continue
        measured = {
            name: _measure(one, branch, tokenizer, task, documents, generate, meter) for name, one, branch in variants
        }
        chance = chances([one for cell in documents.values() for one in cell])
        signal = above_chance(next(iter(measured.values())), chance)
        result[task.name] = {
            "about": task.about,
            "axes": list(task.axes),
            "chance": chance,
            "signal": signal,
            "models": measured,
        }
    return {
        "suite": "recall",
        "lengths": list(lengths),
        "samples": samples,
        "seed": seed,
        "filler": None if filler is None else str(filler),
        "left_out": [name for name, cells in made.items() if not cells],
        "tasks": result,
    }


def compare_recall(
    student: str | Path,
    teacher: str | Path | None = None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Load one or two checkpoints and measure them by `recall_suite`, whose other arguments are `settings`.

    Returns:
        What `recall_suite` returns, and "models" (as given), "dtype", "versions".

    Raises:
        UserError: as `recall_suite`; a model that cannot be read; tokenizers that differ.
    """
    from ..distill.teacher import load_model

    ours = load_model(student, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    theirs = None
    if teacher is not None:
        theirs = load_model(teacher, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        check_same_vocabulary(str(student), str(teacher), ours, theirs)
    result = recall_suite(ours[0], ours[1], None if theirs is None else theirs[0], **settings)
    names = {"model": str(student)} if teacher is None else {"teacher": str(teacher), "student": str(student)}
    return {**result, "models": names, "dtype": dtype, "versions": versions()}


class Meter:
    """Counts tokens of documents read over all models."""

    def __init__(self, progress: Progress | None, tokens: int, variants: Sequence[Any]) -> None:
        self.progress, self.total, self.done = progress, tokens * len(variants), 0

    def add(self, documents: Sequence[Document]) -> None:
        """These documents were read."""
        self.done += sum(len(document.ids) for document in documents)
        if self.progress is not None:
            self.progress(self.done, self.total)


def _measure(
    model: Any,
    branch: str,
    tokenizer: Any,
    task: Task,
    documents: dict[Cell, list[Document]],
    generate: bool,
    meter: Meter,
) -> dict[str, Any]:
    """One model's figures on one task, over all cells and cell by cell."""
    cells, every, said = [], [], []
    training = model.training
    model.eval()
    try:
        with only(model, branch) if branch != "both" else nullcontext():
            for cell, own in documents.items():
                scores: list[list[Score]] = []
                size = max(1, BATCH_TOKENS // max(len(one.ids) for one in own))
                for start in range(0, len(own), size):
                    scores += score(model, tokenizer, own[start : start + size])
                    meter.add(own[start : start + size])
                row = dict(zip(task.axes, cell, strict=True)) | {"chance": chances(own), **summarised(scores)}
                every += scores
                if generate:
                    texts = generated(model, tokenizer, own, size)
                    row["generated"] = summarised(texts)
                    said += texts
                cells.append(row)
    finally:
        model.train(training)
    return {**summarised(every), **({"generated": summarised(said)} if generate else {}), "cells": cells}


def _chosen(names: Sequence[str] | None) -> list[Task]:
    unknown = [name for name in names or () if name not in TASKS]
    if unknown or names == []:
        raise UserError(f"--tasks {','.join(unknown)}: unknown; there are {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names or TASKS)]


def _context(models: Sequence[Any]) -> int | None:
    limits = [getattr(model.config, "max_position_embeddings", None) for model in models]
    return min((limit for limit in limits if limit), default=None)


def _lengths(lengths: Sequence[int] | None, limit: int | None) -> tuple[int, ...]:
    """The lengths asked for; by default those that fit, or the context itself where none does."""
    if lengths is None:
        return tuple(n for n in LENGTHS if limit is None or n <= limit) or (limit or LENGTHS[0],)
    if not lengths or min(lengths) < 1 or (limit is not None and max(lengths) > limit):
        told = "any" if limit is None else f"at most {limit}, the models' context"
        shown = ",".join(map(str, lengths))
        raise UserError(f"--lengths {shown}: expected numbers of tokens, {told}; e.g. --lengths 256,{limit or 1024}")
    return tuple(sorted(set(lengths)))
