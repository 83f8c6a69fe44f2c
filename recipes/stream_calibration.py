"""The calibrate stage of a run whose align is streamed: the same report, made one layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..distill import checkpoint, files, run_folder
from ..distill.calibrate import CalibrateSettings
from ..distill.data.source import Source
from ..distill.digest import value_digest
from ..distill.stage import Callbacks
from ..distill.stream.calibrate import CalibrateWork, aligned_errors, calibrate_stream, clear
from ..distill.stream.teacher import StreamedTeacher
from ..distill.teacher import Teacher
from ..distill.watchdog import beat
from .calibration import tell_aligned, tell_calibrated
from .disk_room import check_room
from .layers import LayerMap
from .plan import calibrate_settings
from .schema import AlignStage, CalibrateStage, Recipe
from .stream_costs import calibrate_disk
from .teacher_config import read_teacher_config


def stage_of(recipe: Recipe) -> CalibrateStage | None:
    """The recipe's calibrate stage, None where it has none."""
    return next((stage for stage in recipe.stages if isinstance(stage, CalibrateStage)), None)


def borders_folder(align: AlignStage, run: Path) -> Path:
    """Where the streamed align of a run keeps hidden states."""
    assert align.stream is not None
    return Path(align.stream.dir).expanduser() if align.stream.dir else run / "stream" / align.name / "borders"


def make_work(
    recipe: Recipe, stage: CalibrateStage, align: AlignStage, teacher: Teacher, layers: LayerMap, folder: Path
) -> CalibrateWork:
    """The stage as `distill.stream.calibrate` carries it out.

    Args:
        recipe: of the run.
        stage: its calibrate.
        align: its streamed align, which says where hidden states go and how they are kept.
        teacher: of which one layer is in memory.
        layers: what is converted.
        folder: of the run; it holds run.json.
    """
    assert isinstance(teacher, StreamedTeacher) and align.stream is not None
    settings = CalibrateSettings(**calibrate_settings(recipe, stage, teacher.context))
    key = value_digest(
        {
            "teacher": run_folder.read(folder)["teacher"]["fingerprint"],
            "dtype": recipe.teacher.dtype,
            "data": recipe.to_dict()["data"],
            "seed": [recipe.seed, [other.name for other in recipe.stages].index(stage.name)],
            "settings": asdict(settings),
            "plan": {str(layer): list(value) for layer, value in layers.converted.items()},
            "borders": align.stream.borders,
        }
    )
    return CalibrateWork(
        teacher=teacher,
        plan=layers.converted,
        settings=settings,
        name=stage.name,
        run=folder,
        folder=borders_folder(align, folder) / f"{stage.name}-{key[:12]}",
        key=key,
        kind=align.stream.borders,
        seed=recipe.seed,
    )


def carry_out(
    session: Any,
    stage: CalibrateStage,
    align: AlignStage,
    source_of: Callable[..., Source],
    stopped: Callable[[], bool],
) -> bool:
    """Calibrate, in an open session; afterwards its result is among the session's.

    Args:
        session: `session.Session`, its teacher with one layer in memory.
        stage: of its recipe.
        align: the streamed one that follows.
        source_of: (stage, seq_len, batch) -> the stage's batches from the first on.
        stopped: told to stop.

    Returns:
        False where it was stopped.
    """
    work = make_work(session.recipe, stage, align, session.teacher, session.layers, session.folder)
    work.deadline = session.deadline
    work.callbacks = _callbacks(session, stage, stopped)
    needed = not _aligned(session, align)
    if needed:
        plain = asdict(work.settings)
        config = read_teacher_config(
            session.recipe.teacher.model, session.recipe.teacher.revision, session.recipe.place("teacher.model")
        )
        dtype, stream = session.recipe.teacher.dtype, align.stream
        assert stream is not None
        needs = calibrate_disk(stream, plain, config, session.layers, dtype)
        check_room(stage.name, align.name, needs, session.folder, work.folder, session.progress.note)
    session.progress.stage(stage.name, work.settings.tokens)
    source = source_of(stage, work.settings.seq_len, work.settings.batch)
    result = calibrate_stream(work, source, needed=needed)
    session.progress.done()
    session.results.append(result)
    if result.status == "complete":
        tell_calibrated(session, stage.name, result.report["layers"])
    return result.status == "complete"


def after_align(session: Any, align: AlignStage, stopped: Callable[[], bool]) -> bool:
    """Once align is over: the same layers on the same held-out tokens once more, in the calibrate stage's report.

    Returns:
        False where it was stopped.
    """
    stage = stage_of(session.recipe)
    if stage is None:
        return True
    work = make_work(session.recipe, stage, align, session.teacher, session.layers, session.folder)
    path = session.folder / f"{stage.name}.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    if all(row["aligned"] is not None for row in report["layers"].values()):
        clear(work)
        return True
    work.deadline = session.deadline
    work.callbacks = _callbacks(session, stage, stopped)
    commit = checkpoint.Checkpoints(session.folder / "checkpoints").require_complete(align.name)
    session.progress.note(f"{align.name}: the teacher's layers once more, for the errors that {stage.name} reports")
    errors = aligned_errors(work, commit)
    if errors is None:
        return False
    for layer, error in errors.items():
        report["layers"][str(layer)]["aligned"] = error
    files.write_json(path, report)
    tell_aligned(session, stage.name, align.name, report["layers"])
    clear(work)
    return True


def _aligned(session: Any, align: AlignStage) -> bool:
    found = checkpoint.Checkpoints(session.folder / "checkpoints").newest(align.name)
    return found is not None and found.complete


def _callbacks(session: Any, stage: CalibrateStage, stopped: Callable[[], bool]) -> Callbacks:
    def tell(record: dict[str, Any]) -> None:
        beat(stage.name)
        session.progress.update(record["tokens"], loss=record["loss"])
        session.track(record)

    def should_stop() -> bool:
        beat(stage.name)
        return stopped()

    return Callbacks(progress=tell, message=session.progress.note, should_stop=should_stop)
