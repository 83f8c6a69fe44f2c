"""One table of what was lost and what was won: models side by side, as terminal text, Markdown and JSON.

Torch-free. Models are the columns and figures the lines, so that three or four models fit a terminal of 80 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Estimate = tuple[float, float | None]


@dataclass(frozen=True)
class Row:
    """What was measured of one model. None (or an empty dict) stands for what was not measured.

    Attributes:
        name: as shown, e.g. `teacher`, `all-linear`, `hybrid (keeps 3)`.
        perplexity, ratio, kl, agreement: (value, standard error); ratio to the teacher's perplexity, KL(teacher ||
            model) in nats per token, agreement of the likeliest token as a share from 0 to 1.
        recall: distance in tokens -> (accuracy from 0 to 1, standard error).
        cache_bytes: context in tokens -> bytes of the decode cache.
        tokens: training tokens spent on it.
        seconds: training time spent on it.
    """

    name: str
    perplexity: Estimate | None = None
    ratio: Estimate | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None
    recall: dict[int, Estimate] = field(default_factory=dict)
    cache_bytes: dict[int, int] = field(default_factory=dict)
    tokens: int | None = None
    seconds: float | None = None

    @classmethod
    def of_teacher(cls, name: str, fidelity: dict[str, Any], **measured: Any) -> Row:
        """The teacher's row. Arguments as for `of_student`; any student's fidelity serves."""
        model = fidelity["teacher"]
        perplexity = (model["perplexity"], model["perplexity_stderr"])
        return cls(name, perplexity, **_measured(**measured))

    @classmethod
    def of_student(cls, name: str, fidelity: dict[str, Any], **measured: Any) -> Row:
        """A student's row.

        Args:
            name: as shown.
            fidelity: result of `fidelity.measure` or `fidelity.compare` against the teacher.
            measured: `recall` (result of `recall.recall`), `cache_bytes` (of `cache.cache_bytes`), `tokens`, `seconds`.
        """
        model = fidelity["student"]
        named = {"ratio": "perplexity_ratio", "kl": "kl", "agreement": "top1_agreement"}
        against = {
            ours: (fidelity[theirs], fidelity[f"{theirs}_stderr"])
            for ours, theirs in named.items()
            if theirs in fidelity
        }
        perplexity = (model["perplexity"], model["perplexity_stderr"])
        return cls(name, perplexity, **against, **_measured(**measured))


def _measured(
    recall: dict[str, Any] | None = None,
    cache_bytes: dict[int, int] | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    by_distance = (recall or {}).get("by_distance", {})
    return {
        "recall": {int(distance): (cell["accuracy"], cell["stderr"]) for distance, cell in by_distance.items()},
        "cache_bytes": dict(cache_bytes or {}),
        "tokens": tokens,
        "seconds": seconds,
    }


def summary_table(rows: Sequence[Row], title: str | None = None) -> Any:
    """A rich table: one column per row given, one line per figure that any of them has. Print it with a rich Console.

    The first row is what cache sizes are compared with.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row.name, justify="right")
    for group in grouped(rows):
        for label, cells in group:
            table.add_row(label, *cells)
        table.add_section()
    return table


def to_text(rows: Sequence[Row], title: str | None = None, width: int = 100) -> str:
    """The table as plain text without colours, `width` columns wide at most."""
    from rich.console import Console

    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(summary_table(rows, title))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()) + "\n"


def to_markdown(rows: Sequence[Row]) -> str:
    """The table as GitHub Markdown."""
    lines = [["", *(row.name for row in rows)], ["---", *("---:" for _ in rows)]]
    lines += [[label, *cells] for group in grouped(rows) for label, cells in group]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values: every estimate is {"value", "stderr"}, and the keys of dicts are strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return {"value": value[0], "stderr": value[1]}
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in sorted(value.items())}
        return value

    return [{key: plain(value) for key, value in asdict(row).items()} for row in rows]


def from_json(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows that `to_json` made plain values of."""

    def estimate(entry: dict[str, Any] | None) -> Estimate | None:
        return None if entry is None else (entry["value"], entry["stderr"])

    return [
        Row(
            row["name"],
            *(estimate(row[key]) for key in ("perplexity", "ratio", "kl", "agreement")),
            recall={int(distance): (one["value"], one["stderr"]) for distance, one in row["recall"].items()},
            cache_bytes={int(context): size for context, size in row["cache_bytes"].items()},
            tokens=row["tokens"],
            seconds=row["seconds"],
        )
        for row in rows
    ]


def grouped(rows: Sequence[Row]) -> list[list[tuple[str, list[str]]]]:
    """The table's lines as texts, in groups that belong together: (label, one cell per model)."""

    def line(label: str, cells: list[str]) -> list[tuple[str, list[str]]]:
        return [(label, cells)] if any(cell != "–" for cell in cells) else []

    fidelity = [
        *line("perplexity", [_estimate(row.perplexity, 3) for row in rows]),
        *line("perplexity / teacher's", [_estimate(row.ratio, 4) for row in rows]),
        *line("KL to teacher (nats/token)", [_estimate(row.kl, 4) for row in rows]),
        *line("same top token", [_percent(row.agreement) for row in rows]),
    ]
    distances = sorted({distance for row in rows for distance in row.recall})
    recall = [
        entry
        for distance in distances
        for entry in line(f"recall across {distance} tokens", [_percent(row.recall.get(distance)) for row in rows])
    ]
    contexts = sorted({context for row in rows for context in row.cache_bytes})
    cache = [
        entry
        for context in contexts
        for entry in line(
            f"cache at {context_name(context)} tokens",
            [_cache(row.cache_bytes.get(context), rows[0].cache_bytes.get(context)) for row in rows],
        )
    ]
    spent = [
        *line("training tokens", ["–" if row.tokens is None else count_name(row.tokens) for row in rows]),
        *line("training time", ["–" if row.seconds is None else time_name(row.seconds) for row in rows]),
    ]
    return [group for group in (fidelity, recall, cache, spent) if group]


def _estimate(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value[0]:.{digits}f}" + ("" if value[1] is None else f" ± {value[1]:.{digits}f}")


def _percent(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value[0]:.1f}" + ("" if value[1] is None else f" ± {100 * value[1]:.1f}") + " %"


def _cache(value: int | None, reference: int | None) -> str:
    if value is None:
        return "–"
    if not reference or not value or value == reference:
        return bytes_name(value)
    factor = reference / value
    return f"{bytes_name(value)} (÷{factor:.{0 if factor >= 10 else 1}f})"


def bytes_name(value: float) -> str:
    """Bytes with a decimal unit and three digits: 131 kB, 2.10 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return _three_digits(value, unit)
        value /= 1000
    return _three_digits(value, "TB")


def count_name(value: float) -> str:
    """A count with a decimal suffix: 512, 64k, 2M, 1.25B."""
    for suffix in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g}B"


def context_name(tokens: int) -> str:
    """A context length: 1k for 1024, 32k for 32768, else the number."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def time_name(seconds: float) -> str:
    """42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _three_digits(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"
