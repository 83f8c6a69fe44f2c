"""One of a run's processes: whether it talks, how it tells an error, and what it does when its launcher is gone.

RANK and WORLD_SIZE are set by whoever starts the processes: `launch.processes`, torchrun, or another launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator


def size() -> int:
    """Processes of the run that this one belongs to; 1 where no launcher said otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them; 0 talks."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def launched() -> bool:
    """Started by `launch.processes`, which says errors and keeps a log for every rank."""
    return bool(os.environ.get("RELINEAR_LAUNCHER"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ranks other than 0 say nothing on a terminal that all share; into a log of their own they may."""
    if rank() == 0 or launched():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def report_error(text: str, code: int, known: bool) -> bool:
    """Leave an error where the launcher finds it, in the form of torch's elastic launcher.

    Args:
        text: the message, without `error: `.
        code: exit code that it leads to.
        known: one of relinear's own errors; others may be the echo of another rank's end.

    Returns:
        True where the launcher will say it, so that this process need not.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    extra = {"timestamp": str(int(time.time())), "time": time.time(), "known": known}
    message = {"message": text, "extraInfo": extra, "errorCode": code}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)
    except OSError:
        return False
    return launched()


def watch_launcher() -> None:
    """Save and stop when the launcher dies, even by `kill -9`: its end of this process's stdin closes then."""
    if not launched():
        return

    def wait() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 1024):
                pass
        with contextlib.suppress(OSError, ValueError):
            if rank() == 0:  # its stderr went through the launcher: who writes there now would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            print("the launcher is gone: saving and stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="launcher").start()
