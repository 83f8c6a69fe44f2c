"""Lines of JSON that are kept one by one, so that a stop loses none of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from ..distill.errors import UserError
from ..distill.files import MetricsLog


class Lines:
    """A .jsonl file that grows by whole lines, each on the disk before the next is made.

    A last line that a kill cut short is taken off when the file is opened.

    Attributes:
        records: what the file holds.

    Raises:
        UserError: a whole line is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.records.append(json.loads(line))
            except ValueError:
                raise UserError(f"{path}:{number}: not JSON; correct or remove the line, then repeat") from None
        self._log = MetricsLog(path)
        self._log.truncate(len(whole) + 1 if whole else 0)

    def append(self, record: dict[str, Any]) -> None:
        """Keep one more."""
        self._log.append(record)
        self._log.offset()
        self.records.append(record)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._log.close()


class Memory(Lines):
    """The same without a file."""

    def __init__(self) -> None:
        self.records = []

    def append(self, record: dict[str, Any]) -> None:
        """Keep one more."""
        self.records.append(record)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing to close."""
