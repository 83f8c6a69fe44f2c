"""Align, layer after layer: which border comes from which, who takes which block, and the commit at the end.

FOLDER/stream/STAGE/layer-003/        commits and metrics of one layer's training, transfer.json
FOLDER/stream/STAGE/block-000/        lock of the worker that has it
FOLDER/stream/STAGE/done.json         the stage has ended
DIR/batches, DIR/border-004/          what `borders.Border` describes: the stage's batches; what comes to layer 4
DIR/pass-005/                         likewise, on the way from one block's first border to the next one's
DIR/shared-KEY/layer-000/             what layer 0's mixer hands to those above it

Layers are taken in blocks. One process makes the first border of every block with the teacher alone; then any number
of them take blocks, from the lowest one on, each layer being trained and the border above it written in one pass
(LoLCATs trains Llama 3.1 405B in such blocks, arXiv:2410.10254).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...mixers import registry
from .. import checkpoint, files
from ..data.batch import Batch
from ..data.source import Source
from ..digest import value_digest
from ..errors import UserError
from ..lock import RunLock
from ..modeling.config import is_first
from ..stage import COSMETIC, Callbacks, StageResult, StageSettings
from ..student import Plan
from .borders import Border
from .layer import DONE, fill, layer_result, train_layer
from .source import Batches
from .teacher import StreamedTeacher


@dataclass
class Work:
    """A streamed align stage.

    Attributes:
        teacher: none of whose layers need be in memory.
        plan: layer -> (mixer, options).
        settings: of the stage.
        name: of the stage.
        run: the run folder.
        folder: for borders.
        key: what the borders depend on: teacher, data, order, batches, precision.
        kind: of `borders.FORMATS`.
        block: layers in a block; None puts all in one.
        keep: leave the borders there at the end.
        seed: of the transfer.
        start: name of the calibrate stage whose mixers are trained; None: as transferred.
        start_key: what those depend on.
        callbacks: whom to tell.
        deadline: `time.monotonic()` at which to stop.
        wait: seconds between looks at what other workers do.
    """

    teacher: StreamedTeacher
    plan: Plan
    settings: StageSettings
    name: str
    run: Path
    folder: Path
    key: str
    kind: str = "compute"
    block: int | None = None
    keep: bool = False
    seed: int = 0
    start: str | None = None
    start_key: str | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    deadline: float | None = None
    wait: float = 1.0

    @property
    def blocks(self) -> list[range]:
        """The blocks of layers, up to the highest converted one."""
        count = max(self.plan) + 1
        size = self.block or count
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @property
    def stage_folder(self) -> Path:
        """Of commits and locks."""
        return self.run / "stream" / self.name

    @property
    def batches(self) -> Batches:
        """Of the stage."""
        return Batches(Border(self.folder / "batches", self.key))

    def border(self, layer: int, *, on_the_way: bool = False) -> Border:
        """What comes to a layer."""
        kind = "pass" if on_the_way else "border"
        return Border(self.folder / f"{kind}-{layer:03}", value_digest([self.key, self.kind]), self.kind)

    def layer_folder(self, layer: int) -> Path:
        """Of a layer's commits."""
        return self.stage_folder / f"layer-{layer:03}"

    def handed(self, layer: int) -> Border:
        """What a layer's mixer hands on: it depends on how that mixer is trained."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in COSMETIC}
        plan = {str(other): value for other, value in self.plan.items()}
        key = value_digest([self.key, self.kind, settings, self.seed, plan, self.start_key])
        return Border(
            self.folder / f"shared-{key[:12]}" / f"layer-{layer:03}", key, self.kind, self.layer_folder(layer)
        )

    def hands_on(self, layer: int) -> bool:
        """Another layer takes what this one hands on."""
        return any(self.provider(other) == layer for other in self.plan)

    def provider(self, layer: int) -> int | None:
        """The layer that hands something to this one, None where none does."""
        name = self.plan[layer][0]
        if not registry.module(name).couples_layers or is_first(self.plan, layer):
            return None
        return min(other for other, (kind, _) in self.plan.items() if kind == name)

    def started(self, layer: int) -> checkpoint.Checkpoint | None:
        """The commit of the layer's calibrated mixer; None where there is none, or none yet."""
        return None if self.start is None else layer_result(self.start_folder(layer), self.start)

    def start_folder(self, layer: int) -> Path:
        """Of that commit: see `calibrate.CalibrateWork`."""
        return self.run / "stream" / str(self.start) / f"layer-{layer:03}"

    def done(self, layer: int) -> bool:
        """Nothing of the layer is left to train."""
        if layer not in self.plan:
            return True
        ended = (self.layer_folder(layer) / DONE).exists()  # no more: another worker may be about to clear all away
        return ended and (not self.hands_on(layer) or self.handed(layer).finished)

    def stopped(self) -> bool:
        """Told to stop, or out of time."""
        return self.callbacks.should_stop() or (self.deadline is not None and time.monotonic() >= self.deadline)


def prepare(work: Work, source: Source, valid: Iterable[Batch]) -> bool:
    """Batches, and the first border of every block that is not done: the teacher alone, one layer at a time.

    Args:
        work: the stage.
        source: of its batches, at the beginning.
        valid: held-out batches.

    Returns:
        False where it was stopped.
    """
    say = work.callbacks.message
    files.clean_temporaries(work.folder)
    if not work.batches.border.finished:
        say(f"{work.name}: taking the batches of {work.settings.tokens:,} tokens")
        if not work.batches.write(source, work.settings.tokens, valid, work.stopped):
            return False
    # Whoever finishes a block leaves its first border there until this pass is over, which may need it.
    needed = [block.start for block in work.blocks if _entry(work, block) is None and not _ended(work, block)]
    if needed:
        _mark(work).unlink(missing_ok=True)
    for start in needed:
        if not _reach(work, start, say):
            return False
    files.write_json(_mark(work), {"key": work.key})
    return True


def _reach(work: Work, start: int, say: Callable[[str], None]) -> bool:
    """The border of a block's first layer, from the nearest one below that is there."""
    batches, wanted = work.batches, work.border(start)
    if start == 0:
        say(f"{work.name}: embedding of {batches.counts['train']} batches")
        with work.teacher.embedding():
            return fill(work.teacher, batches, None, wanted, work.settings, work.stopped)
    starts = {block.start for block in work.blocks}
    below = [work.border(layer) for layer in range(start) if layer in starts]
    below += [work.border(layer, on_the_way=True) for layer in range(start)]
    reached = {int(border.folder.name.rpartition("-")[2]): border for border in below if border.finished}
    if not reached and not _reach(work, 0, say):
        return False
    layer = max(reached, default=0)
    given = reached.get(layer, work.border(0))
    while layer < start:
        out = wanted if layer + 1 == start else work.border(layer + 1, on_the_way=True)
        say(f"{work.name}: teacher's layer {layer}, on the way to layer {start}")
        with work.teacher.hold(layer):
            if not fill(work.teacher, batches, given, out, work.settings, work.stopped):
                return False
        if given.folder.name.startswith("pass-"):
            given.remove()
        given, layer = out, layer + 1
    return True


def take_blocks(work: Work, layers: Iterable[int] | None = None, *, stay: bool = True) -> bool:
    """Train the layers of all blocks that no other worker has, until none is left.

    Args:
        work: the stage, whose borders are made or being made.
        layers: only blocks that hold one of these; None for all.
        stay: wait for what others have, and take it over where they ended without finishing.

    Returns:
        False where it was stopped, or where blocks are left and `stay` is False.
    """
    wanted = None if layers is None else set(layers)
    chosen = [block for block in work.blocks if wanted is None or wanted & set(block)]
    while True:
        if (work.stage_folder / DONE).exists():
            return True
        left = [block for block in chosen if not _ended(work, block)]
        if not left:
            return True
        if work.stopped():
            return False
        for block in left:
            if not _ready(work, block):
                continue
            with _locked(work, block) as ours:
                if ours and not _ended(work, block):
                    if not _train_block(work, block):
                        return False
                    break
        else:
            if not stay:
                return False
            time.sleep(work.wait)


def _train_block(work: Work, block: range) -> bool:
    """Every layer of a block, from where it was left; False where it was stopped."""
    layer = _entry(work, block)
    assert layer is not None
    while not _ended(work, block):
        above = [other for other in block if other > layer and not work.done(other)]
        given, out = work.border(layer), work.border(layer + 1) if above else None
        with work.teacher.hold(layer):
            if not work.done(layer) and not _train(work, layer, given, None if out is None or out.finished else out):
                return False
            if out is not None and not fill(work.teacher, work.batches, given, out, work.settings, work.stopped):
                return False
        if not work.keep and (layer != block.start or _passed(work)):
            given.remove()
        layer += 1
    return True


def _train(work: Work, layer: int, given: Border, out: Border | None) -> bool:
    provider = work.provider(layer)
    work.callbacks.message(f"{work.name}: layer {layer}: {work.plan[layer][0]}")
    result = train_layer(
        work.teacher,
        work.plan,
        layer,
        work.batches,
        given,
        work.settings,
        name=work.name,
        folder=work.layer_folder(layer),
        seed=work.seed,
        start=work.started(layer),
        taken=[] if provider is None else [work.handed(provider)],
        handed=work.handed(layer) if work.hands_on(layer) else None,
        out=out,
        callbacks=replace(work.callbacks, should_stop=work.stopped),
        deadline=work.deadline,
    )
    return result.status == "complete"


def _ended(work: Work, block: range) -> bool:
    return all(work.done(layer) for layer in block)


def _entry(work: Work, block: range) -> int | None:
    """The layer at which to enter a block: the highest with a border, not above the lowest that is left to train."""
    left = next((layer for layer in block if not work.done(layer)), block.stop - 1)
    return next((layer for layer in range(left, block.start - 1, -1) if work.border(layer).finished), None)


def _ready(work: Work, block: range) -> bool:
    """The block can be entered, its mixers are calibrated, and what lower blocks hand to it is there."""
    if not work.batches.border.finished or _entry(work, block) is None:
        return False
    if work.start and not all((work.start_folder(layer) / DONE).exists() for layer in block if layer in work.plan):
        return False
    providers = {work.provider(layer) for layer in block if layer in work.plan} - {None, *block}
    return all(work.handed(layer).finished for layer in providers if layer is not None)


@contextmanager
def _locked(work: Work, block: range) -> Iterator[bool]:
    """The lock on a block, inside; yields whether it is ours."""
    folder = work.stage_folder / f"block-{block.start:03}"
    with files.disk_guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = RunLock(folder)
    except UserError:
        yield False
        return
    with lock:
        yield True


def _mark(work: Work) -> Path:
    return work.folder / "passed.json"


def _passed(work: Work) -> bool:
    """The teacher's pass over all blocks is over: their first borders serve their own block alone."""
    return _mark(work).exists()


def complete(work: Work) -> StageResult:
    """The stage's own commit and metrics, from those of its layers; afterwards the borders go, unless they are kept.

    The commit holds all mixers, as one of an align in memory does. Their tensors are mapped from the layers' commits,
    so that no more than a part of them need be in memory.

    Raises:
        UserError: a layer is not done.
    """
    store = checkpoint.Checkpoints(work.run / "checkpoints", work.settings.keep)
    commits = {layer: layer_result(work.layer_folder(layer), work.name) for layer in sorted(work.plan)}
    ended = {layer: commit for layer, commit in commits.items() if commit is not None}
    if len(ended) < len(commits):
        left = [layer for layer in commits if layer not in ended]
        raise UserError(f"{work.stage_folder}: layers {left} are not done. Go on: the same command with --resume")
    results = {layer: StageResult(**c.state["result"], path=c.path) for layer, c in ended.items()}
    with files.MetricsLog(work.run / "metrics.jsonl") as log:
        log.truncate_at_stage(work.name)
        records = _merged([files.read_metrics(work.layer_folder(layer) / "metrics.jsonl") for layer in ended])
        for record in records:
            log.append(record)
        offset = log.offset()
    first = next(iter(results.values()))
    last = [record for record in records if "eval" not in record]
    result = StageResult(
        stage=work.name,
        status="complete",
        step=first.step,
        tokens=first.tokens,
        seconds=sum(each.seconds for each in results.values()),
        metrics=last[-1] if last else {},
        best=None,
        unchanged=[name for each in results.values() for name in each.unchanged],
        report={"borders": work.kind},
        path=store.folder,
    )
    state: dict[str, Any] = {
        "tokens": result.tokens,
        "seconds": result.seconds,
        "best": None,
        "metrics": result.metrics,
        "metrics_offset": offset,
        "source": {},
        "result": {key: value for key, value in result.__dict__.items() if key != "path"},
    }
    weights: dict[str, Tensor] = {}
    for commit in ended.values():
        weights |= commit.weights()
    made = store.commit(work.name, result.step, weights, state, complete=True)
    transferred = {
        str(layer): json.loads((work.layer_folder(layer) / "transfer.json").read_text("utf-8")) for layer in ended
    }
    files.write_json(work.run / "transfer.json", transferred)
    files.write_json(work.stage_folder / DONE, {"commit": made.path.name})
    if not work.keep:
        clear(work)
    return replace(result, path=made.path)


def clear(work: Work) -> None:
    """Remove all that the stage left in its folder for borders, and its layers' own commits."""
    _mark(work).unlink(missing_ok=True)
    layers = range(max(work.plan) + 1)
    made = [work.border(layer, on_the_way=way) for layer in layers for way in (False, True)]
    made += [work.handed(layer) for layer in work.plan if work.hands_on(layer)]
    for border in [*made, work.batches.border]:
        border.remove()
    for folder in sorted({border.folder.parent for border in made}, reverse=True):  # the inner ones first
        with suppress(OSError):  # not empty, or gone
            folder.rmdir()
    for layer in work.plan:
        folder = work.layer_folder(layer)
        for own in [folder] if work.start is None else [folder, work.start_folder(layer)]:
            (own / DONE).unlink(missing_ok=True)
            shutil.rmtree(own, ignore_errors=True)


def _merged(layers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The metrics of layers that were trained one after the other, as if they had been trained together."""
    made = []
    by_step: list[dict[tuple, dict[str, Any]]] = [{(r["step"], "eval" in r): r for r in records} for records in layers]
    for step in [key for key in by_step[0] if all(key in other for other in by_step)]:
        rows = [records[step] for records in by_step]
        if step[1]:
            losses = {name: v for row in rows for name, v in row["eval"]["losses"].items()}
            values = {"score": sum(losses.values()) / len(losses), "losses": losses}
            made.append({**{key: rows[0][key] for key in ("stage", "step", "tokens")}, "eval": values})
            continue
        losses = {name: v for row in rows for name, v in row["losses"].items()}
        speed = [row["tokens_per_second"] for row in rows]
        made.append(
            {
                **rows[0],
                "loss": sum(losses.values()) / len(losses),
                "losses": losses,
                "grad_norm": {name: v for row in rows for name, v in row["grad_norm"].items()},
                "tokens_per_second": 1 / sum(1 / each for each in speed) if all(speed) else 0.0,
                "peak_memory": max(row["peak_memory"] for row in rows),
            }
        )
    return made
