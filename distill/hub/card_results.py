"""What was measured, for a model card: tables for people, and the Hub's model-index for machines. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Results = dict[str, dict[str, Any]]


class Figure(NamedTuple):
    """One measured number.

    Attributes:
        suite: quick, core, recall, long, generation or mt_bench.
        data: what it was measured on, in words.
        metric: its name.
        value: the student's.
        stderr: its standard error, where there is one.
        teacher: the teacher's value, where that was measured too.
        extra: further cells of the table.
    """

    suite: str
    data: str
    metric: str
    value: float
    stderr: float | None = None
    teacher: float | None = None
    extra: str = ""


SUITES = ("quick", "core", "recall", "long", "generation", "mt_bench", "bench")
"""Names of the files in a results folder."""


_TYPES = {
    "perplexity / teacher's": "perplexity_ratio",
    "KL(teacher, student), nats per token": "kl",
    "same likeliest token, share": "top1_agreement",
}


def read_results(folder: Path) -> Results:
    """What a results folder holds (`relinear eval`, `relinear bench model`); files that cannot be read are left out."""
    found = {}
    for suite in SUITES:
        try:
            value = json.loads((folder / f"{suite}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(value, dict):
            found[suite] = value
    return found


def figures(results: Results) -> list[Figure]:
    """Every figure that the suites' results hold, in the order of the card.

    Args:
        results: suite -> its result, as `relinear eval` stores it.
    """
    makers = {"quick": _quick, "core": _core, "generation": _generation, "mt_bench": _mt_bench, "recall": _recall}
    return [figure for suite, make in makers.items() if suite in results for figure in make(results[suite])]


def _quick(result: dict[str, Any]) -> Iterator[Figure]:
    data = f"held-out text, {result['tokens']:,} tokens"
    student, teacher = result["student"], result.get("teacher") or {}
    yield Figure(
        "quick", data, "perplexity", student["perplexity"], student.get("perplexity_stderr"), teacher.get("perplexity")
    )
    for name, key in _TYPES.items():
        if result.get(key) is not None:
            yield Figure("quick", data, name, result[key], result.get(f"{key}_stderr"))


def _core(result: dict[str, Any]) -> Iterator[Figure]:
    tasks = dict(result.get("tasks", {}))
    if len(tasks) > 1 and result.get("mean"):
        tasks["mean of these tasks"] = result["mean"]
    for name, task in tasks.items():
        recovery = task.get("recovery") or {}
        kept = f"{100 * recovery['value']:.1f} %" if recovery.get("value") is not None else ""
        teacher = (task.get("teacher") or {}).get("value")
        said = f"{name} ({task['n']} questions)" if task.get("n") else name
        student, metric = task["student"], str(task.get("metric", "score"))
        yield Figure("core", said, metric, student["value"], student.get("stderr"), teacher, kept)


def _generation(result: dict[str, Any]) -> Iterator[Figure]:
    for name, task in (result.get("tasks") or {}).items():
        teacher = (task.get("teacher") or {}).get("value")
        student = task["student"]
        yield Figure(
            "generation", name, str(task.get("metric", "score")), student["value"], student.get("stderr"), teacher
        )


def _mt_bench(result: dict[str, Any]) -> Iterator[Figure]:
    student, teacher = result["student"], result.get("teacher") or {}
    data = f"MT-Bench, judged by {result.get('judge', 'an unnamed judge')}"
    yield Figure("mt_bench", data, "score", student["score"], student.get("stderr"), teacher.get("score"))


def _recall(result: dict[str, Any]) -> Iterator[Figure]:
    """Exact answers per task; a task at which the teacher is no better than chance tells nothing and is left out."""
    for name, task in result.get("tasks", {}).items():
        if "exact" in task.get("chance", {}) and "exact" not in task.get("signal", ["exact"]):
            continue
        models = task["models"]
        student = models.get("student") or models.get("model") or {}
        if "exact" in student:
            teacher = (models.get("teacher") or {}).get("exact")
            yield Figure("recall", name, "exact", student["exact"], student.get("exact_stderr"), teacher)


def table(found: list[Figure]) -> list[str]:
    """Figures as a table in Markdown."""
    extra = any(figure.extra for figure in found)
    lines = ["| on | figure | this model | teacher |" + (" recovered |" if extra else "")]
    lines.append("|---|---|---|---|" + ("---|" if extra else ""))
    for figure in found:
        own = f"{figure.value:.4g}" + ("" if figure.stderr is None else f" ± {figure.stderr:.2g}")
        theirs = "" if figure.teacher is None else f"{figure.teacher:.4g}"
        lines.append(
            f"| {figure.data} | {figure.metric} | {own} | {theirs} |" + (f" {figure.extra} |" if extra else "")
        )
    return lines


def long_table(result: dict[str, Any]) -> list[str]:
    """Perplexity by position of the suite `long`."""
    lines = ["| tokens | perplexity | teacher's | KL |", "|---|---|---|---|"]
    for part in result.get("positions", []):
        teacher = (part.get("teacher") or {}).get("perplexity")
        kl = part.get("kl")
        lines.append(
            f"| {part['from']}–{part['to']} | {part['student']['perplexity']:.4g} | "
            f"{'' if teacher is None else f'{teacher:.4g}'} | {'' if kl is None else f'{kl:.3g}'} |"
        )
    return lines


def speed_table(bench: dict[str, Any]) -> list[str]:
    """Speed and memory as `relinear bench model` stored them, student / teacher."""
    keys = {
        "prefill_tokens_per_second": "prefill, tokens/s",
        "decode_tokens_per_second": "decoding, tokens/s",
        "cache_bytes": "cache, bytes",
    }
    lines = ["| tokens of context | " + " | ".join(keys.values()) + " |", "|---|" + "---|" * len(keys)]
    for row in bench.get("lengths", []):
        cells = []
        for key in keys:
            own, theirs = (row.get("student") or {}).get(key), (row.get("teacher") or {}).get(key)
            both = [f"{value:,.0f}" for value in (own, theirs) if value is not None]
            cells.append(" / ".join(both))
        lines.append(f"| {row['length']} | " + " | ".join(cells) + " |")
    return lines


def model_index(name: str, found: list[Figure], text: str) -> list[dict[str, Any]]:
    """The Hub's `model-index`.

    Args:
        name: of the model.
        found: figures.
        text: what the held-out text is called.
    """
    metrics: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figure in found:
        dataset = text if figure.suite == "quick" else figure.data.partition(" (")[0]
        kind = _TYPES.get(figure.metric) or _slug(figure.metric)
        metrics.setdefault((figure.suite, dataset), []).append(
            {"type": kind, "value": round(figure.value, 6), "name": figure.metric, "verified": False}
        )
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": f"relinear/{_slug(suite)}", "name": dataset},
            "metrics": held,
        }
        for (suite, dataset), held in metrics.items()
    ]
    return [{"name": name, "results": results}] if results else []


def _slug(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
