"""Results of the suites as text for stdout. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...eval import core_table, recall_table
from ..output import table


def shown(suite: str, result: dict[str, Any]) -> str:
    """A suite's result as a table, and what a reader should know of it."""
    made: dict[str, Callable[[dict[str, Any]], str]] = {
        "quick": fidelity_table,
        "recall": recall_table.to_text,
        "core": core_table.to_text,
        "long": long_table,
        "generation": generation_table,
        "mt_bench": mt_bench_table,
    }
    return "\n".join([made[suite](result), *(f"Note: {note}" for note in result.get("notes") or ())])


def fidelity_table(result: dict[str, Any]) -> str:
    """Each figure of the suite quick with its standard error; without a teacher the model's own alone."""
    found: dict[str, tuple[float, float | None]] = {}
    for side in ("teacher", "student"):
        if side in result:
            found[f"{side} perplexity"] = result[side]["perplexity"], result[side].get("perplexity_stderr")
    for name in ("perplexity_ratio", "kl", "top1_agreement"):
        if name in result:
            found[name] = result[name], result.get(f"{name}_stderr")
    rows = [(name, f"{value:.4f}", "" if error is None else f"± {error:.4f}") for name, (value, error) in found.items()]
    return table([*rows, ("tokens", str(result["tokens"]), "")], ("figure", "value", "stderr"))


def long_table(result: dict[str, Any]) -> str:
    """Perplexity, KL and agreement, a line per range of positions."""
    rows = []
    for row in result["positions"]:
        sides = [row.get(side) or {} for side in ("teacher", "student")]
        perplexities = [_figure(side.get("perplexity"), side.get("perplexity_stderr"), 3) for side in sides]
        kl = _figure(row["kl"], row.get("kl_stderr"), 4)
        agreement = _figure(row["top1_agreement"], row.get("top1_agreement_stderr"), 4)
        note = "beyond the context" if row.get("beyond_context") else ""
        rows.append((f"{row['from']}-{row['to'] - 1}", row["tokens"], *perplexities, kl, agreement, note))
    header = ("positions", "tokens", "teacher perplexity", "student perplexity", "kl", "top1_agreement", "")
    return table(rows, header)


def generation_table(result: dict[str, Any]) -> str:
    """Exact answers task by task, completions beside the teacher's, repetition."""
    parts = []
    if result["tasks"]:
        rows = [
            (name, task["n"], *map(_percent, (task["teacher"], task["student"])))
            for name, task in result["tasks"].items()
        ]
        parts.append("Answers that are right, percent:\n\n" + table(rows, ("task", "questions", "teacher", "student")))
    completion = result["completion"]
    if completion is not None:
        rows = [
            ("tokens until the first other one", _figure(*_pair(completion["common_prefix"]), 2)),
            ("share of tokens that agree", _figure(*_pair(completion["agreement"]), 4)),
        ]
        parts.append(f"{completion['n']} completions beside the teacher's:\n\n" + table(rows, ("figure", "value")))
    repetition = result["repetition"]
    if repetition is not None:
        kinds = {name: own for name in ("text", "teacher", "student") if (own := repetition.get(name)) is not None}
        names = ("distinct_1", "distinct_2", "distinct_4", "loops")
        rows = [(name, *(_any(own[name]) for own in kinds.values())) for name in names]
        parts.append("Repetition (different 1-, 2- and 4-grams; loops):\n\n" + table(rows, ("figure", *kinds)))
    return "\n\n".join(parts) or "nothing was measured"


def mt_bench_table(result: dict[str, Any]) -> str:
    """Marks by category; without a judge where the answers are."""
    if result["judge"] is None:
        places = [
            f"{name}: {made['questions']} questions answered, {made['file']}"
            for name, made in result["answers"].items()
        ]
        return "\n".join(["no judge was named, so nothing is marked", *places])
    sides = [side for side in ("teacher", "student") if result.get(side) is not None]
    lines = {**result["categories"], "all": {side: result[side] for side in sides}}
    rows = [(name, *(_mark(by.get(side)) for side in sides)) for name, by in lines.items()]
    return f"Marks from 1 to 10 by {result['judge']}:\n\n" + table(rows, ("category", *sides))


def _mark(of: dict[str, Any] | None) -> str:
    return "" if of is None else _figure(of["score"], of["stderr"], 2)


def _pair(of: dict[str, Any]) -> tuple[float | None, float | None]:
    return of["value"], of["stderr"]


def _any(of: Any) -> str:
    return _figure(*_pair(of), 3) if isinstance(of, dict) else _figure(of, None, 3)


def _percent(of: dict[str, Any] | None) -> str:
    if of is None or of["value"] is None:
        return ""
    return _figure(100 * of["value"], None if of["stderr"] is None else 100 * of["stderr"], 1)


def _figure(value: float | None, stderr: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
