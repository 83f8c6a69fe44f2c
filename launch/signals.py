"""Exit codes of the console command, and how a run is stopped from outside."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OK, FAILED, USER, MACHINE = 0, 1, 2, 3
STOPPED = 75
"""Exit code of a run that was stopped before its end and goes on with --resume: EX_TEMPFAIL of sysexits.h, "try again".

Whoever asked for it: SIGTERM, SIGUSR1, the first Ctrl-C, or `--max-hours`. Schedulers requeue on it.
"""
INTERRUPTED = 130
"""Exit code of what Ctrl-C ended at once: the last saved step is what there is."""


class Stopped(BaseException):
    """A scheduler's signal came where nothing was under way that has to be saved: while loading or measuring.

    No `Exception`: nothing on the way out may take it for an error to recover from.
    """


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise `Stopped`, inside; a training stage has handlers of its own, which save first."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: nothing to listen to
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
