"""The recall suite's result as a table: one line per task and figure, one column per model. Torch-free."""

from __future__ import annotations

from typing import Any

NAMES = {
    "exact": "exact",
    "credit": "leading part right",
    "choice": "right choice",
    "generated exact": "generated, exact",
    "generated credit": "generated, leading part",
}


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) in percent with standard errors; the last column says where a figure is noise.

    Args:
        result: of `suite.recall_suite`.
    """
    models = list(next(iter(result["tasks"].values()))["models"])
    header = ["task", "figure", "chance", *models, ""]
    rows = []
    for name, task in result["tasks"].items():
        for figure, label in NAMES.items():
            cells = [_cell(values, figure) for values in task["models"].values()]
            if not any(cells) or (figure.endswith("credit") and not _partial(task, figure)):
                continue
            kind = figure.removeprefix("generated ")
            chance = f"{100 * task['chance'][kind]:.1f}" if kind in task["chance"] else ""
            noise = kind in task["chance"] and kind not in task["signal"]
            note = f"noise: the {models[0]} is at chance" if noise else ""
            rows.append([name, label, chance, *cells, note])
    return header, rows


def to_text(result: dict[str, Any]) -> str:
    """The table as lines of plain text, and what its figures are."""
    header, rows = table(result)
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "Recall, percent of answers ± standard error:\n\n" + "\n".join(lines)


def _figures(values: dict[str, Any], figure: str) -> tuple[dict[str, Any], str]:
    kind = figure.removeprefix("generated ")
    return (values.get("generated", {}) if kind != figure else values), kind


def _cell(values: dict[str, Any], figure: str) -> str:
    own, kind = _figures(values, figure)
    return f"{100 * own[kind]:.1f} ± {100 * own[kind + '_stderr']:.1f}" if kind in own else ""


def _partial(task: dict[str, Any], figure: str) -> bool:
    """Some answer was right in its beginning only, in any model."""
    for values in task["models"].values():
        own, _ = _figures(values, figure)
        if own and own["credit"] != own["exact"]:
            return True
    return False
