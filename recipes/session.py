"""A run under way: everything that is opened before work starts, and whom it tells how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import __version__
from ..distill import checkpoint, run_folder
from ..distill.data.corpus import Corpus, open_corpus
from ..distill.data.source import Source
from ..distill.data.windows import eval_batches
from ..distill.engine import Engine, close_world, open_engine
from ..distill.errors import MachineError, UserError
from ..distill.lock import RunLock, check_free
from ..distill.lora import require_peft
from ..distill.stage import StageResult
from ..distill.teacher import Teacher
from ..distill.watchdog import beat
from ..eval.harness import require_harness
from . import loader, streaming, without_teacher
from .layers import LayerMap
from .notes import Kept
from .plan import layer_map, window
from .publishing import before_work
from .schema import EMBEDDED, Recipe, TrainingStage
from .trackers import Trackers, open_trackers, require_trackers


class Progress(Protocol):
    """Whom a run tells how far it is; `launch.progress.Progress` is one."""

    def stage(self, name: str, total_tokens: int | None = None, done_tokens: int = 0, unit: str = "tokens") -> None:
        """A stage begins."""

    def update(self, tokens: int, **metrics: float) -> None:
        """So many tokens are done."""

    def note(self, text: str) -> None:
        """A sentence to the reader."""

    def done(self) -> None:
        """The stage ended."""


class Silent:
    """A `Progress` that says nothing."""

    def stage(self, name: str, total_tokens: int | None = None, done_tokens: int = 0, unit: str = "tokens") -> None:
        """Nothing."""

    def update(self, tokens: int, **metrics: float) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""


@dataclass
class Session:
    """A run under way.

    Attributes:
        recipe: resolved.
        folder: the run folder.
        teacher: frozen.
        layers: what is kept and what converted.
        corpus: training data and held-out documents.
        progress: whom to tell.
        resume: the folder may hold this run already.
        deadline: `time.monotonic()` at which to stop, or None.
        track: sends a step's metrics to the trackers that the recipe names.
        lock: on the folder; `close` lets go of it. Of several ranks rank 0 has it.
        engine: what stages run on.
        mixers: by layer, once transferred.
        taken: layers whose mixers came trained from another run.
        student: once assembled.
        results: of the stages that ended, in order.
        measured: stage name -> fidelity on held-out text after it.
    """

    recipe: Recipe
    folder: Path
    teacher: Teacher
    layers: LayerMap
    corpus: Corpus
    progress: Progress
    resume: bool = False
    deadline: float | None = None
    track: Trackers = field(default_factory=lambda: Trackers([], lambda text: None))
    lock: RunLock | None = None
    engine: Engine = field(default_factory=Engine)
    mixers: dict[int, Any] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    student: Any = None
    results: list[StageResult] = field(default_factory=list)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    def close(self) -> None:
        """The work in the folder is over, for now: another process may begin."""
        self.track.close()
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        # After an error another rank may be gone or wait elsewhere: leaving the group could then wait for it.
        if kind is None and self.engine.world.size > 1:
            close_world()


def open_session(
    recipe: Recipe, *, resume: bool, max_hours: float | None, progress: Progress, start: Path | None
) -> Session:
    """Everything that can fail before work starts: teacher, layers, folder, data."""
    _require_packages(recipe)
    if start is not None and streaming.streamed(recipe) is not None:
        raise UserError("--start: a streamed align transfers its own mixers; leave one of the two out")
    folder = Path(str(recipe.save.dir))
    check_free(folder)
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    asked = recipe.engine
    engine = open_engine(asked.parallel, pick_device(asked.device), asked.offload, asked.offload_dir)
    for stage in recipe.stages:
        if isinstance(stage, TrainingStage):
            engine.require(stage.name, stage.batch, stage.spike)
    world, device = engine.world, engine.home
    progress = progress if world.main else Silent()
    for said in before_work(recipe):
        progress.note(said)
    source = recipe.teacher.model
    teacher = without_teacher.load(recipe, start) or streaming.load(recipe, device)
    layers = layer_map(recipe, teacher.num_layers)
    trains = [stage.name for stage in recipe.stages if isinstance(stage, TrainingStage)]
    if trains and not layers.converted:
        raise UserError(f"layers: nothing is converted, so {trains[0]} has nothing to train. Write layers.convert=all")
    record = {
        "recipe": recipe.to_dict(),
        "teacher": {
            "source": source,
            "folder": str(teacher.folder.resolve()),
            "revision": teacher.revision,
            "family": teacher.family.name,
            "fingerprint": teacher.fingerprint(),
        },
        "layers": {str(layer): list(value) for layer, value in layers.converted.items()},
        "kept_attention": layers.attention,
        "start": None if start is None else str(start),
        "stages": [[stage.name, stage.kind] for stage in recipe.stages],
        "environment": checkpoint.environment(),
        "relinear": __version__,
    }
    locks: list[RunLock] = []
    world.first(lambda: locks.append(run_folder.take(folder)))
    try:
        for lock in locks:
            if lock.unsupported:
                progress.note(
                    f"warning: {folder}: no locks here ({lock.unsupported}); see to it that one run alone uses it"
                )
        held = world.first(lambda: run_folder.claim(folder, record, loader.dump(recipe), resume=resume))
        progress = Kept(progress, folder) if world.main else progress
        if resume and not held:
            progress.note(f"{folder}: holds no run yet; starting it")
        progress.note(
            f"teacher {source}: {teacher.family.name}, {teacher.num_layers} layers, context {teacher.context}, "
            f"{sum(p.numel() for p in teacher.model.parameters()):,} parameters, {recipe.teacher.dtype} on {device}"
        )
        if world.size > 1:
            progress.note(f"engine {engine.name}: {world.size} processes on {world.device.type}")
        progress.note(f"layers {layers.drawing}: {len(layers.converted)} converted, {len(layers.kept)} kept")
        if layers.changes and layers.kept:
            progress.note(f"kept attention from glue on: {layers.changes}")
        said = window(recipe.data.seq_len, teacher.context)[1]
        if said:
            progress.note(f"data.seq_len {said}")
        if recipe.data.source == EMBEDDED:
            world.first(lambda: bool(embedded_text(folder)))
        corpus = open_data(recipe, teacher.tokenizer, folder)
        hours = recipe.max_hours if max_hours is None else max_hours
        deadline = None if hours is None else time.monotonic() + 3600 * hours
        track = open_trackers(recipe, folder, progress.note) if world.main else Trackers([], progress.note)
        lock = locks[0] if locks else None
        return Session(recipe, folder, teacher, layers, corpus, progress, resume, deadline, track, lock, engine)
    except BaseException:
        for lock in locks:
            lock.release()
        raise


def _require_packages(recipe: Recipe) -> None:
    """Refuse a recipe that asks for a package which is not installed."""
    for stage in recipe.stages:
        if getattr(stage, "train", None) == "lora":
            require_peft(f"stages.{stage.name}.train")
    require_trackers(recipe)
    if "core" in recipe.eval.suite:
        require_harness()


def pick_device(asked: str) -> str:
    """`cpu` or `cuda`, for `engine.device`.

    Raises:
        MachineError: a GPU is asked for, and there is none.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise MachineError("engine.device: cuda is asked for, but torch sees no GPU. Write engine.device=cpu")
    return asked


def embedded_text(folder: Path) -> Path:
    """The toy text, written below a folder."""
    from .embedded.corpus import write_text

    return write_text(folder / "text" / "embedded.txt")


def open_data(recipe: Recipe, tokenizer: Any, folder: Path) -> Corpus:
    """The corpus that the recipe names."""
    data = recipe.data
    source = data.source
    if source == EMBEDDED:
        source = str(folder / "text" / "embedded.txt")
    share = data.valid if isinstance(data.valid, float) else 0.0
    corpus = open_corpus(
        tokenizer=tokenizer,
        source=source,
        mix=data.mix,
        text=data.text,
        messages=data.messages,
        separator=data.separator,
        split=data.split,
        valid_source=data.valid if isinstance(data.valid, str) else None,
        valid_fraction=share,
    )
    return corpus


def stage_source(recipe: Recipe, corpus: Corpus, stage: Any, seq_len: int, batch: int) -> Source:
    """A stage's batches, from the first one on.

    Args:
        recipe: that the stage belongs to.
        corpus: its data.
        stage: one of its stages.
        seq_len: window.
        batch: sequences of a batch, over all ranks.
    """
    base = recipe.seed if recipe.data.seed is None else recipe.data.seed
    return corpus.train(
        seq_len=seq_len,
        batch=batch,
        # Each stage reads in its own order: the same first documents twice would count for more than others.
        seed=base * 1009 + [s.name for s in recipe.stages].index(stage.name),
        pack=recipe.data.pack,
        shuffle_buffer=recipe.data.shuffle_buffer,
    )


def eval_set(session: Session, tokens: int, seq_len: int | None = None) -> Iterator[Any]:
    """Held-out batches of about `tokens` tokens: whole documents, in windows of min(context, seq_len)."""
    size = window(session.recipe.data.seq_len, session.teacher.context)[0] if seq_len is None else seq_len
    for batch in eval_batches(session.corpus.valid.head(tokens), size, 8):
        beat("the evaluation")
        yield batch
