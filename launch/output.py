"""How the command line speaks: data to stdout, talk to stderr, and numbers that a reader can take in."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..distill.files import finite


def data(text: str) -> None:
    """Write a command's result to stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def only_talk() -> contextlib.AbstractContextManager[Any]:
    """While libraries work: what they print goes to stderr, so that stdout holds the command's data alone."""
    return contextlib.redirect_stdout(sys.stderr)


def data_json(value: Any) -> None:
    """Write a command's result to stdout as JSON; NaN and infinities become null, which JSON can hold."""
    data(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def talk(text: str) -> None:
    """Write to the reader, on stderr."""
    print(text, file=sys.stderr)


def next_command(command: str) -> None:
    """End a command's talk with what to type next."""
    talk(f"Next: {command}")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Aligned columns that `grep` and `awk` can read; never wrapped, numbers to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = []
    for row in cells:
        fitted = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(fitted).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m12s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
