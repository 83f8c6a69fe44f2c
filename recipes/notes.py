"""What a run says is kept: RUN/logs/notes.jsonl, a line for each sentence. The report reads it. Torch-free."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

NOTES = Path("logs") / "notes.jsonl"
"""Inside the run folder: {"time": UTC, "text": as said} per line, over all resumptions."""


class Kept:
    """A `session.Progress` that passes everything on, and writes down every note.

    A disk that is full or gone takes no note and stops nothing: whatever must be written says so itself.
    """

    def __init__(self, told: Any, folder: Path) -> None:
        """`told`: the `Progress` that speaks; `folder`: of the run."""
        self.told, self.path = told, folder / NOTES

    def stage(self, name: str, total_tokens: int | None = None, done_tokens: int = 0, unit: str = "tokens") -> None:
        """A stage begins."""
        self.told.stage(name, total_tokens, done_tokens, unit)

    def update(self, tokens: int, **metrics: float) -> None:
        """So many tokens are done."""
        self.told.update(tokens, **metrics)

    def note(self, text: str) -> None:
        """A sentence to the reader, and to the file."""
        self.told.note(text)
        line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "text": text}, ensure_ascii=False)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def done(self) -> None:
        """The stage ended."""
        self.told.done()
