"""Counting what is done, for whoever shows progress. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None], None]


class Meter:
    """Calls `progress(done, total)` whenever more is done; None: nobody asks."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, more: int) -> None:
        """So much more."""
        self.reach(self.done + more)

    def reach(self, done: int) -> None:
        """So much in all."""
        self.done = done
        if self.progress is not None:
            self.progress(self.done, self.total)
