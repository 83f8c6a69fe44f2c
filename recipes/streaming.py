"""A run whose align is streamed: the teacher is never whole in memory before glue. Also the worker that joins one.

    python -m relinear.recipes.streaming RUN [--layers 0-3]

takes blocks of a run that is under way in the folder RUN, on this machine or another one that sees it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..distill import checkpoint, files, run_folder
from ..distill.align import align_module
from ..distill.data.batch import Batch
from ..distill.data.source import Source
from ..distill.digest import value_digest
from ..distill.errors import MachineError, RunFailed, UserError
from ..distill.stage import Callbacks, StageResult, StageSettings
from ..distill.stream.teacher import StreamedTeacher, open_teacher
from ..distill.stream.work import Work, clear, complete, prepare, take_blocks
from ..distill.student import transfer_between
from ..distill.teacher import Teacher, load_teacher
from ..distill.watchdog import beat
from . import loader, stream_calibration
from .disk_room import check_room
from .layers import LayerMap, select
from .plan import layer_map, stage_settings
from .schema import AlignStage, Recipe, TrainingStage
from .stream_costs import disk
from .teacher_config import locate, read_teacher_config


def streamed(recipe: Recipe) -> AlignStage | None:
    """The stage of a recipe that is streamed, None where none is."""
    return next((stage for stage in recipe.stages if isinstance(stage, AlignStage) and stage.stream), None)


def ends_apart(recipe: Recipe) -> bool:
    """The run ends with a streamed align: its model is never put together in memory."""
    trains = [stage for stage in recipe.stages if isinstance(stage, TrainingStage)]
    return bool(trains) and trains[-1] is streamed(recipe)


def load(recipe: Recipe, device: str) -> Teacher:
    """The teacher as the recipe's first stages need it: without weights where align is streamed."""
    opened = load_teacher if streamed(recipe) is None else open_teacher
    return opened(locate(recipe.teacher.model), recipe.teacher.revision, recipe.teacher.dtype, device)


def load_whole(session: Any) -> None:
    """Before a stage that needs it: the teacher in memory, and the mixers that the streamed align ended with."""
    teacher, recipe = session.teacher, session.recipe
    stage = streamed(recipe)
    if not isinstance(teacher, StreamedTeacher) or stage is None:
        return
    commit = checkpoint.Checkpoints(session.folder / "checkpoints").require_complete(stage.name)
    session.teacher = load_teacher(
        locate(recipe.teacher.model), recipe.teacher.revision, recipe.teacher.dtype, session.engine.home
    )
    plan, world = session.layers.converted, session.engine.world
    session.mixers, _ = transfer_between(session.engine, session.teacher, plan, recipe.seed)
    world.first(lambda: checkpoint.load_module(align_module(session.mixers), commit.weights(), commit.path))
    for mixer in session.mixers.values():
        world.share(mixer)


def carry_out(
    session: Any,
    stage: AlignStage,
    settings: StageSettings,
    source: Source,
    valid: Iterator[tuple[Batch, Any]],
    stopped: Callable[[], bool],
) -> bool:
    """The streamed align of an open session; afterwards its result is among the session's.

    Args:
        session: `session.Session`, its teacher from `load`.
        stage: of its recipe.
        settings: of the stage.
        source: of its batches, at the beginning.
        valid: held-out batches.
        stopped: told to stop.

    Returns:
        False where it was stopped.

    Raises:
        MachineError: not enough room on the disk for what it will write.
    """
    work = make_work(session.recipe, stage, session.teacher, session.layers, session.folder)
    work = replace(work, settings=settings, deadline=session.deadline)
    store = checkpoint.Checkpoints(session.folder / "checkpoints")
    found = store.newest(stage.name)
    if found is not None and found.complete:
        if not work.keep:
            clear(work)
        session.progress.note(f"{stage.name}: complete, loaded from {found.path}")
        session.results.append(StageResult(**found.state["result"], path=found.path))
        return stream_calibration.after_align(session, stage, stopped)
    _check_room(session.recipe, stage, work, session.progress.note)
    order = {layer: number for number, layer in enumerate(sorted(work.plan))}

    def told(record: dict[str, Any]) -> None:
        beat(stage.name)
        layer = int(next(iter(record["losses"])).split()[1])
        session.progress.update(order[layer] * settings.tokens + record["tokens"], loss=record["loss"])

    def should_stop() -> bool:
        beat(stage.name)
        return stopped()

    work.callbacks = Callbacks(progress=told, message=session.progress.note, should_stop=should_stop)
    done = sum(work.done(layer) for layer in work.plan)
    session.progress.stage(stage.name, settings.tokens * len(work.plan), done * settings.tokens)
    ended = prepare(work, source, (batch for batch, _ in valid)) and take_blocks(work)
    session.progress.done()
    if not ended:
        session.results.append(_stopped(work))
        return False
    session.results.append(complete(work))
    for record in files.read_metrics(session.folder / "metrics.jsonl"):
        if record["stage"] == stage.name and "eval" not in record:
            session.track(record)
    return stream_calibration.after_align(session, stage, stopped)


def make_work(recipe: Recipe, stage: AlignStage, teacher: Teacher, layers: LayerMap, folder: Path) -> Work:
    """The stage as `distill.stream.work` carries it out.

    Args:
        recipe: of the run.
        stage: its streamed align.
        teacher: from `load`.
        layers: what is converted.
        folder: of the run; it holds run.json.
    """
    assert isinstance(teacher, StreamedTeacher) and stage.stream is not None
    settings = StageSettings(**stage_settings(recipe, stage, teacher.context))
    plain = recipe.to_dict()
    key = value_digest(
        {
            "teacher": run_folder.read(folder)["teacher"]["fingerprint"],
            "dtype": recipe.teacher.dtype,
            "data": plain["data"],
            "seed": [recipe.seed, [other.name for other in recipe.stages].index(stage.name)],
            "batches": [settings.tokens, settings.batch, settings.seq_len, settings.micro_batch],
            "valid": recipe.eval.tokens,
            "precision": settings.precision,
        }
    )
    held, begins = stage.stream, stream_calibration.stage_of(recipe)
    before = begins and stream_calibration.make_work(recipe, begins, stage, teacher, layers, folder)
    return Work(
        teacher=teacher,
        plan=layers.converted,
        settings=settings,
        name=stage.name,
        run=folder,
        folder=stream_calibration.borders_folder(stage, folder),
        key=key,
        kind=held.borders,
        block=held.blocks,
        keep=held.keep_borders,
        seed=recipe.seed,
        start=before and before.name,
        start_key=before and before.key,
    )


def _check_room(recipe: Recipe, stage: AlignStage, work: Work, say: Callable[[str], None]) -> None:
    """Say what the stage will take on the disk, and refuse where there is not so much."""
    assert stage.stream is not None
    teacher = read_teacher_config(recipe.teacher.model, recipe.teacher.revision, recipe.place("teacher.model"))
    layers = layer_map(recipe, teacher.num_layers)
    plain = stage_settings(recipe, stage, teacher.context)
    needs = disk(stage.stream, plain, teacher, layers, recipe.teacher.dtype, recipe.eval.tokens)
    check_room(stage.name, stage.name, needs, work.run, work.folder, say)


def _stopped(work: Work) -> StageResult:
    """How far the stage is: tokens of the layers that are done."""
    done = sum(work.done(layer) for layer in work.plan)
    tokens = done * work.settings.tokens
    return StageResult(work.name, "stopped", 0, tokens, 0.0, {}, None, [], {}, work.stage_folder)


def join(folder: Path, layers: str | None = None, say: Callable[[str], None] = lambda text: None) -> bool:
    """Take blocks of a run that is under way, until none is left.

    Args:
        folder: of the run.
        layers: as recipes name them (`0-3,8`): only blocks with one of these.
        say: one line for a person.

    Returns:
        False where it was stopped.

    Raises:
        UserError: no run there, or none whose align is streamed.
    """
    from .runner import stop_signals

    run_folder.read(folder)
    recipe = loader.load(str(folder / "recipe.yaml"))
    stage = streamed(recipe)
    if stage is None:
        raise UserError(f"{folder}: no align of this run is streamed. Set stages.align.stream in its recipe")
    from .session import pick_device

    teacher = load(recipe, pick_device(recipe.engine.device))
    mapped = layer_map(recipe, teacher.num_layers)
    work = make_work(recipe, stage, teacher, mapped, folder)
    chosen = None if layers is None else select(layers, teacher.num_layers, "convert")
    with stop_signals() as stopped:
        work.callbacks = Callbacks(message=say, should_stop=stopped)
        return take_blocks(work, chosen)


def main(arguments: list[str] | None = None) -> int:
    """The worker's command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m relinear.recipes.streaming", description=join.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that is under way")
    parser.add_argument("--layers", help="only blocks with one of these layers: 0-3,8")
    asked = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        ended = join(asked.run, asked.layers, say)
    except (UserError, MachineError, RunFailed) as error:
        say(f"error: {error}")
        return error.exit_code
    say("no block is left" if ended else "stopped; what is done is saved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
