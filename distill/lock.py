"""One run folder, one run: a lock that ends with the process that holds it. Torch-free."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from . import files
from .errors import UserError

LOCK = "run.lock"
_held: dict[Path, RunLock] = {}
_watching_forks = False


class RunLock:
    """The lock on a run folder: `FOLDER/run.lock`, which names its holder and stays there, unlocked, afterwards.

    The kernel holds it (flock; over NFS a byte-range lock), so that a kill, a crash or a reboot ends it: nobody has to
    remove a file. Within a process it is counted, and a forked child does not carry it on.

    Attributes:
        path: the lock file.
        unsupported: why the file system gives no locks; None where it does.
    """

    def __init__(self, folder: Path | str) -> None:
        """Take it.

        Args:
            folder: the run folder; it exists.

        Raises:
            UserError: another process has it; the message names process, host and since when.
            MachineError: the folder cannot be written.
        """
        self.path = (Path(folder) / LOCK).resolve()
        self.unsupported: str | None = None
        self._descriptor: int | None = None
        holder = _held.get(self.path)
        if holder is not None:
            self._count = holder._count
            self._count[0] += 1
            return
        with files.disk_guard(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(_taken(self.path)) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            self.unsupported = error.strerror
            self._count = [1]
            return
        with files.disk_guard(self.path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_me()).encode("utf-8"))
        global _watching_forks
        if not _watching_forks and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_forked)
            _watching_forks = True
        self._descriptor, self._count = descriptor, [1]
        _held[self.path] = self

    def release(self) -> None:
        """Let go of it; a second time does nothing."""
        count, self._count = self._count, [0]
        count[0] -= 1
        first = _held.get(self.path)
        if count[0] == 0 and first is not None and first._descriptor is not None:
            del _held[self.path]
            os.close(first._descriptor)
            first._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _lock(descriptor: int) -> None:
    """Lock without waiting for a run; whoever only looks (`holder`) is gone after an instant."""
    for attempt in range(5):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or attempt == 4:
                raise
            time.sleep(0.02)
    return None


def check_free(folder: Path | str) -> None:
    """Refuse a run folder that another process has, without taking it: before what takes long is loaded.

    Raises:
        UserError: as `RunLock` does.
    """
    path = (Path(folder) / LOCK).resolve()
    if path not in _held and int(os.environ.get("RANK", "0")) == 0 and holder(folder) is not None:
        raise UserError(_taken(path))


def holder(folder: Path | str) -> dict[str, Any] | None:
    """Who has a run folder: `pid`, `host`, `since`; None where nobody does. Takes nothing, and needs no permission."""
    path = (Path(folder) / LOCK).resolve()
    if path in _held:
        return _me()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _said(path) if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    finally:
        os.close(descriptor)
    return None


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _said(path: Path) -> dict[str, Any]:
    """What the lock file says of its holder, who may be about to write it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _taken(path: Path) -> str:
    who = _said(path)
    process = f"process {who.get('pid', '(unknown)')} on {who.get('host', 'a host that it does not name')}"
    since = f", since {who['since']}" if "since" in who else ""
    return (
        f"{path.parent}: in use by another run ({process}{since}), and two would spoil each other's results. Wait for "
        "it or end it, then run the same command with --resume; or choose another folder: --out DIR"
    )


def _forked() -> None:
    """In a child: let go of the descriptors, or the lock would outlive its holder."""
    for lock in _held.values():
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()
