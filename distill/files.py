"""Writing that a crash, a kill or a full disk cannot turn into half a file. Torch-free."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import MachineError, UserError
from .watchdog import beat

TEMPORARY = ".tmp-"
"""Stands in the name of everything unfinished; readers skip such names, `clean_temporaries` removes them."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_temporary(path: Path) -> bool:
    """True for what an interrupted write may have left behind."""
    return TEMPORARY in path.name


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises:
        MachineError: the disk is full; the old content is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    with disk_guard(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` for text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """`write_bytes` for a value as indented JSON; ValueError for NaN and infinity, which others cannot read."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def commit_directory(path: Path | str, write: Callable[[Path], None], needed: int = 0) -> None:
    """Make a directory appear whole or not at all.

    Args:
        path: the directory; one that exists is replaced.
        write: fills the empty directory that it is given.
        needed: bytes that `write` will write, checked against the free space first and named in the error.

    Raises:
        MachineError: not enough disk space; an existing `path` is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    with disk_guard(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        if needed > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            for file in sorted(temporary.rglob("*")):
                sync(file)
            sync(temporary)
            if path.exists():
                remove_directory(path)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)


def remove_directory(path: Path | str) -> None:
    """Remove a directory so that no reader ever sees a part of it."""
    path = Path(path)
    doomed = path.with_name(f"{path.name}{TEMPORARY}old-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def clean_temporaries(folder: Path | str) -> list[Path]:
    """Remove what interrupted writes left directly inside `folder`, and say what it was."""
    folder = Path(folder)
    found = sorted(entry for entry in folder.iterdir() if is_temporary(entry)) if folder.is_dir() else []
    for entry in found:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return found


def sync(path: Path | str) -> None:
    """Ask the disk to keep a file, or a directory's entries."""
    beat()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_guard(path: Path | str, needed: int = 0) -> Iterator[None]:
    """Turn a full disk or a forbidden folder, inside, into a `MachineError` that names `path` and `needed` bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise MachineError(full_disk(path, needed)) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MachineError(f"{path}: cannot be written ({error.strerror}). Choose another folder") from error
        raise


def full_disk(path: Path | str, needed: int = 0) -> str:
    """The message for a disk without room for `path`."""
    parent = next((p for p in Path(path).absolute().parents if p.exists()), Path("/"))
    wanted = f"{needed:,} bytes needed, " if needed else ""
    return (
        f"{path}: no space left on the disk ({wanted}{shutil.disk_usage(parent).free:,} free). Nothing already "
        "written was harmed. Free some space, then run the same command with --resume"
    )


class MetricsLog:
    """metrics.jsonl: one JSON object per line, appended; cut back to a commit when a run resumes."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with disk_guard(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")

    def append(self, record: dict[str, Any]) -> None:
        """Add a line. Numbers that are not finite become null, so that every reader can read the file."""
        line = (json.dumps(finite(record), ensure_ascii=False) + "\n").encode("utf-8")
        with disk_guard(self.path, len(line)):
            self._file.write(line)
            self._file.flush()

    def offset(self) -> int:
        """Bytes so far, safely on the disk."""
        with disk_guard(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def truncate(self, offset: int) -> None:
        """Forget everything after `offset` bytes.

        Raises:
            UserError: the file is shorter than that: it is not the one that the checkpoint was written with.
        """
        size = os.fstat(self._file.fileno()).st_size
        if size < offset:
            raise UserError(
                f"{self.path}: has {size} bytes, but the checkpoint was written when it had {offset}. Put the run's "
                "own metrics.jsonl back, or start again in a new folder: --out DIR"
            )
        self._file.truncate(offset)
        self._file.seek(offset)

    def truncate_at_stage(self, stage: str) -> None:
        """Forget everything from the first line of `stage` on: what a killed first attempt at it wrote."""
        offset = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line).get("stage") == stage:
                break
            offset += len(line)
        self.truncate(offset)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Unwritten(MetricsLog):
    """What ranks other than 0 write their metrics to: nothing. Every rank has the same numbers."""

    def __init__(self) -> None:
        super().__init__(os.devnull)

    def append(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def offset(self) -> int:
        """Rank 0's counts."""
        return 0

    def truncate(self, offset: int) -> None:
        """Nothing."""

    def truncate_at_stage(self, stage: str) -> None:
        """Nothing."""


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Every whole line of a metrics.jsonl; a last line that a kill cut short is left out."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def finite(value: Any) -> Any:
    """Plain values with None where a number is NaN or infinite, for JSON that others can read."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
