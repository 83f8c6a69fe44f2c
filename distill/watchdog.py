"""A process that makes no progress is ended, and says first where it stood. Torch-free."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

EXIT_CODE = 1
"""Of a process that was ended: the work failed (as `RunFailed`)."""

_GRACE = 1.5
"""Times the time limit after which Python's C code ends a process whose threads cannot run Python any more."""

_running: Watchdog | None = None


def beat(doing: str | None = None) -> None:
    """Say that this process is alive: something was done, or begins. Costs next to nothing where no watchdog runs.

    Args:
        doing: what begins, for the message of a process that is ended.
    """
    if _running is not None:
        _running.beat(doing)


@contextmanager
def waiting() -> Iterator[None]:
    """While this rank waits for another one's work by design, however long that takes: the other one's watchdog runs.

    How long is bounded by the process group's own limit.
    """
    mine = _running
    if mine is None:
        yield
        return
    mine.paused += 1
    try:
        yield
    finally:
        mine.paused -= 1
        mine.beat()


class Watchdog:
    """Ends the process with the stacks of all its threads in a file, where it was not told of progress for a while.

    A thread counts; `faulthandler` stands behind it, in C, for a process that hangs with Python's lock held. Time in
    which the whole process was stopped (SIGSTOP, a suspended machine) does not count.

    Attributes:
        path: where the stacks go.
        paused: above 0 time does not count.
    """

    def __init__(
        self, seconds: float, folder: Path | str, rank: int = 0, end: Callable[[int], object] = os._exit
    ) -> None:
        """Make one; `with` starts it.

        Args:
            seconds: without progress, until the process is ended.
            folder: for the stacks: `hung-rank-RANK.txt` is written there.
            rank: of this process.
            end: ends the process with an exit code.
        """
        self.seconds, self.rank, self.paused = seconds, rank, 0
        self.path = Path(folder) / f"hung-rank-{rank}.txt"
        self._end = end
        self._beats = 0
        self._doing = "the start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: TextIO | None = None

    def beat(self, doing: str | None = None) -> None:
        """There was progress."""
        self._beats += 1
        if doing is not None:
            self._doing = doing

    def __enter__(self) -> Watchdog:
        global _running
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        self._outer, _running = _running, self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _running
        _running = self._outer
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
        with suppress(OSError):
            if not self.path.stat().st_size:  # nothing hung
                self.path.unlink()

    def _watch(self) -> None:
        wait = min(5.0, self.seconds / 8)
        seen, still, last = -1, 0.0, time.monotonic()
        while True:
            assert self._file is not None
            faulthandler.dump_traceback_later(max(self.seconds * _GRACE, 4 * wait), exit=True, file=self._file)
            if self._stop.wait(wait):
                return
            now = time.monotonic()
            passed, last = min(now - last, 2 * wait), now
            still = 0.0 if self._beats != seen or self.paused else still + passed
            seen = self._beats
            if still >= self.seconds:
                self._fire(still)
                return

    def _fire(self, still: float) -> None:
        """Say it, write the stacks, end."""
        faulthandler.cancel_dump_traceback_later()
        text = (
            f"error: rank {self.rank} (process {os.getpid()}) has made no progress for {still:.0f} s in {self._doing} "
            f"(engine.timeout). Where each of its threads stands: {self.path}. The process ends now; what was saved "
            "stays: go on with --resume, with a longer engine.timeout if it was only slow"
        )
        if self._file is not None:
            with suppress(OSError, ValueError):
                self._file.write(text + "\n\n")
                self._file.flush()
                faulthandler.dump_traceback(file=self._file, all_threads=True)
                self._file.flush()
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
        self._end(EXIT_CODE)
