"""One layer: its mixer trained by the common loop on what a border holds, and what the layer gives written on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...mixers.base import Mixer, MixerInputs
from .. import checkpoint, files
from ..align import align_module, align_stage, align_visit
from ..loop import run_stage
from ..stage import Callbacks, StageResult, StageSettings
from ..student import Plan, transfer_layer
from ..walk import Rotary, Visit
from .borders import Border
from .source import Batches, BorderBatch, BorderSource
from .teacher import StreamedTeacher

DONE = "done.json"
"""In a layer's folder: its training has ended, and what it hands on is whole."""


class Writer:
    """Puts together the parts of batches, and writes each batch to a border when it is whole, while work goes on."""

    def __init__(self, border: Border, *, durable: bool = False) -> None:
        self.border, self.durable = border, durable
        self._held: list[dict[str, Tensor]] = []
        self._rows = 0
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def add(self, batch: BorderBatch, tensors: dict[str, Tensor]) -> None:
        """The next rows of a batch. After a stop or a failure within a batch its first rows come again."""
        self._held.append({name: tensor.detach() for name, tensor in tensors.items()})
        self._rows += batch.shape[0]
        if self._rows < batch.size:
            return
        names = self._held[0]
        whole = {name: torch.cat([part[name] for part in self._held]) for name in names}
        self._held, self._rows = [], 0
        self.flush()
        self._pending = self._pool.submit(self.border.write, batch.part, batch.number, whole, durable=self.durable)

    def flush(self) -> None:
        """Wait until all is written; raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Let go of the thread."""
        self._pool.shutdown(wait=True)


def train_layer(
    teacher: StreamedTeacher,
    plan: Plan,
    layer: int,
    batches: Batches,
    given: Border,
    settings: StageSettings,
    *,
    name: str,
    folder: Path,
    seed: int,
    start: checkpoint.Checkpoint | None = None,
    taken: list[Border],
    handed: Border | None,
    out: Border | None,
    callbacks: Callbacks,
    deadline: float | None = None,
) -> StageResult:
    """Train the mixer of the held layer to its end, or until told to stop, and go on where a run before stopped.

    Args:
        teacher: holds the layer.
        plan: of all layers.
        layer: which.
        batches: of the stage.
        given: the border below the layer.
        settings: as for the whole stage.
        name: of the stage.
        folder: of this layer: commits and metrics, as `run_stage` writes them; and transfer.json.
        seed: of the transfer.
        start: the mixer's weights at the beginning; None: as transferred.
        taken: what lower layers handed on.
        handed: where to write what this layer hands on (`MixerInputs.shared`); None where nothing takes it.
        out: where to write what the teacher's layer gives; chunks that are missing afterwards are for `fill`.
        callbacks: of the stage; `evaluate` is set here.
        deadline: see `run_stage`.
    """
    mixer, report = transfer_layer(teacher, plan, layer, seed)
    if not (folder / "transfer.json").exists():
        files.write_json(folder / "transfer.json", report.to_dict())
    mixers = {layer: mixer.to(teacher.device)}
    if start is not None:
        checkpoint.load_module(align_module(mixers), start.weights(), start.path)
    loss, precision = str(settings.loss), settings.precision
    writers = {"out": Writer(out)} if out is not None else {}
    if handed is not None:
        writers["handed"] = Writer(handed, durable=True)

    def step(batch: Any, total: int) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        visit = _sharing(batch, align_visit(mixers, losses, total, loss, precision, 1.0), shared)
        made = teacher.pass_layer(batch, batch.hidden, visit, precision, end=out is not None)
        if made is not None and "out" in writers:
            writers["out"].add(batch, {"hidden": made})
        if "handed" in writers:
            writers["handed"].add(batch, shared)
        return {"loss": torch.stack(list(losses.values())).mean(), **losses}

    def evaluate() -> dict[str, Any]:
        total, sums = 0, {}
        for number in range(batches.counts["valid"]):
            batch, losses = batches.read("valid", number, given, *taken).to(teacher.device), {}
            visit = _sharing(batch, align_visit(mixers, losses, 1, loss, precision, None), {})
            teacher.pass_layer(batch, batch.hidden, visit, precision, end=False)
            total += batch.tokens
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        values = {key: value / total for key, value in sums.items()}
        return {"score": sum(values.values()) / len(values), "losses": values}

    stage = align_stage(teacher, mixers, settings, name)
    held = {f"{teacher.layer_path(layer)}.{key}": p for key, p in teacher.layers[layer].state_dict().items()}
    own = {key: tensor for key, tensor in stage.frozen.items() if not key.startswith("teacher ")}
    stage = replace(stage, step=step, frozen=own | {f"teacher {key}": tensor for key, tensor in held.items()})
    source = BorderSource(batches, [given, *taken])
    try:
        result = run_stage(
            stage,
            source,
            settings,
            folder=folder,
            resume=True,
            callbacks=replace(callbacks, evaluate=evaluate if batches.counts["valid"] else None),
            deadline=deadline,
        )
        for writer in writers.values():
            writer.flush()
    finally:
        source.close()
        for writer in writers.values():
            writer.close()
    if result.status == "complete":
        if handed is not None:
            _hand_on_held_out(teacher, mixers, batches, given, handed, precision)
            handed.finish(batches.counts)
        files.write_json(folder / DONE, {"commit": result.path.name})
    return result


def _hand_on_held_out(
    teacher: StreamedTeacher, mixers: dict[int, Mixer], batches: Batches, given: Border, handed: Border, precision: str
) -> None:
    """What the trained mixer hands on of the held-out text."""
    for number in range(batches.counts["valid"]):
        batch, shared = batches.read("valid", number, given).to(teacher.device), {}
        visit = _sharing(batch, align_visit(mixers, {}, 1, "l2", precision, None), shared)
        teacher.pass_layer(batch, batch.hidden, visit, precision, end=False)
        handed.write("valid", number, shared)


def _sharing(batch: BorderBatch, visit: Visit, made: dict[str, Tensor]) -> Visit:
    """`visit` with what lower layers handed on; what the layer itself adds goes to `made`."""

    def sharing(layer: int, given: Tensor, rotary: Rotary, wanted: Tensor, inputs: MixerInputs) -> None:
        inputs.shared.update({key: tensor.to(given.device) for key, tensor in batch.shared.items()})
        visit(layer, given, rotary, wanted, inputs)
        made.update({key: t.detach() for key, t in inputs.shared.items() if key not in batch.shared})

    return sharing


def fill(
    teacher: StreamedTeacher,
    batches: Batches,
    given: Border | None,
    out: Border,
    settings: StageSettings,
    stopped: Callable[[], bool],
) -> bool:
    """Write to a border what of it is missing: what the held layer gives, or the embedding where `given` is None.

    Batches are split into the rows of a micro-batch as in training, so that the numbers are the same.

    Returns:
        False where it was stopped.
    """
    if out.finished:
        return True
    writer = Writer(out)
    try:
        for part, count in batches.counts.items():
            for number in range(count):
                if stopped():
                    return False
                if out.has(part, number):
                    continue
                batch = batches.read(part, number, *([] if given is None else [given])).to(teacher.device)
                size = batch.size if part == "valid" or settings.micro_batch is None else settings.micro_batch
                for start in range(0, batch.size, size):
                    rows = batch.rows(start, min(start + size, batch.size))
                    if given is None:
                        made = teacher.embed(rows, settings.precision)
                    else:
                        made = teacher.pass_layer(rows, rows.hidden, None, settings.precision, end=True)
                    assert made is not None
                    writer.add(rows, {"hidden": made})
        writer.flush()
    finally:
        writer.close()
    out.finish(batches.counts)
    return True


def layer_result(folder: Path, name: str) -> checkpoint.Checkpoint | None:
    """The commit with which a layer's training ended, None where it did not; may be asked while another one trains."""
    if not (folder / DONE).exists():  # opening the commits of a worker clears away what it is writing
        return None
    return checkpoint.Checkpoints(folder / "checkpoints").require_complete(name)
