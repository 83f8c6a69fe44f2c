"""The suite core as a table: one line per task, models side by side, what is recovered. Torch-free."""

from __future__ import annotations

from typing import Any

COLUMNS = ("task", "figure", "documents", "chance", "teacher", "student", "recovery", "above chance")


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A line per task, subtasks of groups left out, and the mean; scores and recoveries in percent.

    Args:
        result: of `core.core_suite`, or another with such "tasks".
    """
    tasks: dict[str, Any] = dict(result["tasks"])
    if result.get("mean") is not None and len(tasks) > 1:
        tasks["mean"] = result["mean"]
    return [_row(name, task) for name, task in tasks.items()]


def to_text(result: dict[str, Any]) -> str:
    """The table as lines of plain text, without columns that no task fills."""
    lines = [list(COLUMNS), *rows(result)]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    text = "\n".join("  ".join(line[i].ljust(widths[i]) for i in kept).rstrip() for line in lines)
    limit = result.get("limit")
    note = "" if limit is None else f"\n\nThe first {limit} documents of each task: not comparable with whole tasks."
    return f"Percent ± standard error:\n\n{text}{note}"


def _row(name: str, task: dict[str, Any]) -> list[str]:
    scale = 100 if _share(task) else 1
    metric = task["metric"] + (f", {task['filter']}" if task.get("filter") else "")
    return [
        name,
        metric if scale == 100 else f"{metric} (no percentage)",
        str(task["n"]),
        "" if task.get("chance") is None else f"{100 * task['chance']:.1f}",
        _cell(task["teacher"], scale),
        _cell(task["student"], scale),
        _cell(task.get("recovery"), 100),
        _cell(task.get("recovery_above_chance"), 100),
    ]


def _share(task: dict[str, Any]) -> bool:
    """Whether the scores are shares from 0 to 1; perplexities are not."""
    return task.get("higher_is_better", True) and 0 <= task["student"]["value"] <= 1


def _cell(of: dict[str, Any] | None, scale: float) -> str:
    if of is None or of["value"] is None:
        return ""
    error = "" if of["stderr"] is None else f" ± {scale * of['stderr']:.1f}"
    return f"{scale * of['value']:.1f}{error}"
