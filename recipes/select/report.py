"""What `relinear select` prints. Torch-free."""

from __future__ import annotations

from typing import Any

from ..layers import ranges
from .methods import METHODS


def text(result: dict[str, Any]) -> str:
    """The result as tables that fit a terminal: methods, chosen sets, scores by layer, agreement, and what to know."""
    keep, methods = result["keep"], result["methods"]
    parts = [
        f"{keep} of {len(next(iter(methods.values()))['scores'])} layers keep their attention: "
        f"{ranges(result['chosen'])} by {result['decides']}",
        _methods(result),
        _sets(result),
        _layers(methods),
    ]
    if result["agreement"]:
        parts.append(_agreement(result))
    parts.append("\n".join(_sentences(result)))
    return "\n\n".join(part for part in parts if part)


def _sentences(result: dict[str, Any]) -> list[str]:
    """What to know, each sentence once, with the methods that it is said of."""
    said: dict[str, list[str]] = {note: [] for note in result["notes"]}
    for name, scores in result["methods"].items():
        close = [scores["close_call"]] if scores["close_call"] and scores["signal"] else []
        for note in (*scores["notes"], *close):
            said.setdefault(note, []).append(name)
    return [f"{', '.join(names)}: {note}" if names else note for note, names in said.items()]


def _methods(result: dict[str, Any]) -> str:
    rows = [("method", "keeps", "seconds", "of CPU", "a score is")]
    for name, scores in result["methods"].items():
        times = (f"{scores['seconds']:.1f}", f"{scores['cpu_seconds']:.1f}")
        rows.append((name, ranges(scores["chosen"]), *times, METHODS[name].what))
    return _table(rows, right={2, 3})


def _sets(result: dict[str, Any]) -> str:
    recalled = any("recall" in row for row in result["sets"])
    rows = [("kept", "KL of the aligned student", "less uniform's", *(["recall"] if recalled else []), "chosen by")]
    for row in result["sets"]:
        own = "uniform" in row["methods"]
        against = "–" if own else _value(row["against_uniform"], row["against_uniform_stderr"], 4)
        recall = [_value(row["recall"], row["recall_stderr"], 3)] if recalled else []
        kl = _value(row["kl"], row["kl_stderr"], 4)
        rows.append((ranges(row["layers"]), kl, against, *recall, ", ".join(row["methods"])))
    return _table(rows, right={1, 2, 3} if recalled else {1, 2})


def _layers(methods: dict[str, Any]) -> str:
    """One row per layer, one column per method that measured something; * marks what a method keeps."""
    shown = {name: scores for name, scores in methods.items() if METHODS[name].needs != "nothing"}
    if not shown:
        return ""
    rows = [("layer", *shown)]
    for layer in range(len(next(iter(shown.values()))["scores"])):
        cells = []
        for scores in shown.values():
            error = None if scores["stderr"] is None else scores["stderr"][str(layer)]
            mark = "*" if layer in scores["chosen"] else " "
            cells.append(_value(scores["scores"][str(layer)], error, 3) + mark)
        rows.append((str(layer), *cells))
    return _table(rows, right=set(range(len(rows[0]))))


def _agreement(result: dict[str, Any]) -> str:
    """Kendall's tau below the diagonal, how many of the chosen layers two methods share above it."""
    pairs = {tuple(row["methods"]): row for row in result["agreement"]}
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    rows = [("agreement", *(str(i + 1) for i in range(len(names))))]
    for i, name in enumerate(names):
        cells = []
        for j, other in enumerate(names):
            row = pairs.get((name, other)) or pairs.get((other, name))
            if row is None:
                cells.append("·")
            elif j > i:
                cells.append(f"{len(row['shared'])}/{result['keep']}")
            else:
                cells.append("–" if row["kendall"] is None else f"{row['kendall']:+.2f}")
        rows.append((f"{i + 1} {name}", *cells))
    said = "below the diagonal Kendall's tau of all layers, above it how many of the chosen layers are shared"
    return _table(rows, right=set(range(1, len(names) + 1))) + f"\n{said}"


def _value(value: float, error: float | None, digits: int) -> str:
    size = f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"
    return size if error is None else f"{size} ± {error:.{digits}f}"


def _table(rows: list[tuple[str, ...]], right: set[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
