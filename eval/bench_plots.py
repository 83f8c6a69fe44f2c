"""Figures of `bench model`: prefill, decoding and memory over the context, teacher and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plots import _figure, _label_ends, _legend, _look, _plain_log_ticks
from .tables import bytes_name, context_name, count_name

_SIDES = ("teacher", "student")


def bench_plots(result: dict[str, Any], folder: str | Path) -> list[Path]:
    """bench-prefill.png, bench-decode.png and bench-memory.png in `folder`; all axes logarithmic.

    Args:
        result: of `bench_results.bench`.
        folder: made if it does not exist.
    """
    rows, folder = result["lengths"], Path(folder)
    return [
        _lines(rows, "prefill_tokens_per_second", "prefill (tokens per second)", folder / "bench-prefill.png"),
        _lines(rows, "decode_tokens_per_second", "decoding (tokens per second, batch 1)", folder / "bench-decode.png"),
        _memory(rows, folder / "bench-memory.png"),
    ]


def _lines(rows: list[dict[str, Any]], key: str, label: str, path: Path) -> Path:
    """Medians with the range over the turns."""
    with _figure(path, 6.4, 3.8) as figure:
        axes = figure.subplots()
        for number, side in enumerate(_SIDES):
            shown = [row for row in rows if row[side] is not None]
            if shown:
                at, values = [row["length"] for row in shown], [row[side][key] for row in shown]
                low = [v - row[side][f"{key}_min"] for v, row in zip(values, shown, strict=True)]
                high = [row[side][f"{key}_max"] - v for v, row in zip(values, shown, strict=True)]
                axes.errorbar(at, values, yerr=(low, high), capsize=2.5, label=side, **_look(number))
        _scale(axes, count_name)
        _contexts(axes, rows)
        axes.set_ylabel(label)
        _legend(figure, axes)
    return path


def _memory(rows: list[dict[str, Any]], path: Path) -> Path:
    """Peak (lines) and cache of one sequence (dashes)."""
    with _figure(path, 7.6, 4.0) as figure:
        axes = figure.subplots()
        ends = []
        for number, side in enumerate(_SIDES):
            shown = [row for row in rows if row[side] is not None]
            for key, name, style in (("peak_bytes", "peak", "-"), ("cache_bytes", "cache", "--")):
                if shown:
                    at, values = [row["length"] for row in shown], [row[side][key] for row in shown]
                    look = _look(number)
                    axes.plot(at, values, linestyle=style, label=f"{side}, {name}", **look)
                    ends.append((values[-1], at[-1], look["color"]))
        _scale(axes, bytes_name)
        _contexts(axes, rows, room=0.16)
        axes.set_ylabel("bytes")
        _legend(figure, axes)
        _label_ends(axes, ends)
    return path


def _scale(axes: Any, form: Any) -> None:
    """A logarithmic axis, marked at 1, 2 and 5 where it spans less than two decades."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    _plain_log_ticks(axes, form)
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=12))


def _contexts(axes: Any, rows: list[dict[str, Any]], room: float = 0.04) -> None:
    """The axis of lengths; what lies beyond the teacher's context has a grey ground."""
    from matplotlib.ticker import NullLocator

    at = [row["length"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [context_name(length) for length in at])
    axes.xaxis.set_minor_locator(NullLocator())
    span = at[-1] / at[0] if len(at) > 1 else 2.0
    left, right = at[0] / span**0.04, at[-1] * span**room
    axes.set_xlim(left, right)
    axes.set_xlabel("context (tokens)")
    beyond = [row["length"] for row in rows if row["beyond_context"]]
    if beyond:
        inside = [length for length in at if length < beyond[0]]
        axes.axvspan((inside[-1] * beyond[0]) ** 0.5 if inside else left, right, color="#eeeeee", linewidth=0, zorder=0)
        axes.set_xlabel("context (tokens); grey: beyond the teacher's")
