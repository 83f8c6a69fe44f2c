"""Figure of the suite `long`: perplexity, KL and agreement over the position in the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plots import _figure, _legend, _look, _plain_log_ticks
from .tables import context_name

_NAMES = ("teacher", "student")


def perplexity_by_position(result: dict[str, Any], path: str | Path) -> Path:
    """One PNG: perplexity of each model over the position, and where there is a teacher KL and top-1 agreement.

    A bucket is a point in its (logarithmic) middle with its standard error; what lies beyond the teacher's context has
    a grey ground.

    Args:
        result: of `positions.long_suite`.
        path: of the PNG.
    """
    rows = result["positions"]
    against = any(row["kl"] is not None for row in rows)
    with _figure(path, 4.9 if not against else 10.4, 3.7) as figure:
        panels = figure.subplots(1, 3 if against else 1, squeeze=False)[0]
        _perplexity(panels[0], rows)
        if against:
            for axes, key, factor, title in (
                (panels[1], "kl", 1.0, "KL(teacher || student), nats per token"),
                (panels[2], "top1_agreement", 100.0, "same top token (%)"),
            ):
                shown = [row for row in rows if row[key] is not None]
                _points(
                    axes, shown, [row[key] for row in shown], [row[f"{key}_stderr"] for row in shown], 1, "", factor
                )
                axes.set_title(title, fontweight="normal")
                axes.set_ylim(bottom=0, top=100 if key == "top1_agreement" else None)
        for axes in panels:
            _ground(axes, rows)
        _legend(figure, panels[0])
    return Path(path)


def _perplexity(axes: Any, rows: list[dict[str, Any]]) -> None:
    for number, name in enumerate(_NAMES):
        shown = [row for row in rows if row[name] is not None]
        if shown:
            values = [row[name]["perplexity"] for row in shown]
            _points(axes, shown, values, [row[name]["perplexity_stderr"] for row in shown], number, name)
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    axes.set_title("perplexity", fontweight="normal")


def _points(
    axes: Any,
    rows: list[dict[str, Any]],
    values: list[float],
    errors: list[float | None],
    number: int,
    name: str,
    factor: float = 1.0,
) -> None:
    at = [(max(row["from"], row["to"] / 2) * row["to"]) ** 0.5 for row in rows]
    scaled = [factor * (error or 0.0) for error in errors]
    axes.errorbar(at, [factor * value for value in values], yerr=scaled, capsize=2.5, label=name, **_look(number))


def _ground(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The axis of positions, and what is beyond the context."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    ends = [row["to"] for row in rows]
    shown = ends[:: max(1, -(-len(ends) // 7))] if len(ends) > 7 else ends
    axes.set_xticks(shown, [context_name(end) for end in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ends[0] / 2, ends[-1] * 1.1)
    axes.set_xlabel("position in the text (tokens)")
    beyond = [row["from"] for row in rows if row["beyond_context"]]
    if beyond:
        axes.axvspan(max(beyond[0], ends[0] / 2), ends[-1] * 1.1, color="#eeeeee", linewidth=0, zorder=0)
        axes.set_xlabel("position (tokens); grey: beyond the context")
