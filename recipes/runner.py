"""Carrying out a recipe: teacher, mixers in place, align, glue, measuring, export. Resumable at any moment."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..distill import checkpoint, files, run_folder
from ..distill.align import align_stage
from ..distill.data.source import Source
from ..distill.errors import UserError
from ..distill.export import export
from ..distill.glue import glue_stage
from ..distill.logit_cache.store import CheckedSource, LogitCache
from ..distill.loop import run_stage
from ..distill.lora import load_student
from ..distill.manifest import check_manifest, write_manifest
from ..distill.matrix import matrix_stage
from ..distill.stage import Callbacks, StageResult, StageSettings
from ..distill.student import assemble, transfer_between, unfilled
from ..distill.watchdog import Watchdog, beat
from ..eval.fidelity import measure
from ..eval.heatmaps import heatmaps
from ..eval.plots import loss_curves
from ..eval.recall_table import to_text as recall_text
from ..eval.suite import recall_suite
from ..eval.tables import Row, to_json, to_text
from . import loader, stream_calibration, streaming, without_teacher
from .calibration import calibrate, fill_aligned
from .final_eval import store_results
from .held_out import TOKENS as FINAL_TOKENS
from .logit_caches import open_stage_cache, teacher_aside
from .measuring import (
    align_losses,
    glue_evaluation,
    layer_evaluation,
    matrix_losses,
    measure_assembled,
    reference,
)
from .plan import stage_settings
from .publishing import publish_run
from .schema import AlignStage, CalibrateStage, GlueStage, MatrixStage, Recipe, TransferStage
from .session import Progress, Session, Silent, eval_set, open_session, stage_source


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    max_hours: float | None = None,
    progress: Progress | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: from `loader.load`.
        resume: go on with the run that the folder holds, to the same numbers as without the stop.
        max_hours: save and stop after so many hours; overrules the recipe's.
        progress: whom to tell; nobody by default.
        start: another run of the same teacher, whose mixers this one takes instead of transferring its own: aligned
            ones where it has them.

    Returns:
        What result.json holds: status (`complete` or `stopped`), stages, fidelity, layers, paths; and `table`, the same
        as text. With `publish.repo` also `published`, see `publishing.publish_run`.

    Raises:
        UserError, MachineError, RunFailed: as the parts raise them; what was committed stays.
    """
    with (
        open_session(recipe, resume=resume, max_hours=max_hours, progress=progress or Silent(), start=start) as session,
        Watchdog(recipe.engine.timeout, session.folder / "logs", session.engine.world.rank),
    ):
        first = session.engine.world.first
        done = first(lambda: _complete(session))
        if done:
            return done
        if not work(session, start):
            return _stopped(session)
        result = first(lambda: _finish(session))
        folder, main, say = session.folder, session.engine.world.main, session.progress.note
    # The run is complete and its memory free; the other ranks are done.
    return result | (publish_run(recipe, folder, say) if main else {})


def _complete(session: Session) -> dict[str, Any] | None:
    """The result of a run that had ended before, None where it had not; what changed in its folder since is said."""
    folder = session.folder
    if not session.resume or not (folder / "result.json").exists():
        return None
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    session.progress.note(f"{folder}: complete already; nothing to do")
    for problem in check_manifest(folder):
        session.progress.note(f"warning: {problem}. To write the export again: relinear export {folder} --overwrite")
    return result | {"table": (folder / "result.txt").read_text(encoding="utf-8").rstrip("\n")}


def work(session: Session, start: Path | None = None) -> bool:
    """Carry out the stages of an open session's recipe, without measuring and exporting at the end.

    Args:
        session: as from `open_session`; afterwards it holds the mixers or the student.
        start: as for `run`.

    Returns:
        False where it was stopped, by a signal or by the deadline.
    """
    with stop_signals() as stopped:
        return all(_carry_out(session, stage, start, stopped) for stage in session.recipe.stages)


def convert(
    recipe: str, overrides: list[str] | None = None, *, resume: bool = False, max_hours: float | None = None
) -> dict[str, Any]:
    """`relinear run` as a function: load a recipe by name or path, change it, carry it out.

    Args:
        recipe: a shipped recipe's name or a YAML file.
        overrides: `key=value` as on the command line, e.g. `teacher.model=FOLDER`.
        resume: as for `run`.
        max_hours: as for `run`.

    Returns:
        As `run`.
    """
    return run(loader.load(recipe, overrides), resume=resume, max_hours=max_hours)


def _carry_out(session: Session, stage: Any, start: Path | None, stopped: Callable[[], bool]) -> bool:
    """One stage of the recipe; False where it was stopped."""
    if isinstance(stage, TransferStage):
        if streaming.streamed(session.recipe) is None:
            _transfer(session, start)
        return True
    if isinstance(stage, CalibrateStage):
        align = streaming.streamed(session.recipe)
        if align is not None:
            return stream_calibration.carry_out(session, stage, align, partial(_source, session), stopped)
        return _calibrate(session, stage, stopped)
    settings = StageSettings(**stage_settings(session.recipe, stage, session.teacher.context))
    source = _source(session, stage, settings.seq_len, settings.batch)
    if stage is streaming.streamed(session.recipe):
        held_out = eval_set(session, session.recipe.eval.tokens, settings.seq_len)
        return streaming.carry_out(session, stage, settings, source, held_out, stopped)
    streaming.load_whole(session)
    newest = checkpoint.Checkpoints(session.folder / "checkpoints").newest(stage.name) if session.resume else None
    cache = None
    if isinstance(stage, GlueStage) and stage.teacher_logits is not None:
        complete = newest is not None and newest.complete
        name, cache = open_stage_cache(session, stage, settings, partial(_source, session), complete, stopped)
        if name is None:
            return False
        settings = replace(settings, teacher_logits=name)
        source = source if cache is None else CheckedSource(source, cache)
    with nullcontext() if cache is None else teacher_aside(session.teacher):
        return _train(session, stage, settings, source, newest, cache, stopped)


def _train(
    session: Session,
    stage: Any,
    settings: StageSettings,
    source: Source,
    newest: checkpoint.Checkpoint | None,
    cache: LogitCache | None,
    stopped: Callable[[], bool],
) -> bool:
    """A stage that trains; False where it was stopped."""
    engine = session.engine
    teacher = session.teacher if session.teacher.bare else engine.place_teacher(session.teacher)
    placed: dict[Any, Any] = {}
    if isinstance(stage, MatrixStage | AlignStage):
        placed = engine.place_mixers(session.mixers)
        make, losses = (matrix_stage, matrix_losses) if isinstance(stage, MatrixStage) else (align_stage, align_losses)
        made = make(teacher, placed, settings, stage.name)
        evaluate = layer_evaluation(session, teacher, placed, settings, losses)
    else:
        if session.student is None:
            parts = session.teacher, session.mixers, session.layers.attention
            session.student = engine.between(lambda: assemble(*parts).to(engine.home), lambda: unfilled(*parts))
        placed[0] = engine.place_student(session.student)
        made = glue_stage(teacher, placed[0], settings, stage.name, cache)
        evaluate = glue_evaluation(session, teacher, placed[0], settings)
    session.progress.stage(stage.name, settings.tokens, newest.state["tokens"] if newest else 0)
    result = run_stage(
        made,
        source,
        settings,
        folder=session.folder,
        resume=session.resume,
        after=session.results[-1].stage if session.results else None,
        callbacks=Callbacks(
            progress=lambda record: _tell(session, record),
            message=session.progress.note,
            evaluate=evaluate,
            measured=session.track,
            should_stop=stopped,
        ),
        deadline=session.deadline,
        engine=engine,
    )
    session.progress.done()
    session.results.append(result)
    if result.status != "complete":
        return False
    for layer, module in placed.items():
        engine.collect(
            module, session.mixers[layer] if isinstance(stage, MatrixStage | AlignStage) else session.student
        )
    engine.world.first(lambda: _after(session, stage))
    return True


def _after(session: Session, stage: Any) -> None:
    """What rank 0 does when a stage is complete."""
    write_manifest(session.folder, complete=False)
    if isinstance(stage, MatrixStage | AlignStage):
        measure_assembled(session, stage.name)
    if isinstance(stage, AlignStage):
        fill_aligned(session, stage, partial(_source, session))


def _calibrate(session: Session, stage: CalibrateStage, stopped: Callable[[], bool]) -> bool:
    world = session.engine.world
    result = world.first(lambda: calibrate(session, stage, partial(_source, session), stopped))
    for mixer in session.mixers.values():
        world.share(mixer)
    if result is None:
        return True
    session.results.append(result)
    if result.status != "complete":
        return False
    world.first(lambda: measure_assembled(session, stage.name))
    return True


def _source(session: Session, stage: Any, seq_len: int, batch: int) -> Source:
    """A stage's batches, from the first one on."""
    return stage_source(session.recipe, session.corpus, stage, seq_len, batch)


def _tell(session: Session, record: dict[str, Any]) -> None:
    beat(record["stage"])
    session.progress.update(record["tokens"], loss=record["loss"])
    session.track(record)


def _transfer(session: Session, start: Path | None) -> None:
    """Put the mixers in place, and say where every parameter came from."""
    if start is not None and session.teacher.bare:
        without_teacher.take_student(session, start)
        return
    plan, world = session.layers.converted, session.engine.world
    session.mixers, reports = transfer_between(session.engine, session.teacher, plan, session.recipe.seed)
    report: dict[str, Any] = {str(layer): entry.to_dict() for layer, entry in reports.items()}
    if start is not None:
        report = world.first(lambda: _take_mixers(session, start, report))
    for mixer in session.mixers.values():
        world.share(mixer)
    world.first(lambda: files.write_json(session.folder / "transfer.json", report))
    counts = {kind: sum(r.parameters[kind] for r in reports.values()) for kind in ("copied", "derived", "new")}
    session.progress.note(
        "transfer: " + ", ".join(f"{number:,} parameters {kind}" for kind, number in counts.items() if number)
    )
    for note in dict.fromkeys(note for entry in reports.values() for note in entry.notes):
        session.progress.note(note)
    if start is None:
        world.first(lambda: measure_assembled(session, "transfer"))


def _take_mixers(session: Session, start: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Mixers from another run: its aligned ones, or where it aligned nothing those that it ended with.

    What has no counterpart stays as transferred, and is named. A run without align may have converted fewer layers.
    """
    other = run_folder.read(start)
    if other["teacher"]["source"] != session.recipe.teacher.model:
        raise UserError(
            f"{start}: was made from teacher {other['teacher']['source']}, this run from "
            f"{session.recipe.teacher.model}. Start from a run of the same teacher"
        )
    stages = {kind: name for name, kind in other["stages"]}  # the last one of each kind
    kind = next((kind for kind in ("align", "extend", "glue") if kind in stages), None)
    if kind is None:
        raise UserError(f"{start}: has no align or glue stage to start from")
    commit = checkpoint.Checkpoints(start / "checkpoints").require_complete(stages[kind])
    weights = commit.weights()
    for layer, mixer in session.mixers.items():
        if kind != "align" and str(layer) not in other["layers"]:
            continue
        if other["layers"].get(str(layer), [None])[0] != mixer.spec.name:
            raise UserError(f"{start}: its layer {layer} is not {mixer.spec.name}. Start from a run that converts it")
        prefix = f"{layer}." if kind == "align" else f"{session.teacher.attention_path(layer)}."
        own = mixer.state_dict()
        found = {key: weights[prefix + key] for key in own if prefix + key in weights}
        mixer.load_state_dict(found, strict=False)
        session.taken.add(layer)
        report[str(layer)] = {"from": str(commit.path), "transferred": sorted(own.keys() - found.keys())}
    session.progress.note(f"start: mixers loaded from {commit.path}")
    return report


def _stopped(session: Session) -> dict[str, Any]:
    result = session.results[-1]
    text = (
        f"{result.stage} stopped at step {result.step} ({result.tokens:,} tokens); everything is saved in "
        f"{session.folder}. Go on: the same command with --resume"
    )
    return {"status": "stopped", "stage": result.stage, "tokens": result.tokens, "run": str(session.folder)} | {
        "table": text
    }


def _finish(session: Session) -> dict[str, Any]:
    """Export the best step, measure it on held-out text, write everything down."""
    folder = session.folder
    last = session.results[-1] if session.results else None
    apart = streaming.ends_apart(session.recipe)
    if apart:
        session.progress.note(f"{folder}: never whole in memory, so not measured: relinear eval {folder / 'export'}")
    elif session.student is None:
        session.student = assemble(session.teacher, session.mixers)
    elif last is not None and last.best_path is not None and last.best_path != last.path:
        _load_best(session, last.stage, last.best_path)
    fidelity = recall = None
    began = time.monotonic()
    if len(session.corpus.valid) and not apart:
        device = next(session.student.parameters()).device
        fidelity = measure(session.student, reference(session), eval_set(session, FINAL_TOKENS), device)
    seconds = {"quick": time.monotonic() - began}
    if "recall" in session.recipe.eval.suite and not apart:
        session.progress.note("recall: needles, pairs and their like")
        recall = recall_suite(session.student, session.teacher.tokenizer, reference(session))
        seconds["recall"] = time.monotonic() - began - seconds["quick"]
    result: dict[str, Any] = {
        "status": "complete",
        "run": str(folder),
        "export": str(folder / "export"),
        "teacher": session.recipe.teacher.model,
        "layers": {"drawing": session.layers.drawing, "kept": session.layers.kept},
        "step": None if last is None or last.best is None else last.best["step"],
        "stages": [_stage_summary(r) for r in session.results],
        "measured": session.measured,
        "fidelity": fidelity,
        "recall": recall,
        "tokens": _trained_tokens(session),
        "seconds": round(sum(r.seconds for r in session.results), 1),
        "environment": checkpoint.environment(),
    }
    rows = result_rows(session, fidelity)
    text = (
        to_text(rows)
        if rows
        else f"{folder}: complete ({'not' if apart else 'no held-out text, so nothing was'} measured)"
    )
    result["rows"] = to_json(rows)
    if recall is not None:
        text += "\n\n" + recall_text(recall)
        heatmaps(recall, folder / "recall")
    if any(r.metrics for r in session.results):
        loss_curves(folder / "metrics.jsonl", folder / "loss.png")
    export(
        folder,
        "best",
        folder / "export",
        dtype=session.recipe.teacher.dtype if apart else "float32",
        overwrite=True,
        student=session.student,
        teacher=session.teacher,
        result=result,
    )
    files.write_text(folder / "result.txt", text + "\n")
    files.write_json(folder / "result.json", result)
    if not apart:
        store_results(session, fidelity, recall, seconds)
    write_manifest(folder, complete=True)
    return result | {"table": text}


def _load_best(session: Session, stage: str, path: Path) -> None:
    """The best step's weights into the student; a damaged save leaves it as it ended, and is said."""
    found = checkpoint.Checkpoints(session.folder / "checkpoints").all(stage)
    best = next((commit for commit in found if commit.path == path), None)
    problem = f"{path}: not a whole checkpoint" if best is None else best.damage()
    if best is None or problem is not None:
        session.progress.note(f"warning: {problem}. The last step is exported in the best one's stead")
    else:
        load_student(session.student, best)


def result_rows(session: Session, fidelity: dict[str, Any] | None) -> list[Row]:
    """Teacher and student as rows of the summary table."""
    if fidelity is None:
        return []
    spent = {"tokens": _trained_tokens(session), "seconds": sum(r.seconds for r in session.results)}
    student = Row.of_student("student", fidelity, **spent)
    return [Row.of_teacher("teacher", fidelity), student] if "teacher" in fidelity else [student]


def _trained_tokens(session: Session) -> int:
    """Tokens of all stages that train; what calibrate looks at is not among them."""
    return sum(result.tokens for result in session.results if result.metrics)


def _stage_summary(result: StageResult) -> dict[str, Any]:
    return {
        "name": result.stage,
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens / result.seconds, 1) if result.seconds else None,
        "loss": result.metrics.get("loss"),
        "losses": result.metrics.get("losses"),
        "best": result.best,
        "unchanged": result.unchanged,
        **{key: value for key, value in result.report.items() if key not in ("changed", "layers")},
        **({"changed_teacher_tensors": result.report["changed"]} if "changed" in result.report else {}),
    }


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGUSR1 end the step, save and stop. Yields whether one came.

    A SIGINT after any of them ends at once. Other repetitions are ignored: schedulers send several while a run saves.
    """
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: nothing to listen to
        pass
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
