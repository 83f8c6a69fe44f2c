"""Figures of a run: loss curves, recall over distance, cache over context, and what fidelity was lost.

Every function writes one PNG and returns its path. The same data give the same bytes on one version of matplotlib:
the user's matplotlibrc is not read, nothing is dated, and no window system is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from ..distill import files
from ..distill.files import read_metrics
from .tables import Row, bytes_name, context_name, count_name

# Okabe and Ito's colours, distinguishable without red-green vision. The first model is the reference: near black.
_COLOURS = ("#333333", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE = {
    "figure.dpi": 150,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


_MANY_LAYERS = 8  # beyond it, layers are told apart by a colour scale instead of a legend
_BRIGHTEST = 0.92  # of viridis: its last yellow is too pale on white
_SMOOTH = 25  # a curve is a moving mean over so many-th of its points


def loss_curves(metrics: str | Path | Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Training losses over tokens, one panel per stage, logarithmic: every layer of align, every term of glue.

    Lines are moving means over a twenty-fifth of the points; points are losses on held-out text where they were
    evaluated, of every layer and of glue's KL. Glue also shows every training loss, pale.

    Args:
        metrics: a run's metrics.jsonl, or its records.
        path: of the PNG.

    Raises:
        ValueError: no training step in the metrics.
    """
    records = read_metrics(metrics) if isinstance(metrics, (str, Path)) else list(metrics)
    steps = [record for record in records if "loss" in record]
    stages = list(dict.fromkeys(record["stage"] for record in steps))
    if not stages:
        raise ValueError("nothing to draw: the metrics hold no training step")
    with _figure(path, 0.6 + 4.6 * len(stages), 3.6) as figure:
        for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
            stage_losses(figure, axes, [record for record in records if record["stage"] == stage])
            axes.set_title(stage)
    return Path(path)


def stage_losses(figure: Any, axes: Any, records: Sequence[dict[str, Any]]) -> None:
    """One stage's losses over its tokens, in given axes; `records` are that stage's, with at least one step."""
    steps = [record for record in records if "loss" in record]
    layers = [name for name in steps[-1]["losses"] if name.startswith("layer ")]
    if layers:
        _layer_lines(figure, axes, steps, layers, [r for r in records if r.get("eval", {}).get("losses")])
        axes.set_ylabel("loss on the teacher's layer output")
    else:
        _term_lines(axes, steps, [r for r in records if r.get("eval", {}).get("kl") is not None])
        axes.set_ylabel("loss (nats per token)")
    if axes.dataLim.y1 > 0:  # a conversion of no layer loses nothing, which has no logarithm
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.xaxis.set_major_formatter(lambda value, _: count_name(value))
    axes.set_xlabel("training tokens")


def _layer_lines(
    figure: Any, axes: Any, records: list[dict[str, Any]], layers: list[str], evaluated: list[dict[str, Any]]
) -> None:
    """One line per layer, dark below and light above; held-out losses as points of the same colour."""
    import matplotlib
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    numbers = [int(name.removeprefix("layer ")) for name in layers]
    low, high = min(numbers), max(*numbers, min(numbers) + 1)
    colours = matplotlib.colormaps["viridis"]
    for name, number in zip(layers, numbers, strict=True):
        tokens, values = _series(records, lambda record, name=name: record["losses"].get(name))
        colour = colours((number - low) / (high - low) * _BRIGHTEST)
        _line(axes, tokens, values, color=colour, label=name, linewidth=1.3)
        tokens, values = _series(evaluated, lambda record, name=name: record["eval"]["losses"].get(name))
        if tokens:
            axes.plot(tokens, values, "o", color=colour, markersize=4)
    if len(layers) > _MANY_LAYERS:
        shown = ListedColormap(colours(np.linspace(0, _BRIGHTEST, 256)))
        figure.colorbar(ScalarMappable(Normalize(low, high), shown), ax=axes, label="layer", pad=0.02)
    else:
        axes.legend(fontsize=8, ncols=2 if len(layers) > 4 else 1)


def _term_lines(axes: Any, records: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> None:
    """The loss and, if it is a mix, its terms; held-out KL as points."""
    names = {"kl": "KL", "reverse_kl": "reverse KL", "ce": "cross-entropy"}
    terms = list(records[-1]["losses"])
    wanted = {names.get(term, term): (lambda record, term=term: record["losses"].get(term)) for term in terms}
    if len(terms) != 1:
        wanted = {"loss": lambda record: record["loss"], **wanted}
    for number, (name, pick) in enumerate(wanted.items()):
        tokens, values = _series(records, pick)
        colour = _COLOURS[(number + 2) % len(_COLOURS)]
        axes.plot(tokens, values, color=colour, alpha=0.22, linewidth=0.8)
        _line(axes, tokens, values, color=colour, label=f"{name}, training")
    if evaluated:
        tokens, values = _series(evaluated, lambda record: record["eval"]["kl"])
        axes.plot(tokens, values, "o", color=_COLOURS[1], label="KL, held-out text", zorder=3)
    axes.legend(fontsize=8)


def _line(axes: Any, tokens: list[int], values: list[float], **look: Any) -> None:
    """A smoothed curve; a single point as a point."""
    axes.plot(tokens, _smooth(values), marker="o" if len(values) == 1 else None, **look)


def _series(records: list[dict[str, Any]], pick: Any) -> tuple[list[int], list[float]]:
    """(tokens, values) of the records that have the value."""
    found = [(record["tokens"], pick(record)) for record in records]
    kept = [(tokens, value) for tokens, value in found if value is not None]
    return [tokens for tokens, _ in kept], [value for _, value in kept]


def _smooth(values: list[float]) -> list[float]:
    """Moving mean. Near the start, where losses fall steeply, the window shrinks; at the end it keeps what it has."""
    half = len(values) // _SMOOTH // 2
    parts = (values[max(0, i - min(half, i)) : i + min(half, i) + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _plain_log_ticks(axes: Any, form: Any = "{:g}".format) -> None:
    """Numbers instead of powers of ten, and enough of them where the axis spans less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if math.log10(high / low) < 1.6 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def recall_by_distance(rows: Sequence[Row], path: str | Path) -> Path:
    """Recall accuracy of each model over the distance to the fact, with standard errors.

    Raises:
        ValueError: no row has a recall measurement.
    """
    shown = _having(rows, "recall")
    with _figure(path, 6.4, 3.8) as figure:
        axes = figure.subplots()
        ticks = sorted({d for _, row in shown for d in row.recall})
        for place, (number, row) in enumerate(shown):
            distances = sorted(row.recall)
            values = [100 * row.recall[d][0] for d in distances]
            errors = [100 * (row.recall[d][1] or 0.0) for d in distances]
            # Side by side, so that models that recall everything do not hide each other.
            aside = (place - (len(shown) - 1) / 2) * 0.009 * (ticks[-1] - ticks[0])
            at = [distance + aside for distance in distances]
            axes.errorbar(at, values, yerr=errors, capsize=2.5, label=row.name, **_look(number))
        axes.set_ylim(-4, 104)
        axes.set_xticks(ticks)
        axes.set_xlabel("distance from the last fact to the questions (tokens)")
        axes.set_ylabel("facts recalled exactly (%)")
        _legend(figure, axes)
    return Path(path)


def cache_over_length(rows: Sequence[Row], path: str | Path) -> Path:
    """Bytes of the decode cache of each model over the context, both axes logarithmic.

    Raises:
        ValueError: no row has cache sizes.
    """
    from matplotlib.ticker import NullLocator

    shown = _having(rows, "cache_bytes")
    with _figure(path, 6.4, 3.8) as figure:
        axes = figure.subplots()
        ends = []
        for number, row in shown:
            contexts = sorted(row.cache_bytes)
            axes.plot(contexts, [row.cache_bytes[c] for c in contexts], label=row.name, **_look(number))
            ends.append((row.cache_bytes[contexts[-1]], contexts[-1], _COLOURS[number % len(_COLOURS)]))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({c for _, row in shown for c in row.cache_bytes})
        axes.set_xticks(ticks, [context_name(c) for c in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        _plain_log_ticks(axes, bytes_name)
        axes.set_xlim(right=ticks[-1] * (ticks[-1] / ticks[0]) ** 0.16 if len(ticks) > 1 else None)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel("decode cache of one sequence")
        _legend(figure, axes)
        _label_ends(axes, ends)
    return Path(path)


def fidelity_bars(rows: Sequence[Row], path: str | Path) -> Path:
    """Two panels of bars: how far each student's perplexity lies above the teacher's, and its KL to the teacher.

    Rows without a ratio (the teacher's own) are not drawn.

    Raises:
        ValueError: no row was measured against a teacher.
    """
    shown = _having(rows, "ratio")
    panels = (
        ("perplexity above the teacher's (%)", lambda row: _scaled(row.ratio, 100.0, -1.0), 2),
        ("KL(teacher || student), nats per token", lambda row: _scaled(row.kl, 1.0, 0.0), 4),
    )
    with _figure(path, 7.6, 0.62 * len(shown) + 1.1) as figure:
        both = figure.subplots(1, 2, sharey=True)
        for axes, (title, pick, digits) in zip(both, panels, strict=True):
            values = [pick(row) for _, row in shown]
            for place, ((number, _), (value, error)) in enumerate(zip(shown, values, strict=True)):
                axes.barh(place, value, xerr=error, height=0.55, color=_COLOURS[number % len(_COLOURS)], capsize=3)
                tip = max(value, 0.0) + (error or 0.0)
                label = f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
                axes.annotate(label, (tip, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
            low = min(0.0, *(v - (e or 0.0) for v, e in values))
            high = max(0.0, *(v + (e or 0.0) for v, e in values))
            axes.set_xlim(low * 1.1, (high or 1.0) * 1.75)
            axes.axvline(0, color="#333333", linewidth=0.8)
            axes.grid(axis="y", visible=False)
            axes.set_title(title, fontweight="normal")
        both[0].set_yticks(range(len(shown)), [row.name for _, row in shown])
        both[0].set_ylim(len(shown) - 0.5, -0.5)
    return Path(path)


def calibration_errors(rows: dict[str, dict[str, Any]], path: str | Path) -> Path:
    """Two panels by layer: the error of the layers' outputs at every state, and how far back each head looks.

    Args:
        rows: layer -> `random`, `transfer`, `calibrated`, `aligned` (None where not measured) and `distance`, one mean
            number of tokens per head: calibrate.json's `layers`.
        path: of the PNG.

    Raises:
        ValueError: no layer.
    """
    if not rows:
        raise ValueError("nothing to draw: no layer was calibrated")
    layers = [int(layer) for layer in rows]
    with _figure(path, 8.6, 3.6) as figure:
        errors, distances = figure.subplots(1, 2, width_ratios=(3, 2))
        for number, kind in enumerate(("random", "transfer", "calibrated", "aligned")):
            known = [
                (layer, row[kind]) for layer, row in zip(layers, rows.values(), strict=True) if row[kind] is not None
            ]
            if known:
                errors.plot(*zip(*known, strict=True), label=kind, **_look(number))
        errors.set_ylim(bottom=0)
        errors.set_ylabel("error of the output, relative to its norm")
        errors.set_title("layer outputs on held-out tokens")
        _legend(figure, errors)
        for layer, row in zip(layers, rows.values(), strict=True):
            at = [max(distance, 0.1) for distance in row["distance"]]
            distances.plot([layer] * len(at), at, "o", color=_COLOURS[2], alpha=0.6, markersize=4)
        distances.set_yscale("log")
        _plain_log_ticks(distances)
        distances.set_ylabel("mean distance (tokens)")
        distances.set_title("what each head looks at")
        for axes in (errors, distances):
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
    return Path(path)


def _scaled(value: tuple[float, float | None] | None, factor: float, shift: float) -> tuple[float, float | None]:
    if value is None:
        return math.nan, None
    return (value[0] + shift) * factor, None if value[1] is None else value[1] * factor


def _having(rows: Sequence[Row], what: str) -> list[tuple[int, Row]]:
    """(number, row) of the rows in which a figure was measured; a model's number gives its colour in every plot."""
    shown = [(number, row) for number, row in enumerate(rows) if getattr(row, what)]
    if not shown:
        raise ValueError(f"nothing to draw: no row has {what}")
    return shown


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _legend(figure: Any, axes: Any) -> None:
    """The names above the axes, where no curve can be; as many beside each other as fit."""
    handles, names = axes.get_legend_handles_labels()
    columns = int(figure.get_figwidth() * 11) // (max(map(len, names)) + 6)
    columns = max(1, min(columns, len(names)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(names) / columns) - 1))
    figure.legend(handles, names, loc="outside upper center", ncols=columns)


def _label_ends(axes: Any, ends: list[tuple[float, float, str]]) -> None:
    """Write each curve's last value beside it, once, never closer together than a line of text."""
    axes.figure.canvas.draw()  # fixes the scale that the pixel positions below refer to
    floor = -math.inf
    labelled = set()
    for value, at, colour in sorted(ends):
        if bytes_name(value) in labelled:
            continue
        labelled.add(bytes_name(value))
        _, height = axes.transData.transform((at, value))
        shift = max(0.0, floor - height)
        points = shift * 72 / axes.figure.dpi
        axes.annotate(
            bytes_name(value), (at, value), (7, points), textcoords="offset points", va="center", color=colour, size=8.5
        )
        floor = height + shift + 11 * axes.figure.dpi / 72


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure of `width` by `height` inches in our style, written to `path` as PNG at the end."""
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        drawn = BytesIO()
        figure.savefig(drawn, format="png", metadata={"Software": None})
        files.write_bytes(path, drawn.getvalue())


def layer_scores(methods: Sequence[dict[str, Any]], path: str | Path, uniform: Sequence[int] = ()) -> Path:
    """Scores of every layer, one panel per selection method, with standard errors; chosen layers are filled.

    Args:
        methods: scores files as `relinear select` writes them: `method`, `scores`, `stderr`, `chosen`, `higher_is`.
        path: of the PNG.
        uniform: layers that an even spread keeps, marked by grey bands.

    Raises:
        ValueError: no method.
    """
    from matplotlib.ticker import MaxNLocator

    if not methods:
        raise ValueError("nothing to draw: no method")
    columns = min(3, len(methods))
    rows = math.ceil(len(methods) / columns)
    layers = list(range(len(methods[0]["scores"])))
    size = max(2.0, 6.0 - len(layers) / 12)
    with _figure(path, 0.4 + (2.6 + 0.03 * len(layers)) * columns, 0.2 + 2.3 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for number, (axes, method) in enumerate(zip(panels, methods, strict=False)):
            values = [method["scores"][str(layer)] for layer in layers]
            errors = None if method["stderr"] is None else [method["stderr"][str(layer)] for layer in layers]
            colour = _COLOURS[(number + 1) % len(_COLOURS)]
            for layer in uniform:
                axes.axvspan(layer - 0.3, layer + 0.3, color="#efefef", linewidth=0, zorder=0)
            axes.errorbar(layers, values, yerr=errors, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2)
            fill = [colour if layer in method["chosen"] else "white" for layer in layers]
            axes.scatter(layers, values, s=size**2, c=fill, edgecolors=colour, linewidths=1.1, zorder=3)
            axes.set_title(method["method"] + ("" if method.get("signal", True) else " (noise)"))
            axes.set_xlabel(f"layer (high: {method['higher_is']})", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels[len(methods) :]:
            axes.set_visible(False)
    return Path(path)
