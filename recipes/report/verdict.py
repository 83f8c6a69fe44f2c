"""The verdict in numbers: a few tiles for one run, a table for several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...eval.tables import context_name, count_name, time_name
from ..layers import ranges
from . import words
from .blocks import Table, Tile, Tiles
from .lost import newest, recall_result, recovered
from .made import layer_map
from .read import Run
from .trained import spent
from .won import devices

FIGURES = (
    ("perplexity_ratio", "Perplexity / teacher's"),
    ("kl", "KL to the teacher (nats/token)"),
    ("top1_agreement", "Same top token"),
)


def tiles(run: Run) -> Tiles:
    """One tile per figure; what was not measured says so."""
    return Tiles([*_fidelity(run), _recall(run), *_core(run), _cache(run), _effort(run)])


def _fidelity(run: Run) -> list[Tile]:
    found = newest(run)
    if found is None:
        return [Tile(label, words.NONE, "not measured yet") for _, label in FIGURES]
    values = found.values
    notes = {
        "perplexity_ratio": f"{words.estimate(values['student']['perplexity'], None, 3)} against "
        f"{words.estimate(values['teacher']['perplexity'], None, 3)}, {found.when}",
        "kl": f"{words.whole(values.get('tokens'))} held-out tokens",
        "top1_agreement": f"tokens of {words.whole(values.get('documents'))} documents",
    }
    return [Tile(label, _figure(key, values), notes[key]) for key, label in FIGURES]


def _figure(key: str, values: dict[str, Any]) -> str:
    write = words.percent if key == "top1_agreement" else words.estimate
    return write(values[key], values.get(f"{key}_stderr"))


def _recall(run: Run) -> Tile:
    share = recovered(run)
    if share is None:
        why = "not measured" if recall_result(run) is None else "no teacher above chance to compare with"
        return Tile("Recall recovered", words.NONE, why)
    note = f"{words.percent(share.student)} of answers exact, the teacher {words.percent(share.teacher)}"
    return Tile("Recall recovered", words.percent(share.ratio, share.stderr), note)


def _core(run: Run) -> list[Tile]:
    mean = (run.suites.get("core") or {}).get("mean") or {}
    if not mean.get("recovery"):
        return []
    note = (
        f"mean over {len(run.suites['core']['tasks'])} tasks; teacher {words.of(mean.get('teacher'), as_percent=True)}"
    )
    limit = run.suites["core"].get("limit")
    note += "" if limit is None else f"; first {limit} documents of each only"
    return [Tile("Benchmarks recovered", words.of(mean["recovery"], as_percent=True), note)]


def _cache(run: Run) -> Tile:
    if run.plan is None:
        return Tile("Decode cache smaller", words.NONE, "the teacher's config.json is not there")
    sizes = [(context_name(tokens), words.smaller(before, after)) for tokens, before, after in run.plan.cache]
    return Tile("Decode cache smaller", sizes[-1][1], ", ".join(f"{ratio} at {length}" for length, ratio in sizes))


def _effort(run: Run) -> Tile:
    number, name = devices(run)
    tokens, seconds = effort(run)
    return Tile("Training", f"{count_name(tokens)} tokens", f"{time_name(seconds)} of steps on {number} × {name}")


def effort(run: Run) -> tuple[int, float]:
    """Tokens that were trained on, and seconds of all stages."""
    stages = spent(run)
    return sum(one.tokens for one in stages if one.trains), sum(one.seconds or 0.0 for one in stages)


def beside(runs: Sequence[tuple[str, Run]]) -> Table:
    """The verdict of several runs, one column each."""
    columns = [[_layers(run), state(run), *(t.value for t in tiles(run).tiles[:4])] for _, run in runs]
    labels = ["layers", "state", *(label for _, label in FIGURES), "Recall recovered"]
    for row, (_, run) in enumerate(runs):
        core = _core(run)
        columns[row].append(core[0].value if core else words.NONE)
        sizes = {} if run.plan is None else {tokens: (before, after) for tokens, before, after in run.plan.cache}
        columns[row] += [words.smaller(*sizes[tokens]) if tokens in sizes else words.NONE for tokens in _LENGTHS]
        tokens, seconds = effort(run)
        columns[row] += [count_name(tokens), time_name(seconds)]
    labels += ["Benchmarks recovered", *(f"Cache smaller at {context_name(n)}" for n in _LENGTHS)]
    labels += ["Training tokens, own stages", "Time of their steps"]
    rows = [[label, *cells] for label, *cells in zip(labels, *columns, strict=True)]
    return Table(
        "Runs beside each other", ["", *(name for name, _ in runs)], [r for r in rows if set(r[1:]) != {words.NONE}]
    )


_LENGTHS = (4096, 32768, 131072)


def _layers(run: Run) -> str:
    made = layer_map(run)
    mixers = ", ".join(sorted({name for name, _ in run.record["layers"].values()}))
    if made is None:
        return mixers
    return f"{len(made.converted)} of {made.num_layers}: {mixers}; attention in {ranges(made.kept) or 'none'}"


def state(run: Run) -> str:
    """How far it is, in a few words."""
    if run.result is not None:
        return "complete"
    for one in spent(run):
        if not one.complete:
            return f"unfinished: {one.name} at {count_name(one.tokens)} of {count_name(one.asked)} tokens"
    return "unfinished: measuring and exporting"
