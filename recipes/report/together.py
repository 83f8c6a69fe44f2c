"""Several runs beside each other; of a quickstart's folder also its summary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...eval import plots, tables
from .blocks import Block, Chapter, Notice, Picture, Section, Table
from .read import Run
from .verdict import beside

KEY = "together"


def chapter(runs: Sequence[tuple[str, Run]], summary: Path | None) -> Chapter:
    """The chapter that compares.

    Args:
        runs: by key.
        summary: a quickstart's summary.json, which need not exist.
    """
    blocks: list[Block] = [beside(runs)]
    if summary is not None and summary.exists():
        try:
            blocks += list(_summary(json.loads(summary.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            blocks.append(Notice(f"{summary.name} cannot be read ({error!r})."))
    lead = f"Runs: {', '.join(str(run.folder) for _, run in runs)}."
    return Chapter(KEY, "Beside each other", lead, [Section("runs", "The verdict of each", blocks)])


def _summary(summary: dict[str, Any]) -> Iterator[Block]:
    """The table that a quickstart ends with, and its figures."""
    rows = tables.from_json(summary["rows"])
    lines = [[label, *cells] for group in tables.grouped(rows) for label, cells in group]
    yield Table("What was lost and what was won", ["", *(row.name for row in rows)], lines)
    yield Picture(
        "recall.png",
        partial(plots.recall_by_distance, rows),
        f"Recall over the distance to the fact, of {', '.join(row.name for row in rows)}",
    )
    yield Picture(
        "cache.png",
        partial(plots.cache_over_length, rows),
        f"Bytes of the decode cache over the context, of {', '.join(row.name for row in rows)}",
    )
    yield Picture(
        "fidelity.png",
        partial(plots.fidelity_bars, rows),
        "How far each student's perplexity lies above the teacher's, and its KL to the teacher",
    )
