"""Figures of `bench methods`: how fast each procedure comes near the teacher, and where it ends.

As `plots`: one PNG each, the same data give the same bytes on one version of matplotlib.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .plots import _COLOURS, _MARKERS, _figure
from .tables import count_name

_LEAST = 1e-3  # a ratio of one has no logarithm of its distance


def curves(groups: dict[str, Any], target: float, path: str | Path) -> Path:
    """Held-out perplexity above the teacher's over all training tokens, one panel per group, bands from seed to seed.

    Args:
        groups: group -> {"arms": rows with "arm" and "curves" (one per seed: points with tokens and ratio)}.
        target: ratio drawn as a line.
        path: of the PNG.

    Raises:
        ValueError: no curve has a point.
    """
    shown = {name: group for name, group in groups.items() if any(any(row["curves"]) for row in group["arms"])}
    if not shown:
        raise ValueError("nothing to draw: no curve has a point")
    with _figure(path, 0.8 + 5.4 * len(shown), 4.6) as figure:
        for axes, (name, group) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            for number, row in enumerate(group["arms"]):
                _band(axes, row, number)
            axes.axhline(target - 1, color="#333333", linewidth=0.9, linestyle="--")
            axes.annotate(f"{target:g} ×", (1, target - 1), (-2, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", fontsize=8, ha="right")  # fmt: skip
            _scales(axes, _first(group))
            axes.set_xlabel("training tokens, align and glue together")
            axes.set_ylabel("perplexity over the teacher's")
            axes.set_title(name)
            axes.legend(fontsize=7.5, ncols=2)
    return Path(path)


def _scales(axes: Any, first: float) -> None:
    """Logarithmic over tokens and over the distance from one; ticks are the values themselves."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axes.set_yscale("log")
    axes.set_xscale("symlog", linthresh=first, linscale=0.4)
    last = axes.get_xlim()[1]
    axes.set_xlim(0, last)
    steps = [size * 10**power for power in range(9) for size in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([0, *(step for step in steps if first <= step <= last)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_name(value)))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    low, high = axes.get_ylim()
    ratios = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
    axes.yaxis.set_major_locator(FixedLocator([ratio - 1 for ratio in ratios if low <= ratio - 1 <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 + value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(FixedLocator([]))


def _first(group: dict[str, Any]) -> float:
    """The earliest tokens at which anything was measured after training began."""
    found = [p["tokens"] for row in group["arms"] for curve in row["curves"] for p in curve if p["tokens"]]
    return float(min(found, default=1))


def _band(axes: Any, row: dict[str, Any], number: int) -> None:
    """Mean over seeds as a line, least to most as a band; where seeds were measured at different tokens, each alone."""
    seeds = [[(p["tokens"], max(p["ratio"] - 1, _LEAST)) for p in curve] for curve in row["curves"] if curve]
    look = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": ("-", "--", ":")[number // len(_COLOURS) % 3]}
    same = len({len(points) for points in seeds}) == 1
    if not same:
        for place, points in enumerate(seeds):
            axes.plot(*zip(*points, strict=True), label=row["arm"] if place == 0 else None, linewidth=1.2, **look)
        return
    columns = list(zip(*seeds, strict=True))
    tokens = [sum(t for t, _ in column) / len(column) for column in columns]
    values = [[value for _, value in column] for column in columns]
    middle = [math.exp(sum(map(math.log, column)) / len(column)) for column in values]
    axes.plot(tokens, middle, label=row["arm"], linewidth=1.4, **look)
    axes.fill_between(
        tokens, list(map(min, values)), list(map(max, values)), color=look["color"], alpha=0.15, linewidth=0
    )


def final_kl(groups: dict[str, Any], path: str | Path) -> Path:
    """Final KL to the teacher with errors over seeds, one panel per group; what is tied with the first is filled.

    Args:
        groups: group -> {"arms": rows with "arm" and "kl": {"mean", "stderr"}, "kl": standings with "tied"}.
        path: of the PNG.

    Raises:
        ValueError: no group.
    """
    if not groups:
        raise ValueError("nothing to draw: no arm was measured")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    height = 0.9 + 0.36 * max(len(group["arms"]) for group in groups.values())
    with _figure(path, 0.8 + 4.6 * len(groups), height) as figure:
        for axes, (name, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
            for place, (row, standing) in enumerate(zip(group["arms"], group["kl"], strict=True)):
                value, error = row["kl"]["mean"], row["kl"]["stderr"]
                tied = standing["tied"]
                axes.errorbar(
                    value, place, xerr=error, color=_COLOURS[2 if tied else 0], marker=_MARKERS[0], capsize=3,
                    markerfacecolor=None if tied else "white", linestyle="none",
                )  # fmt: skip
                label = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
                axes.annotate(label, (value, place), (9, 0), textcoords="offset points", va="center", fontsize=7.5)
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.set_xlim(low, high * (high / low) ** 0.45)
            axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_yticks(range(len(group["arms"])), [row["arm"] for row in group["arms"]])
            axes.set_ylim(len(group["arms"]) - 0.5, -0.5)
            axes.set_xlabel("final KL, nats per token; filled: first or tied")
            axes.set_title(name)
    return Path(path)
