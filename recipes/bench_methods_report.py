"""What the jobs of `bench methods` found, put together: one summary, from which table, page and plots are made.

Torch-free. Nothing here is written by hand: who is first, what is tied and what was not reached is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..distill.files import write_json, write_text
from . import bench_methods_arms as arms
from .bench_methods_stats import TARGET, Mean, mean, said, standings, tokens_to
from .units import format_bytes, format_count

OURS = {"linear": "relinear", "window": "relinear_window", "hybrid": "relinear_hybrid"}
"""The arm of each group that is relinear's default."""

AGAINST = "radlads"
"""Whose tokens to the target ours are compared with."""

SMALL = "relinear_no_conv"
"""Our default with a state as small as theirs."""


def summary(results: Sequence[dict[str, Any]], target: float = TARGET) -> dict[str, Any]:
    """Results by teacher and group.

    Args:
        results: as `bench_methods.results` reads them.
        target: ratio to the teacher's perplexity that curves are read at.

    Returns:
        {"target", "teachers": {name: {group: {"arms": [...], "kl": standings, "recall": standings or None, "said":
        sentences}}}, "failed": [{"arm", "seed", "teacher", "error"}]}; arms in order of their KL.
    """
    failed = [
        {key: entry.get(key) for key in ("arm", "seed", "teacher", "error")}
        for entry in results
        if entry["status"] != "complete"
    ]
    done = [entry for entry in results if entry["status"] == "complete"]
    teachers: dict[str, Any] = {}
    for teacher in dict.fromkeys(entry["teacher"] for entry in done):
        groups = {}
        for group in arms.GROUPS:
            mine = [entry for entry in done if entry["teacher"] == teacher and entry["group"] == group]
            if mine:
                groups[group] = _group(group, mine, target)
        teachers[teacher] = groups
    return {"target": target, "teachers": teachers, "failed": failed}


def _group(group: str, results: list[dict[str, Any]], target: float) -> dict[str, Any]:
    names = list(dict.fromkeys(entry["arm"] for entry in results))
    by_arm = {name: [entry for entry in results if entry["arm"] == name] for name in names}
    kl = {name: mean([e["fidelity"]["kl"] for e in found], _document_error(found)) for name, found in by_arm.items()}
    place = standings(kl)
    rows = {name: _arm(name, found, target) for name, found in by_arm.items()}
    recall = {
        name: mean([e["recall"]["accuracy"] for e in found], found[0]["recall"]["stderr"])
        for name, found in by_arm.items()
        if all("recall" in e for e in found)
    }
    remembered = standings(recall, lower=False) if recall else None
    sentences = [f"final KL: {said(place, OURS[group])}"] if OURS[group] in by_arm else []
    if remembered and OURS[group] in recall:
        sentences.append(f"recall: {said(remembered, OURS[group])}")
    sentences += _equal_state(rows, kl)
    sentences += _speed(rows, OURS[group], target)
    sentences += [line for name in names for line in _window(name, by_arm[name])]
    return {
        "arms": [rows[standing.name] for standing in place],
        "kl": [asdict(standing) for standing in place],
        "recall": remembered and [asdict(standing) for standing in remembered],
        "said": sentences,
    }


def _equal_state(rows: dict[str, dict[str, Any]], kl: dict[str, Mean]) -> list[str]:
    """How ours without its convolution stands among the arms that carry no more than `AGAINST` does."""
    if AGAINST not in rows or SMALL not in rows:
        return []
    limit = rows[AGAINST]["state_bytes"]
    found = said(standings({name: kl[name] for name, row in rows.items() if row["state_bytes"] <= limit}), SMALL)
    return [f"final KL of arms that carry at most {format_bytes(limit)} a layer: {found}"] if found else []


def _document_error(found: list[dict[str, Any]]) -> float | None:
    """The error over documents, for an arm with one seed."""
    return found[0]["fidelity"]["kl_stderr"]


def _arm(name: str, found: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """An arm's row: means over its seeds."""
    first = found[0]
    reached = [tokens_to(entry["curve"], target) for entry in found]
    inside = [value for value in reached if value is not None]
    times = mean(inside) if inside and len(inside) == len(reached) else None
    row: dict[str, Any] = {
        "arm": name,
        "title": arms.header(name)["title"],
        "seeds": [entry["seed"] for entry in found],
        "tokens": round(mean([float(entry["tokens"]) for entry in found]).value),
        "cap": min(entry["tokens"] for entry in found),
        "calibration_tokens": first["calibration_tokens"],
        "state_bytes": first["state_bytes"],
        "window_bytes": first["window_bytes"],
        "window": first["window"],
        "kept": first["kept"],
        "rates": first["rates"],
        "to_target": {
            "values": reached,
            "reached": len(inside),
            "mean": None if times is None else times.value,
            "stderr": None if times is None else times.stderr,
        },
        "seconds": round(mean([float(entry["seconds"]) for entry in found]).value),
        "curves": [entry["curve"] for entry in found],
    }
    for key, source in (("ratio", "perplexity_ratio"), ("kl", "kl"), ("agreement", "top1_agreement")):
        made = mean([entry["fidelity"][source] for entry in found], first["fidelity"][f"{source}_stderr"])
        row[key] = {"mean": made.value, "stderr": made.stderr}
        row[key]["documents_stderr"] = first["fidelity"][f"{source}_stderr"]
    starts = [entry["curve"][0]["ratio"] for entry in found if entry["curve"] and entry["curve"][0]["tokens"] == 0]
    row["start_ratio"] = mean(starts).value if starts else None
    row["recall"] = None
    if all("recall" in entry for entry in found):
        made = mean([entry["recall"]["accuracy"] for entry in found], first["recall"]["stderr"])
        row["recall"] = {"mean": made.value, "stderr": made.stderr}
    return row


def _speed(rows: dict[str, dict[str, Any]], ours: str, target: float) -> list[str]:
    """Tokens to the target against `AGAINST`, where both took part."""
    if ours not in rows or AGAINST not in rows:
        return []
    mine, other = rows[ours]["to_target"], rows[AGAINST]["to_target"]
    if mine["mean"] is None:
        return [f"tokens to {target:g}: {ours} reaches it with {mine['reached']} of {_seeds(rows[ours])} seeds"]
    if other["mean"] is None:
        least = mine["mean"] / rows[AGAINST]["cap"]
        return [
            f"tokens to {target:g}: {ours} needs {_tokens(mine['mean'])}, {AGAINST} does not reach it with every seed "
            f"within {_tokens(rows[AGAINST]['cap'])}: less than {least:.2f} of its tokens"
        ]
    share = mine["mean"] / other["mean"]
    needs = f"{ours} needs {_tokens(mine['mean'])}, {AGAINST} {_tokens(other['mean'])}"
    return [f"tokens to {target:g}: {needs}: {share:.2f} of its tokens"]


def _seeds(row: dict[str, Any]) -> int:
    return len(row["seeds"])


def _window(name: str, found: list[dict[str, Any]]) -> list[str]:
    """Whether a windowed student is better than its own window: by KL, and by recall beyond what windows reach."""
    with_branches = [entry for entry in found if "branches" in entry]
    if not with_branches:
        return []
    pairs = [(entry["branches"]["both"], entry["branches"]["window"]) for entry in with_branches]
    gain = [alone["kl"] - both["kl"] for both, alone in pairs]
    error = mean(gain, max(pairs[0][0]["kl_stderr"] or 0.0, pairs[0][1]["kl_stderr"] or 0.0))
    verdict = _verdict(error.value, error.stderr)
    lines = [f"{name}: KL {_pair(pairs, 'kl')} with its linear branch and without; {verdict}"]
    far = [(_far(both, entry["reach"]), _far(alone, entry["reach"])) for entry, (both, alone) in
           zip(with_branches, pairs, strict=True) if "recall" in both]  # fmt: skip
    if far and all(both is not None and alone is not None for both, alone in far):
        made = mean([both[0] - alone[0] for both, alone in far], max(far[0][0][1], far[0][1][1]))  # pyright: ignore[reportOptionalSubscript]
        values = " and ".join(f"{sum(pair[side][0] for pair in far) / len(far):.2f}" for side in (0, 1))  # pyright: ignore[reportOptionalSubscript]
        reach = with_branches[0]["reach"]
        lines.append(
            f"{name}: recall {values} over more than {reach} tokens, with its linear branch and without; "
            f"{_verdict(made.value, made.stderr)}"
        )
    return lines


def _pair(pairs: list[tuple[dict[str, Any], dict[str, Any]]], what: str) -> str:
    return " and ".join(f"{sum(pair[side][what] for pair in pairs) / len(pairs):.4f}" for side in (0, 1))


def _far(branch: dict[str, Any], reach: int) -> tuple[float, float] | None:
    """(accuracy, standard error) over the cells whose distance windows cannot bridge."""
    cells = [cell for cell in branch["recall"]["cells"] if cell["distance"] >= reach]
    if not cells:
        return None
    asked = sum(cell["n"] for cell in cells)
    value = sum(cell["accuracy"] * cell["n"] for cell in cells) / asked
    return value, sum((cell["stderr"] * cell["n"] / asked) ** 2 for cell in cells) ** 0.5


def _verdict(gain: float, error: float | None) -> str:
    """A gain in words."""
    if not error:
        return "the linear branch helps" if gain > 0 else "the linear branch does not help"
    size = gain / error
    if size > 2:
        return f"the linear branch helps ({size:.1f} standard errors)"
    return f"no gain beyond two standard errors ({size:.1f})"


COLUMNS = ("arm", "tokens to target", "ratio", "KL", "", "recall", "before training", "carried", "kept", "training")


def rows(group: dict[str, Any]) -> list[tuple[str, ...]]:
    """A group's table: cells for `COLUMNS`, one line per arm, the best KL first."""
    found = []
    for row, standing in zip(group["arms"], group["kl"], strict=True):
        mark = "first" if standing["difference"] == 0 else "tied" if standing["tied"] else _behind(standing)
        start = row["start_ratio"]
        found.append(
            (
                row["arm"],
                _reached(row),
                _pm(row["ratio"], 3),
                _pm(row["kl"], 4),
                mark,
                "" if row["recall"] is None else _pm(row["recall"], 3),
                "" if start is None else f"{start:.2f}" if start < 100 else f"{start:.0f}",
                _carried(row),
                ",".join(map(str, row["kept"])),
                f"{row['seconds']}s",
            )
        )
    return found


def _behind(standing: dict[str, Any]) -> str:
    errors = standing["errors"]
    return "" if errors is None else "behind" if errors == float("inf") else f"+{errors:.1f} se"


def _reached(row: dict[str, Any]) -> str:
    to = row["to_target"]
    if to["mean"] is not None:
        return _tokens(to["mean"]) + ("" if to["stderr"] is None else f" ± {_tokens(to['stderr'])}")
    some = f" ({to['reached']} of {_seeds(row)} seeds)" if to["reached"] else ""
    return f"not within {_tokens(row['cap'])}{some}"


def _carried(row: dict[str, Any]) -> str:
    """State bytes per layer, and the window's share of them."""
    window = f", window {format_bytes(row['window_bytes'])}" if row["window_bytes"] else ""
    return f"{format_bytes(row['state_bytes'])}{window}"


def _pm(value: dict[str, Any], digits: int) -> str:
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error}"


def _tokens(number: float) -> str:
    return format_count(float(f"{number:.3g}"))


def write(out: Path, results: Sequence[dict[str, Any]], tuned: dict[str, Any]) -> dict[str, Any]:
    """Summary, plots and page from the results in a folder.

    Args:
        out: the folder; the page is written beside it, as `OUT.md`.
        results: as `bench_methods.results` reads them.
        tuned: what tuned.json holds.

    Returns:
        The summary.
    """
    from ..eval import method_plots

    found = summary(results)
    short = {**found, "teachers": {name: _without_curves(groups) for name, groups in found["teachers"].items()}}
    write_json(out / "summary.json", short)
    for teacher, groups in found["teachers"].items():
        method_plots.curves(groups, found["target"], out / f"curves-{teacher}.png")
        method_plots.final_kl(groups, out / f"kl-{teacher}.png")
    write_text(out.with_name(f"{out.name}.md"), page(found, tuned, out.name))
    return short


def _without_curves(groups: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {**group, "arms": [{k: v for k, v in row.items() if k != "curves"} for row in group["arms"]]}
        for name, group in groups.items()
    }


TITLES = {
    "linear": "Every layer converted, no window",
    "window": "Every layer converted, a softmax window beside the recurrence",
    "hybrid": "One layer keeps its attention",
}

_INTRODUCTION = """# Methods side by side

Published procedures as recipes, on the same teacher, with the same tokens, seeds, text and measurement; what each
recipe takes over from its paper and what had to be scaled is said [here](../reference/methods.md). This page is made
from the results beside it; nothing on it is written by hand:

    relinear bench methods --report --out {folder}

A run of the grid: `relinear bench methods TEACHER --text FILE --valid FILE --out {folder}`, `--tune` before it.

- **tokens to target**: training tokens, align and glue together, until held-out perplexity is {target:g} times the
  teacher's. What calibration looks at trains nothing and is not counted.
- **ratio**, **KL**: at the end, held-out text, mean over seeds ± standard error over seeds.
- The mark beside KL: tied with the first where the difference is within one standard error, corrected for the number of
  comparisons (Holm); else how many standard errors behind.
- **before training**: ratio of the student as transfer and calibration leave it. **carried**: bytes of state that one
  sequence carries in a converted layer.
"""


def page(found: dict[str, Any], tuned: dict[str, Any], folder: str) -> str:
    """The results page in Markdown.

    Args:
        found: of `summary`.
        tuned: what tuned.json holds.
        folder: name of the folder with results and plots, beside the page.
    """
    parts = [_INTRODUCTION.format(folder=f"docs/results/{folder}", target=found["target"])]
    for teacher, groups in found["teachers"].items():
        seeds = max(len(row["seeds"]) for group in groups.values() for row in group["arms"])
        tokens = max(row["tokens"] for group in groups.values() for row in group["arms"])
        parts.append(f"\n## {teacher}\n\n{format_count(float(f'{tokens:.2g}'))} tokens an arm, {seeds} seeds.\n")
        parts.append(f"\n![Ratio over training tokens]({folder}/curves-{teacher}.png)\n")
        parts.append(f"\n![Final KL]({folder}/kl-{teacher}.png)\n")
        for name, group in groups.items():
            parts.append(f"\n### {TITLES[name]}\n\n{_markdown(group)}")
            parts += [f"\n- {sentence[0].upper()}{sentence[1:]}." for sentence in group["said"]]
            parts.append("\n" if group["said"] else "")
        if tuned.get(teacher):
            parts.append(f"\n### Rates\n\n{_tuned(tuned[teacher])}")
    if found["failed"]:
        parts.append("\n## Failed\n\n")
        parts += [f"- {e['arm']}, seed {e['seed']}, {e['teacher']}: {e['error']}\n" for e in found["failed"]]
    return "".join(parts)


def _markdown(group: dict[str, Any]) -> str:
    lines = rows(group)
    used = [i for i in range(len(COLUMNS)) if i in (0, 4) or any(line[i] for line in lines)]
    header = [COLUMNS[i] for i in used]
    table = [header, ["---"] * len(header), *([line[i] for i in used] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def _tuned(tuned: dict[str, Any]) -> str:
    """The rates that won, as a table."""
    text = (
        "Factors of each recipe's own rates, before glue and from it on, and the batch: the best of the same grid for "
        "these\narms, by KL on one seed that no arm is measured with. An arm that is not listed ran with its recipe's "
        "own rates.\n\n"
        "| arm | before | after | batch | trials | best KL | worst |\n|---|---|---|---|---|---|---|\n"
    )
    for arm, entry in sorted(tuned.items()):
        rates = entry["rates"]
        found = [trial["kl"] for trial in entry["trials"] if trial["kl"] is not None]
        cells = [arm, f"{rates['before']:.3g}", f"{rates['after']:.3g}", str(rates["batch"] or "own")]
        cells[2] += " (edge of the grid)" if entry["at_the_edge"] else ""
        cells += [str(len(entry["trials"])), f"{min(found):.4f}", f"{max(found):.4f}"]
        text += f"| {' | '.join(cells)} |\n"
    return text
