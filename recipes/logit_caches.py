"""Caches of the teacher's logits in a run: which a stage needs, where it lies, and making it, in the run or before."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..distill.data.source import Source
from ..distill.engine.world import World
from ..distill.logit_cache.key import LogitSettings, cache_folder, cache_key, cache_name
from ..distill.logit_cache.make import bytes_needed, check_disk, make_cache
from ..distill.logit_cache.store import LogitCache, read_manifest
from ..distill.stage import StageResult, StageSettings
from ..distill.teacher import Teacher, load_teacher
from .plan import stage_settings
from .schema import EMBEDDED, GlueStage, Recipe
from .session import Progress, Session, embedded_text, open_data, pick_device, stage_source
from .teacher_config import locate
from .units import format_bytes

FOLDER = "teacher-logits"
SourceOf = Callable[[Any, int, int], Source]


def stage_key(recipe: Recipe, stage: GlueStage, teacher: Teacher, source: Source) -> dict[str, Any]:
    """The key of a stage's cache.

    Args:
        recipe: that the stage belongs to.
        stage: one with `teacher_logits`.
        teacher: the recipe's.
        source: the stage's batches.
    """
    assert stage.teacher_logits is not None
    kept = LogitSettings(stage.teacher_logits.top_k, stage.temperature, stage.teacher_logits.dtype)
    return cache_key(teacher, source, stage.tokens, kept, recipe.engine.precision)


def stage_folder(recipe: Recipe, stage: GlueStage, key: dict[str, Any]) -> Path:
    """Where that cache lies: beside the run folder, so that other runs of the same teacher find it."""
    assert stage.teacher_logits is not None
    named = stage.teacher_logits.dir
    place = Path(str(recipe.save.dir)).parent / FOLDER if named is None else Path(named).expanduser()
    return cache_folder(place, key)


def open_stage_cache(
    session: Session,
    stage: GlueStage,
    settings: StageSettings,
    source_of: SourceOf,
    complete: bool,
    stopped: Callable[[], bool],
) -> tuple[str | None, LogitCache | None]:
    """A stage's cache, made now where it is not complete.

    Args:
        session: the run.
        stage: one with `teacher_logits`.
        settings: the stage's.
        source_of: (stage, seq_len, batch) -> a new source of its batches.
        complete: the stage is over, and reads nothing any more: its cache may be gone.
        stopped: whether a signal came.

    Returns:
        The cache's name, None where the making was stopped (the session's results say so); and the cache, if it is
        needed.

    Raises:
        UserError: a cache is named that is of something else.
        MachineError: not enough disk space.
    """
    source = source_of(stage, settings.seq_len, settings.batch)
    key = stage_key(session.recipe, stage, session.teacher, source)
    if complete:
        return cache_name(key), None
    folder = stage_folder(session.recipe, stage, key)
    if session.teacher.bare:
        session.progress.note(f"{stage.name}: logits from {folder}")
        return cache_name(key), LogitCache(folder, key)
    deadline = session.deadline
    cache = _make(
        session.teacher,
        source,
        folder,
        key,
        stage,
        session.progress,
        session.engine.world,
        lambda: stopped() or (deadline is not None and time.monotonic() >= deadline),
    )
    if cache is None:
        nothing = StageResult(stage.name, "stopped", 0, 0, 0.0, {}, None, [], {}, session.folder / "checkpoints")
        session.results.append(nothing)
        return None, None
    return cache.name, cache


def prepare(recipe: Recipe, progress: Progress, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Make the caches of all stages of a recipe that ask for one. No run folder is touched.

    Args:
        recipe: from `loader.load`.
        progress: whom to tell; every cache's size is said, and the disk looked at, before the first is made.
        stopped: asked before every batch.

    Returns:
        `status` (`complete` or `stopped`) and `caches`: stage, folder, bytes, positions, tail_mass.

    Raises:
        UserError, MachineError: as for `run`.
    """
    stages = [s for s in recipe.stages if isinstance(s, GlueStage) and s.teacher_logits is not None]
    device = pick_device(recipe.engine.device)
    made: list[dict[str, Any]] = []
    if not stages:
        return {"status": "complete", "caches": made}
    teacher = load_teacher(locate(recipe.teacher.model), recipe.teacher.revision, recipe.teacher.dtype, device)
    with tempfile.TemporaryDirectory(prefix="relinear-") as aside:
        if recipe.data.source == EMBEDDED:
            embedded_text(Path(aside))
        corpus = open_data(recipe, teacher.tokenizer, Path(aside))
        work = []
        for stage in stages:
            settings = StageSettings(**stage_settings(recipe, stage, teacher.context))
            source = stage_source(recipe, corpus, stage, settings.seq_len, settings.batch)
            key = stage_key(recipe, stage, teacher, source)
            work.append((stage, source, key, stage_folder(recipe, stage, key)))
        _say_sizes(work, teacher, progress)
        for stage, source, key, folder in work:
            cache = _make(teacher, source, folder, key, stage, progress, World(), stopped)
            if cache is None:
                return {"status": "stopped", "caches": made}
            manifest = cache.manifest
            figures = {name: manifest[name] for name in ("bytes", "positions", "tail_mass")}
            made.append({"stage": stage.name, "folder": str(folder), **figures})
    return {"status": "complete", "caches": made}


@contextmanager
def teacher_aside(teacher: Teacher) -> Iterator[None]:
    """The teacher lies in the machine's memory, not a GPU's, while a stage reads its cache; its shards stay."""
    with _moved(teacher, None if teacher.whole else "cpu"):
        yield


@contextmanager
def teacher_back(teacher: Teacher, device: Any) -> Iterator[None]:
    """The teacher is on the device for a measurement, and then where it was."""
    with _moved(teacher, None if teacher.whole else device):
        yield


@contextmanager
def _moved(teacher: Teacher, device: Any) -> Iterator[None]:
    before = next(teacher.model.parameters()).device
    if device is None or teacher.bare or torch.device(device).type == before.type:
        yield
        return
    teacher.model.to(device)
    try:
        yield
    finally:
        teacher.model.to(before)


def _say_sizes(work: list[Any], teacher: Teacher, progress: Progress) -> None:
    """Every cache's bytes, and whether all that is missing fits on the disks.

    Raises:
        MachineError: it does not.
    """
    missing: dict[Path, int] = {}
    for stage, _, key, folder in work:
        total, made = bytes_needed(folder, key, teacher.model.config.vocab_size)
        complete = (read_manifest(folder) or {}).get("complete")
        state = "made already" if complete else f"{format_bytes(made)} made already" if made else "to be made"
        progress.note(f"{stage.name}: {format_bytes(total)} at most in {folder}, {state}")
        if not complete:
            missing[folder.parent] = missing.get(folder.parent, 0) + max(0, total - made)
    for place, needed in missing.items():
        check_disk(place, needed)


def _make(
    teacher: Teacher,
    source: Source,
    folder: Path,
    key: dict[str, Any],
    stage: GlueStage,
    progress: Progress,
    world: World,
    stopped: Callable[[], bool],
) -> LogitCache | None:
    """`make_cache`, said to the reader."""
    begun: list[bool] = []

    def tell(tokens: int) -> None:
        if not begun:
            total, made = bytes_needed(folder, key, teacher.model.config.vocab_size)
            progress.note(f"{stage.name}: the teacher's logits, {format_bytes(total)} at most, to {folder}")
            progress.stage(f"{stage.name} logits", key["tokens"])
            begun.append(made > 0)
        progress.update(tokens)

    cache = make_cache(
        teacher, source, folder, key, micro_batch=stage.micro_batch, world=world, progress=tell, should_stop=stopped
    )
    if begun:
        progress.done()
    if cache is not None:
        held = cache.manifest
        progress.note(
            f"{stage.name}: logits from {folder}: {key['top_k']} of {held['vocab']} tokens at {held['positions']:,} "
            f"positions, {held['tail_mass']:.2%} of the probability beside them, {format_bytes(held['bytes'])}"
        )
    return cache
