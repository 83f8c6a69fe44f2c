"""Calibrate a teacher that does not fit into memory: one decoder layer at a time, before that layer is aligned.

RUN/stream/STAGE/layer-003/           commit of one layer's calibrated mixer, and its row of the report
DIR/STAGE-KEY/batches                 batches to fit, and held-out ones
DIR/STAGE-KEY/calibrate-003           what comes to layer 3: in the teacher, and in the student where that is fitted on
DIR/STAGE-KEY/aligned-003             likewise, of the held-out batches, once align is over

The teacher goes up once, and the student beside it: each layer is read, its mixer calibrated by the same code as in
memory, and what both streams give is written on. Nothing else differs, so with borders as computed the numbers are
those in memory.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...mixers.base import Mixer
from .. import checkpoint, files
from ..align import align_module
from ..calibrate import (
    HELD_OUT,
    CalibrateSettings,
    calibrate_mixer,
    check_settings,
    layer_named,
    looked_at,
    stage_report,
)
from ..calibrate_layer import output_error
from ..calibrate_streams import Given, instead, run_to, sample
from ..data.batch import Batch
from ..data.source import Source
from ..errors import UserError
from ..loop import seed_all
from ..stage import Callbacks, StageResult
from ..student import Plan, transfer_layer
from ..walk import mixer_inputs
from ..watchdog import beat
from .borders import Border
from .layer import DONE, Writer, layer_result
from .source import Batches, BorderBatch, assemble
from .teacher import StreamedTeacher

STREAMS = ("teacher", "student")


@dataclass
class CalibrateWork:
    """A calibrate stage, one layer at a time.

    Attributes:
        teacher: none of whose layers need be in memory.
        plan: layer -> (mixer, options).
        settings: of the stage.
        name: of the stage.
        run: the run folder.
        folder: for borders; of this stage alone.
        key: what all of it depends on.
        kind: of `borders.FORMATS`.
        seed: of the transfer.
        callbacks: whom to tell, after every layer.
        deadline: `time.monotonic()` at which to stop.
    """

    teacher: StreamedTeacher
    plan: Plan
    settings: CalibrateSettings
    name: str
    run: Path
    folder: Path
    key: str
    kind: str = "compute"
    seed: int = 0
    callbacks: Callbacks = field(default_factory=Callbacks)
    deadline: float | None = None

    @property
    def batches(self) -> Batches:
        """Of the stage."""
        return Batches(Border(self.folder / "batches", self.key))

    def border(self, name: str, layer: int) -> Border:
        """What comes to a layer in one of the passes, `calibrate` or `aligned`."""
        return Border(self.folder / f"{name}-{layer:03}", self.key, self.kind)

    def layer_folder(self, layer: int) -> Path:
        """Of a layer's commit."""
        return self.run / "stream" / self.name / f"layer-{layer:03}"

    def found(self, layer: int) -> checkpoint.Checkpoint | None:
        """A layer's commit, None where it is not calibrated yet.

        Raises:
            UserError: it was made with other settings, or of another teacher or data.
        """
        commit = layer_result(self.layer_folder(layer), self.name)
        if commit is not None:
            self.check(commit)
        return commit

    def check(self, commit: checkpoint.Checkpoint) -> None:
        """The commit is of this work; see `found`."""
        check_settings(commit, asdict(self.settings))
        if commit.state["key"] != self.key:
            raise UserError(
                f"{commit.path}: was made with another teacher, other data or another plan of layers. Resume with "
                "those that the run began with, or start in a new folder: --out DIR"
            )

    def mixer(self, layer: int) -> Mixer:
        """A layer's mixer: calibrated where it is done, else as transferred. The layer's attention is read."""
        made = transfer_layer(self.teacher, self.plan, layer, self.seed)[0].to(self.teacher.device)
        commit = self.found(layer)
        if commit is not None:
            checkpoint.load_module(align_module({layer: made}), commit.weights(), commit.path)
        return made

    def stopped(self) -> bool:
        """Told to stop, or out of time."""
        return self.callbacks.should_stop() or (self.deadline is not None and time.monotonic() >= self.deadline)


def calibrate_stream(work: CalibrateWork, source: Source, *, needed: bool = True) -> StageResult:
    """Calibrate every layer of the plan; commits all mixers as the stage, and writes `RUN/STAGE.json`.

    Args:
        work: the stage.
        source: of its batches, at the beginning.
        needed: the layers' own commits will be read: they are made again where the stage is complete and they are gone.

    Returns:
        As `distill.calibrate.run_calibrate` does. A stage that was stopped has kept the layers that were done.

    Raises:
        UserError: what is there was made of something else.
        RunFailed: statistics or a solution are not finite; names the layer.
    """
    store = checkpoint.Checkpoints(work.run / "checkpoints")
    found = store.newest(work.name)
    if found is not None and found.complete:
        work.check(found)
        work.callbacks.message(f"{work.name}: complete, loaded from {found.path}")
        if needed:
            _hand_out(work, found)
        result = StageResult(**found.state["result"], path=found.path)
        if not (work.run / f"{work.name}.json").exists():
            files.write_json(work.run / f"{work.name}.json", result.report)
        return result
    seed_all(work.settings.seed)
    files.clean_temporaries(work.folder)
    held = _held_out(source, -(-work.settings.tokens // HELD_OUT))
    ended = work.batches.write(source, work.settings.tokens, held, work.stopped)
    ended = ended and _ascend(work, "calibrate", _looked_at(work), lambda layer, given: _calibrate(work, layer, given))
    if not ended:
        done = sum(work.found(layer) is not None for layer in work.plan)
        return StageResult(work.name, "stopped", done, 0, 0.0, {}, None, [], {}, work.layer_folder(0).parent)
    return _complete(work, store)


def aligned_errors(work: CalibrateWork, aligned: checkpoint.Checkpoint) -> dict[int, float] | None:
    """What `distill.calibrate.teacher_errors` says of the mixers of align's commit; None where it was stopped.

    Reads the teacher once more. Afterwards the stage's batches are gone.
    """
    weights, errors = aligned.weights(), {}
    for layer in range(max(work.plan) + 1):
        work.border("aligned", layer).remove()

    def visit(layer: int, given: Border) -> Mixer | None:
        if layer not in work.plan:
            return None
        mixer = transfer_layer(work.teacher, work.plan, layer, work.seed)[0].to(work.teacher.device)
        own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{layer}.")}
        checkpoint.load_module(align_module({layer: mixer}), own, aligned.path)
        samples = [sample(work.teacher, b, _look(work, layer, b, False)) for b in _read(work, "valid", given)]
        errors[layer] = output_error(mixer, samples)
        return mixer

    if not _ascend(work, "aligned", 0, visit):
        return None
    clear(work)
    return errors


def clear(work: CalibrateWork) -> None:
    """Remove what is left of batches and hidden states."""
    shutil.rmtree(work.folder, ignore_errors=True)
    with suppress(OSError):  # others' are there too
        work.folder.parent.rmdir()


def _held_out(source: Source, tokens: int) -> Iterator[Batch]:
    """The source's next batches, of at least so many tokens."""
    seen = 0
    while seen < tokens:
        batch = source.next_batch()
        seen += batch.tokens
        yield batch


def _looked_at(work: CalibrateWork) -> int:
    """The batches, of those to fit, whose hidden states are needed."""
    most = looked_at(work.settings, work.teacher.geometry(0).hidden_size)
    seen = number = 0
    while number < work.batches.counts["train"] and (most is None or seen < most):
        seen += work.batches.read("train", number).tokens
        number += 1
    return number


@torch.no_grad()
def _ascend(work: CalibrateWork, name: str, fit: int, visit: Callable[[int, Border], Mixer | None]) -> bool:
    """Layer after layer, up to the highest converted one; goes on where a process before stopped.

    Args:
        work: the stage.
        name: of the pass.
        fit: batches of `train` that take part; held-out ones all do.
        visit: (layer, what comes to it) -> its mixer, None where attention stays; the layer is held.

    Returns:
        False where it was stopped.
    """
    last = max(work.plan)
    counts = {"train": fit, "valid": work.batches.counts["valid"]}
    both = name == "calibrate" and work.settings.inputs == "student"
    lowest = next((layer for layer in range(last, -1, -1) if work.border(name, layer).finished), None)

    def embed(batch: BorderBatch) -> dict[str, Tensor]:
        hidden = work.teacher.embed(batch, "fp32")
        return dict.fromkeys(STREAMS if both else STREAMS[:1], hidden)

    if lowest is None:
        with work.teacher.embedding():
            if not _write(work, counts, None, work.border(name, 0), embed):
                return False
        lowest = 0
    for layer in range(lowest, last + 1):
        given = work.border(name, layer)
        with work.teacher.hold(layer):
            if work.stopped():
                return False
            mixer = visit(layer, given)

            def onward(batch: BorderBatch, layer: int = layer, mixer: Mixer | None = mixer) -> dict[str, Tensor]:
                return _onward(work, layer, mixer, batch, both)

            if layer < last and not _write(work, counts, given, work.border(name, layer + 1), onward):
                return False
        if layer < last:
            given.remove()
    return True


def _write(
    work: CalibrateWork,
    counts: dict[str, int],
    given: Border | None,
    out: Border,
    make: Callable[[BorderBatch], dict[str, Tensor]],
) -> bool:
    """Write to a border what of it is missing; False where it was stopped."""
    writer = Writer(out)
    try:
        for part, count in counts.items():
            for number in range(count):
                if work.stopped():
                    return False
                if not out.has(part, number):
                    batch = _batch(work, part, number, given)
                    writer.add(batch, make(batch))
        writer.flush()
    finally:
        writer.close()
    out.finish(counts)
    return True


def _batch(work: CalibrateWork, part: str, number: int, given: Border | None) -> BorderBatch:
    chunks = [work.batches.border.read(part, number)]
    if given is not None:
        held = given.read(part, number)
        chunks += [{"hidden": held[STREAMS[0]]}, held]
    return assemble(part, number, chunks).to(work.teacher.device)


def _read(work: CalibrateWork, part: str, given: Border) -> Iterator[BorderBatch]:
    """The batches of a part with what comes to the layer, one at a time."""
    assert given.counts is not None
    for number in range(given.counts[part]):
        beat(work.name)
        yield _batch(work, part, number, given)


def _look(work: CalibrateWork, layer: int, batch: BorderBatch, own: bool) -> Given:
    """What the held layer's attention meets, in one of the streams."""
    stream = STREAMS[own]
    with work.teacher.fed(batch.shared[stream]):
        found = run_to(work.teacher, {}, layer, batch, own)
    found.inputs.shared.update(_shared(batch, stream))
    return found


def _shared(batch: BorderBatch, stream: str) -> dict[str, Tensor]:
    """What lower mixers handed on in a stream (`MixerInputs.shared`)."""
    return {key.partition(":")[2]: t for key, t in batch.shared.items() if key.startswith(f"{stream}:")}


def _onward(work: CalibrateWork, layer: int, mixer: Mixer | None, batch: BorderBatch, both: bool) -> dict[str, Tensor]:
    """What the held layer gives in each stream, and what is handed on beside it."""
    teacher, (theirs, mine) = work.teacher, STREAMS
    made = {key: tensor for key, tensor in batch.shared.items() if ":" in key}

    def onward(stream: str) -> Tensor:
        out = teacher.pass_layer(batch, batch.shared[stream], None, "fp32", end=True)
        assert out is not None
        return out

    made[theirs] = onward(theirs)
    if mixer is not None and mixer.couples_layers and mixer.first:
        given = _look(work, layer, batch, False)
        mixer(given.hidden, position_embeddings=given.rotary, mixer_inputs=given.inputs)
        made |= {f"{theirs}:{key}": tensor for key, tensor in given.inputs.shared.items()}
    if not both:
        return made
    if mixer is None:
        made[mine] = onward(mine)
        return made
    inputs = mixer_inputs(batch)
    inputs.shared.update(_shared(batch, mine))
    with instead(teacher.attention(layer), mixer, inputs, teacher.dtype):
        made[mine] = onward(mine)
    return made | {f"{mine}:{key}": tensor for key, tensor in inputs.shared.items()}


def _calibrate(work: CalibrateWork, layer: int, given: Border) -> Mixer | None:
    """A layer's mixer, calibrated and committed where it was not."""
    if layer not in work.plan:
        return None
    mixer = work.mixer(layer)
    if work.found(layer) is not None:
        return mixer
    start = time.perf_counter()

    def look(batch: Any, own: bool) -> Given:
        return _look(work, layer, batch, own)

    with layer_named(work.name, layer, mixer):
        fit, held = _read(work, "train", given), _read(work, "valid", given)
        row = calibrate_mixer(work.teacher, mixer, layer, fit, held, work.settings, look)
    _commit_layer(work, layer, align_module({layer: mixer}).state_dict(), row, time.perf_counter() - start)
    order = sorted(work.plan)
    number = order.index(layer) + 1
    spent = work.settings.tokens * number // len(order)
    work.callbacks.progress({"stage": work.name, "step": number, "tokens": spent, "loss": row["calibrated"]})
    return mixer


def _commit_layer(work: CalibrateWork, layer: int, weights: dict[str, Tensor], row: Any, seconds: float) -> None:
    folder = work.layer_folder(layer)
    state = {"settings": asdict(work.settings), "key": work.key, "row": row, "seconds": seconds, "best": None}
    commit = checkpoint.Checkpoints(folder / "checkpoints").commit(work.name, 1, weights, state, complete=True)
    files.write_json(folder / DONE, {"commit": commit.path.name})


def _complete(work: CalibrateWork, store: checkpoint.Checkpoints) -> StageResult:
    """The stage's commit from those of the layers, whose tensors are mapped from their files, and its report."""
    rows: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    seconds = 0.0
    for layer in sorted(work.plan):
        commit = work.found(layer)
        assert commit is not None
        weights |= commit.weights()
        rows[str(layer)] = commit.state["row"]
        seconds += commit.state["seconds"]
    spent = {
        part: sum(work.batches.read(part, number).tokens for number in range(count))
        for part, count in work.batches.counts.items()
    }
    report = stage_report(work.settings, spent["train"], spent["valid"], rows)
    result = StageResult(work.name, "complete", len(rows), spent["train"], seconds, {}, None, [], report, store.folder)
    state: dict[str, Any] = {"settings": asdict(work.settings), "key": work.key, "tokens": spent["train"]}
    state |= {"rows": rows, "seconds": seconds, "best": None}
    state["result"] = {key: value for key, value in result.__dict__.items() if key != "path"}
    made = store.commit(work.name, len(rows), weights, state, complete=True)
    files.write_json(work.run / f"{work.name}.json", report)
    work.border("calibrate", max(work.plan)).remove()
    return replace(result, path=made.path)


def _hand_out(work: CalibrateWork, found: checkpoint.Checkpoint) -> None:
    """The layers' own commits from the stage's, where they are gone."""
    missing = [layer for layer in work.plan if work.found(layer) is None]
    weights = found.weights() if missing else {}
    for layer in missing:
        own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{layer}.")}
        _commit_layer(work, layer, own, found.state["rows"][str(layer)], 0.0)
