"""Heat-maps of the recall suite: length over depth, distance over pairs; every model of a task side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plots import _figure
from .tables import context_name

_MAP = "viridis"
_DARK = 0.6  # cells below it take white figures


def heatmaps(result: dict[str, Any], folder: str | Path) -> list[Path]:
    """One PNG per task, `FOLDER/recall-TASK.png`, of exact answers in percent.

    Args:
        result: of `suite.recall_suite`.
        folder: made if it does not exist.
    """
    return [heatmap(name, task, Path(folder) / f"recall-{name}.png") for name, task in result["tasks"].items()]


def heatmap(name: str, task: dict[str, Any], path: Path) -> Path:
    """One task of the suite as a PNG: `task` as `suite.recall_suite` gives it under `name`."""
    across, up = task["axes"]
    models = task["models"]
    cells = next(iter(models.values()))["cells"]
    columns, rows = sorted({cell[across] for cell in cells}), sorted({cell[up] for cell in cells})
    width, height = max(1.9, 0.62 * len(columns) + 0.5), max(1.0, 0.42 * len(rows))
    title = f"{name}: {task['about']}"
    if "exact" not in task["signal"]:
        title += f"\nnoise: the {next(iter(models))} is at chance"
    with _figure(path, max(width * len(models) + 1.4, 5.2), height + 1.5) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        image = None
        for axes, (model, values) in zip(panels, models.items(), strict=True):
            held = {(cell[across], cell[up]): cell["exact"] for cell in values["cells"]}
            grid = [[held.get((x, y), float("nan")) for x in columns] for y in rows]
            image = axes.imshow(grid, cmap=_MAP, vmin=0, vmax=1, aspect="auto")
            for (x, y), value in held.items():
                ink = "white" if value < _DARK else "black"
                at = (columns.index(x), rows.index(y))
                axes.text(*at, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=8.5)
            axes.set_xticks(range(len(columns)), [_name(across, x) for x in columns])
            axes.set_yticks(range(len(rows)), [_name(up, y) for y in rows])
            axes.set_xlabel(_label(across))
            axes.set_title(model, fontweight="normal")
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        panels[0].set_ylabel(_label(up))
        bar = figure.colorbar(image, ax=list(panels), pad=0.02, fraction=0.15 / len(models), label="exact answers")
        bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    return path


def _label(axis: str) -> str:
    units = {"length": "length (tokens)", "distance": "distance (tokens)", "share": "share of the common word"}
    return units.get(axis, axis)


def _name(axis: str, value: float) -> str:
    if axis in ("length", "distance"):
        return context_name(int(value)) if value >= 2048 else str(int(value))
    return f"{100 * value:.0f} %" if axis in ("depth", "share") else str(int(value))
