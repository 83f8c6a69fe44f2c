"""More figures of a run, as its report shows them: the layer map, one stage's losses and rates, and what suites say.

Like `plots`: every function writes one PNG, and the same data give the same bytes on one version of matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import _COLOURS, _figure, _legend, _look, _plain_log_ticks, stage_losses
from .tables import bytes_name, context_name, count_name

KEPT = "#333333"
"""Colour of a layer that keeps its attention; mixers have the others in turn."""
MIXERS = _COLOURS[1:]
_ROW = 16  # layers beside each other
_PITCH = 1.25  # from row to row, in squares: numbers stand between
_MODELS = ("teacher", "student")


def layer_map(drawing: str, names: Mapping[str, str], path: str | Path) -> Path:
    """Every layer as a square, the lowest first.

    Args:
        drawing: a letter per layer, as `recipes.layers.LayerMap.drawing` has it.
        names: letter -> what stands there, in the legend's order; `A` is attention.
        path: of the PNG.
    """
    from matplotlib.patches import Patch, Rectangle

    colours = {letter: layer_colour(letter, names) for letter in names}
    columns = min(_ROW, max(len(drawing), 1))
    rows = -(-len(drawing) // columns)
    beside = max(1, columns // 4)
    with _figure(path, 0.46 * columns + 1.6, 0.6 * rows + 0.2 + 0.22 * -(-len(names) // beside)) as figure:
        axes = figure.subplots()
        for layer, letter in enumerate(drawing):
            x, y = layer % columns, _PITCH * (layer // columns)
            axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.78, color=colours[letter]))
            look = {"color": ink(colours[letter]), "fontweight": "bold"}
            axes.text(x + 0.5, y + 0.43, letter, ha="center", va="center", **look)
            axes.text(x + 0.5, y + 1.0, str(layer), ha="center", va="center", color="#555555", fontsize=7)
        axes.set_xlim(0, columns)
        axes.set_ylim(_PITCH * rows, 0)
        axes.set_aspect("equal")
        axes.axis("off")
        handles = [Patch(color=colours[letter], label=f"{letter}  {name}") for letter, name in names.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=beside)
    return Path(path)


def layer_colour(letter: str, names: Mapping[str, str]) -> str:
    """The colour of a letter of the layer map."""
    mixers = [other for other in names if other != "A"]
    return KEPT if letter == "A" else MIXERS[mixers.index(letter) % len(MIXERS)]


def ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour (relative luminance as WCAG 2 defines it)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def stage_curves(records: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """One stage's training and held-out losses, and beside them its learning rates.

    Args:
        records: of metrics.jsonl, that stage's; at least one training step.
        path: of the PNG.

    Raises:
        ValueError: no training step among them.
    """
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise ValueError("nothing to draw: no training step")
    with _figure(path, 8.6, 3.6) as figure:
        losses, rates = figure.subplots(1, 2, width_ratios=(3, 2))
        stage_losses(figure, losses, records)
        losses.set_title("loss")
        if losses.get_legend() is not None:  # many layers have a colour scale instead
            losses.get_legend().remove()
            _legend(figure, losses)
        tokens = [step["tokens"] for step in steps]
        for number, (name, values) in enumerate(_rates(steps).items()):
            colour = _COLOURS[(number + 2) % len(_COLOURS)]
            rates.plot(tokens, values, color=colour, label=name, marker="o" if len(tokens) == 1 else None)
        if rates.dataLim.y1 > 0:
            rates.set_yscale("log")
            _plain_log_ticks(rates)
        rates.xaxis.set_major_formatter(lambda value, _: count_name(value))
        rates.set_xlabel("training tokens")
        rates.set_title("learning rate")
        if len(rates.lines) > 1:
            rates.legend(fontsize=8)
    return Path(path)


def _rates(steps: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Learning rates over the steps, by group; one curve where all groups have the same."""
    every = [step["lr"] if isinstance(step["lr"], list) else [step["lr"]] for step in steps]
    groups = list(map(list, zip(*every, strict=True)))
    names = list(steps[-1].get("grad_norm") or {})
    if len(names) != len(groups):
        names = [f"group {number}" for number in range(len(groups))]
    if all(group == groups[0] for group in groups):
        return {"all": groups[0]}
    return dict(zip(names, groups, strict=True))


def task_bars(tasks: Mapping[str, dict[str, Any]], path: str | Path) -> Path:
    """Benchmark tasks, teacher and student beside each other, with standard errors and what guessing gives.

    Args:
        tasks: name -> `student` and `teacher` ({"value", "stderr"}; the teacher's may be None) and `chance`.
        path: of the PNG.
    """
    shown = [model for model in _MODELS if any(task.get(model) for task in tasks.values())]
    with _figure(path, 7.2, 0.24 * len(shown) * len(tasks) + 0.22 * len(tasks) + 0.9) as figure:
        axes = figure.subplots()
        height = 0.76 / len(shown)
        for row, task in enumerate(tasks.values()):
            for place, model in enumerate(shown):
                own = task.get(model)
                if own:
                    at = row + (place - (len(shown) - 1) / 2) * height
                    axes.barh(
                        at, own["value"], xerr=own.get("stderr"), height=height * 0.92, capsize=2,
                        color=_look(place)["color"], label=model if row == 0 else None,
                    )  # fmt: skip
            if task.get("chance") is not None:
                label = "guessing" if not axes.get_legend_handles_labels()[1].count("guessing") else None
                axes.plot([task["chance"]] * 2, [row - 0.42, row + 0.42], color=_COLOURS[4], lw=2, label=label)
        axes.set_yticks(range(len(tasks)), list(tasks))
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("score")
        _legend(figure, axes)
    return Path(path)


PANELS = (
    ("prefill_tokens_per_second", "reading (tokens/s)", count_name),
    ("decode_tokens_per_second", "writing (tokens/s)", count_name),
    ("peak_bytes", "peak memory", bytes_name),
    ("cache_bytes", "decode cache", bytes_name),
)
"""Figures of `bench model` over the length: key, title and how its ticks are written."""


def over_length(lengths: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Speed and memory of student and teacher over the context, all axes logarithmic.

    Args:
        lengths: `length`, and `student` and `teacher` (or None) with the keys of `PANELS`.
        path: of the PNG.

    Raises:
        ValueError: none of them was measured.
    """
    found = {
        key: {
            model: [(row["length"], row[model][key]) for row in lengths if row.get(model) and row[model].get(key)]
            for model in _MODELS
        }
        for key, _, _ in PANELS
    }
    shown = [panel for panel in PANELS if any(found[panel[0]].values())]
    if not shown:
        raise ValueError("nothing to draw: no length was measured")
    with _figure(path, 8.6, 3.0 * -(-len(shown) // 2)) as figure:
        panels = figure.subplots(-(-len(shown) // 2), 2, squeeze=False).flatten()
        for axes, (key, title, form) in zip(panels, shown, strict=False):
            for number, model in enumerate(_MODELS):
                if found[key][model]:
                    axes.plot(*zip(*found[key][model], strict=True), label=model, **_look(number))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _plain_log_ticks(axes, form)
            ticks = [row["length"] for row in lengths]
            axes.set_xticks(ticks, [context_name(tick) for tick in ticks], fontsize=8)
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel("context (tokens)")
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        panels[0].legend(fontsize=8)
    return Path(path)
