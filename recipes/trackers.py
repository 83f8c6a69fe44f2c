"""Where metrics go besides metrics.jsonl: Weights & Biases, TensorBoard. A tracker's trouble never stops a run.

wandb lives in a thread of its own: what it raises is said once, what it makes wait makes nobody else wait, and what it
cannot take in time is dropped. metrics.jsonl has it all.
"""

from __future__ import annotations

import importlib.util
import math
import queue
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ..distill.errors import MachineError
from .schema import Recipe

Say = Callable[[str], None]
Metrics = dict[str, float]

_SKIPPED = ("stage", "step", "fraction", "seconds_left")
_WAITING = 10_000
"""Steps held for a tracker that is slower than the run, at most."""

PATIENCE = 30.0
"""Seconds that a run waits at its end for a tracker to take what is left."""


class Tracker(Protocol):
    """What takes a step's metrics."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take numbers by `STAGE/NAME`; `step` is that of the stage."""

    def close(self) -> None:
        """The run ends."""


class Trackers:
    """All that a recipe asks for; callable with a record of the training loop."""

    def __init__(self, trackers: list[Tracker], say: Say) -> None:
        self.trackers, self._say = trackers, say

    def __call__(self, record: dict[str, Any]) -> None:
        """Send a step's record on."""
        if not self.trackers:
            return
        metrics = flat(record)
        for tracker in list(self.trackers):
            try:
                tracker.log(int(record.get("step", 0)), metrics)
            except Exception as error:
                self.trackers.remove(tracker)
                self._say(_trouble(type(tracker).__name__.lower(), error))

    def close(self) -> None:
        """The run ends: let them finish, and forget them."""
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                self._say(_trouble(type(tracker).__name__.lower(), error))
        self.trackers = []


def open_trackers(recipe: Recipe, folder: Path, say: Say) -> Trackers:
    """The trackers that a recipe names.

    Args:
        recipe: `track` and, for the tracker's own record, all of it.
        folder: the run's; trackers write below it.
        say: takes one sentence about trouble.

    Raises:
        MachineError: a package is missing.
    """
    require_trackers(recipe)
    made: list[Tracker] = []
    if recipe.track.wandb is not None:
        made.append(Wandb(recipe, folder, say))
    if recipe.track.tensorboard:
        made.append(Tensorboard(folder / "tensorboard"))
    return Trackers(made, say)


def require_trackers(recipe: Recipe) -> None:
    """Refuse a recipe whose trackers are not installed, before any work.

    Raises:
        MachineError: a package is missing; names the extra.
    """
    if recipe.track.wandb is not None:
        _require("wandb", "track.wandb", "track.wandb=null")
    if recipe.track.tensorboard:
        _require("tensorboard", "track.tensorboard", "track.tensorboard=false")


def flat(record: dict[str, Any]) -> Metrics:
    """A record's finite numbers by `STAGE/NAME`, with `NAME/PART` for what has parts."""
    found: Metrics = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                visit(f"{name}/{key}", entry)
        elif isinstance(value, list | tuple):
            for number, entry in enumerate(value):
                visit(f"{name}/{number}", entry)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = float(value)

    for key, value in record.items():
        if key not in _SKIPPED:
            visit(f"{record.get('stage', 'run')}/{key}", value)
    return found


class Tensorboard:
    """Event files in a folder, by torch's writer."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: Metrics) -> None:
        """One scalar per number."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run of the folder's name, reached through a thread."""

    def __init__(self, recipe: Recipe, folder: Path, say: Say) -> None:
        self._recipe, self._folder, self._say = recipe, folder, say
        self._queue: queue.Queue[Metrics | None] = queue.Queue(_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand over; what finds no room is counted."""
        try:
            self._queue.put_nowait({**metrics, "step": float(step)})
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait a while for the thread to send the rest."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=PATIENCE)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._say(f"wandb: does not answer; {self._queue.qsize()} records were not sent. {_KEPT}")
        elif self._dropped:
            self._say(f"wandb: was too slow; {self._dropped} records were not sent. {_KEPT}")

    def _work(self) -> None:
        """The thread: open, send until told to end. After trouble it only takes away what comes."""
        ended = False
        try:
            run = self._open()
            while (record := self._queue.get()) is not None:
                run.log(record)
            ended = True
            run.finish()
        except Exception as error:
            self._say(_trouble("wandb", error))
            while not ended:
                ended = self._queue.get() is None

    def _open(self) -> Any:
        import wandb  # pyright: ignore[reportMissingImports]  (an extra)

        name = self._folder.name
        return wandb.init(
            project=self._recipe.track.wandb,
            name=name,
            id=re.sub(r"[^A-Za-z0-9_-]", "-", name)[-64:] or "run",
            resume="allow" if self._recipe.track.wandb_mode == "online" else None,
            mode=self._recipe.track.wandb_mode,
            dir=str(self._folder),
            config=self._recipe.to_dict(),
        )


_KEPT = "The run goes on, and metrics.jsonl has everything"


def _trouble(name: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0]
    return f"{name}: {type(error).__name__}: {reason}. {_KEPT}"


def _require(package: str, key: str, off: str) -> None:
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec: there
        found = True
    if not found:
        raise MachineError(
            f"{key}: the package {package} is not installed. Install it: pip install 'relinear[{package}]', or write "
            f"{off}"
        )
