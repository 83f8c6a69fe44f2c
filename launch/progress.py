"""Progress of long work on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from ..recipes.units import format_bytes, format_count
from .output import duration, only_talk

EVERY = 10.0
"""Seconds between two plain lines."""


class Progress:
    """What long work calls to say how far it is.

    The calls, in order, for each stage: `stage(name, total)`, `update(tokens, loss=…)` any number of times, `done()`;
    `note(text)` at any moment. Everything is written to stderr, so that stdout stays data. Used as a context manager it
    leaves the terminal in order, whatever happens inside, and sends what libraries print to stderr as well.

    Args:
        console: where to write; stderr by default.
        every: seconds between two lines where there is no terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self, console: Console | None = None, every: float = EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console if console is not None else Console(stderr=True, highlight=False)
        self.every = every
        self.clock = clock
        self.name = ""
        self.unit = "tokens"
        self.total: int | None = None
        self._tokens = self._first = 0
        self._began = self._spoke = clock()
        self._bar: Bar | None = None
        self._only_talk = only_talk()

    def stage(self, name: str, total_tokens: int | None = None, done_tokens: int = 0, unit: str = "tokens") -> None:
        """Begin a stage.

        Args:
            name: of the stage, as the recipe spells it.
            total_tokens: tokens (or other steps) that it will take; None where that is not known.
            done_tokens: how many of them an earlier session already did; they do not count towards the rate.
            unit: what is counted.
        """
        self._close()
        self.name, self.total, self.unit = name, total_tokens, unit
        self._tokens = self._first = done_tokens
        self._began = self._spoke = self.clock()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description:<12}"), BarColumn(bar_width=24), TextColumn("{task.fields[said]}"))
            bar = Bar(*columns, console=self.console, transient=True)
            bar.add_task(name, total=total_tokens, completed=done_tokens, said="")
            bar.start()
            self._bar = bar
        else:
            size = f": {format_count(total_tokens)} {unit}" if total_tokens else ""
            resumed = f", {format_count(done_tokens)} of them done before" if done_tokens else ""
            self.console.print(f"{name}{size}{resumed}", markup=False, soft_wrap=True)

    def update(self, tokens: int, **metrics: float) -> None:
        """Say how far the stage is.

        Args:
            tokens: done so far in this stage, not since the last call.
            metrics: shown as they are named, e.g. `loss=0.31`.
        """
        self._tokens = tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=tokens, said=self._line(metrics))
        elif self.clock() - self._spoke >= self.every:
            self._spoke = self.clock()
            self.console.print(f"{self.name}  {self._line(metrics)}", markup=False, soft_wrap=True)

    def counted(self, done: int, total: int | None) -> None:
        """`update` for work that learns its total only while it goes."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=total)
        self.update(done)

    def note(self, text: str) -> None:
        """A sentence to the reader: what was loaded, what is slow and why."""
        self.console.print(text, markup=False, soft_wrap=True)

    def done(self) -> None:
        """End the stage with one line: its tokens, time and rate."""
        if not self.name:
            return
        name, tokens, seconds = self.name, self._tokens - self._first, self.clock() - self._began
        self._close()
        work = f"{format_count(tokens)} {self.unit} in " if tokens else ""
        rate = f", {_per_second(tokens / seconds, self.unit)}" if tokens and seconds > 0 else ""
        self.console.print(f"{name} done: {work}{duration(seconds)}{rate}", markup=False, soft_wrap=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self.name = ""

    def _line(self, metrics: dict[str, float]) -> str:
        """`120k/2.00M  8.10k tokens/s  loss 0.1234  1.2 GiB  3m12s left`, as far as it is known."""
        total = f"/{format_count(self.total)}" if self.total else ""
        parts = [f"{format_count(self._tokens)}{total}"]
        elapsed = self.clock() - self._began
        rate = (self._tokens - self._first) / elapsed if elapsed > 0 else 0.0
        if rate:
            parts.append(_per_second(rate, self.unit))
        parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
        parts.append(format_bytes(memory()))
        if rate and self.total:
            parts.append(f"{duration(max(0, self.total - self._tokens) / rate)} left")
        return "  ".join(parts)

    def __enter__(self) -> Progress:
        self._only_talk.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._only_talk.__exit__(kind, error, trace)


def _per_second(rate: float, unit: str) -> str:
    return f"{format_count(float(f'{rate:.3g}'))} {unit}/s"


def memory() -> int:
    """Peak bytes of this process: of the GPU where one is used, else of the machine's memory; 0 where unknown."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
