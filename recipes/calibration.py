"""The calibrate stage of a run, and what it says of every layer: before, after, and once the layer is aligned."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..distill import files
from ..distill.calibrate import CalibrateSettings, calibration_batches, run_calibrate, teacher_errors
from ..distill.data.source import Source
from ..distill.stage import Callbacks, StageResult
from ..distill.watchdog import beat
from ..eval.plots import calibration_errors
from .plan import calibrate_settings
from .schema import AlignStage, CalibrateStage

if TYPE_CHECKING:  # streaming, which session needs, reads this
    from .session import Session


def calibrate(
    session: Session, stage: CalibrateStage, source: Callable[..., Source], stopped: Callable[[], bool]
) -> StageResult | None:
    """Calibrate the mixers that are as transferred.

    Args:
        session: with mixers; those that came from another run (`session.taken`) stay as they are.
        stage: as the recipe has it.
        source: (stage, seq_len, batch) -> the stage's batches from the first on.
        stopped: asked between layers.

    Returns:
        How it ended; None where there was nothing to calibrate.
    """
    layers = sorted(session.mixers.keys() - session.taken)
    if not layers:
        session.progress.note(f"{stage.name}: nothing to do, the mixers are trained already")
        return None
    settings = CalibrateSettings(**calibrate_settings(session.recipe, stage, session.teacher.context))
    session.progress.stage(stage.name, settings.tokens)

    def tell(record: dict[str, Any]) -> None:
        beat(stage.name)
        session.progress.update(record["tokens"], loss=record["loss"])
        session.track(record)

    result = run_calibrate(
        session.teacher,
        session.mixers,
        source(stage, settings.seq_len, settings.batch),
        settings,
        folder=session.folder,
        name=stage.name,
        layers=layers,
        resume=session.resume,
        callbacks=Callbacks(progress=tell, message=session.progress.note, should_stop=stopped),
        deadline=session.deadline,
    )
    session.progress.done()
    if result.status == "complete":
        tell_calibrated(session, stage.name, result.report["layers"])
    return result


def fill_aligned(session: Session, align: AlignStage, source: Callable[..., Source]) -> None:
    """After align: the same layers on the same held-out tokens once more, in the calibrate stage's report and plot."""
    for stage in session.recipe.stages:
        path = session.folder / f"{stage.name}.json"
        if not isinstance(stage, CalibrateStage) or not path.exists():
            continue
        settings = CalibrateSettings(**calibrate_settings(session.recipe, stage, session.teacher.context))
        device = next(session.teacher.model.parameters()).device
        held = calibration_batches(source(stage, settings.seq_len, settings.batch), settings.tokens, device)[1]
        report = json.loads(path.read_text(encoding="utf-8"))
        for layer, error in teacher_errors(session.teacher, session.mixers, held).items():
            if str(layer) in report["layers"]:
                report["layers"][str(layer)]["aligned"] = error
        files.write_json(path, report)
        tell_aligned(session, stage.name, align.name, report["layers"])


def tell_calibrated(session: Session, name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Say and draw what the stage of that name did to the layers."""
    fitted = sum(row["kept"] != "transfer" for row in rows.values())
    session.progress.note(f"{name}: {_words(rows)}; {fitted} of {len(rows)} layers gained by it")
    calibration_errors(rows, session.folder / f"{name}.png")


def tell_aligned(session: Session, name: str, align: str, rows: dict[str, dict[str, Any]]) -> None:
    """Say and draw it once more, when the layers are aligned."""
    calibration_errors(rows, session.folder / f"{name}.png")
    session.progress.note(f"{align}: {_words(rows)}")


def _words(rows: dict[str, dict[str, Any]]) -> str:
    kinds = [kind for kind in ("random", "transfer", "calibrated", "aligned") if next(iter(rows.values()))[kind]]
    means = [f"{sum(row[kind] for row in rows.values()) / len(rows):.3f} {kind}" for kind in kinds]
    return "relative error of the layers' outputs " + ", ".join(means)
