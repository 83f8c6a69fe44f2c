"""What the model is: its layers, where its parameters came from, what calibrate did."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ...eval import plots, run_plots
from ...eval.tables import bytes_name, count_name
from ...mixers import registry
from ..layers import LayerMap, ranges
from . import words
from .blocks import Block, Cell, LayerCells, Missing, Notice, Picture, Table, Text
from .read import Run

KINDS = ("copied", "derived", "new")
_MEANT = {
    "copied": "equal to a tensor of the attention",
    "derived": "computed from one",
    "new": "not in the attention; initialised",
}
STATES = ("random", "transfer", "calibrated", "aligned")


def layer_map(run: Run) -> LayerMap | None:
    """The run's layers; None where nothing says how many the teacher has."""
    converted = {int(layer): (name, options) for layer, (name, options) in run.record["layers"].items()}
    if run.plan is not None:
        number = run.plan.layers.num_layers
    elif run.result is not None:
        number = len(run.result["layers"]["drawing"])
    else:
        return None
    kept = [layer for layer in range(number) if layer not in converted]
    return LayerMap(number, kept, converted, run.record.get("kept_attention"))


def layers(run: Run) -> Iterator[Block]:
    """The layer map, and what stands where with which options."""
    plan, made = run.plan, layer_map(run)
    if plan is not None:
        g, counts = plan.teacher.geometry(0), plan.counts
        yield Text(
            f"Teacher: {plan.teacher.family.name}, {count_name(counts.teacher)} parameters, "
            f"{plan.teacher.num_layers} layers, width {g.hidden_size}, {g.num_heads} query and {g.num_kv_heads} "
            f"key/value heads of {g.head_dim}, context {plan.teacher.context:,}. Student: {count_name(counts.student)} "
            f"parameters, {count_name(counts.all_mixers)} of them in mixers."
        )
    if made is None:
        yield Missing(
            f"The teacher's config.json cannot be read, so its number of layers is not known: {run.unplanned}"
        )
        made = LayerMap(0, [], {int(k): (n, o) for k, (n, o) in run.record["layers"].items()}, None)
    else:
        yield from _map(made)
    yield Table(
        "What stands in which layers, with the options that are not at their defaults",
        ["", "layers", "number", "state of one sequence", "options"],
        list(_standing(run, made)),
        words=(0, 1, 4),
    )


def _map(made: LayerMap) -> Iterator[Block]:
    names = {"A": "attention", **{letter: name for name, letter in made.letters.items()}}
    if not made.kept:
        del names["A"]
    colours = {letter: run_plots.layer_colour(letter, names) for letter in names}

    def cell(layer: int, letter: str) -> Cell:
        return Cell(layer, letter, names[letter], colours[letter], run_plots.ink(colours[letter]))

    cells = [cell(layer, letter) for layer, letter in enumerate(made.drawing)]
    legend = [cell(-1, letter) for letter in names]
    yield LayerCells(cells, legend)
    yield Picture(
        "layers.png",
        partial(run_plots.layer_map, made.drawing, names),
        f"Layer map, lowest layer first: {made.drawing} ({', '.join(f'{k} {v}' for k, v in names.items())})",
        aside=True,
    )


def _standing(run: Run, made: LayerMap) -> Iterator[list[str]]:
    if made.kept:
        held = "grows with the text"
        changed = made.changes or "as in the teacher"
        if run.plan is not None:
            types = {kind for layer, kind in enumerate(run.plan.teacher.layer_types) if layer in made.kept}
            changed += "".join(f"; {kind}" for kind in sorted(types - {"full_attention"}))
        yield ["attention", ranges(made.kept), str(len(made.kept)), held, changed]
    groups: dict[str, list[int]] = {}
    for layer, value in made.converted.items():
        groups.setdefault(json.dumps(value), []).append(layer)
    for key, members in groups.items():
        name, options = json.loads(key)
        spec = registry.spec(name)
        parsed = spec.options.parse(options)
        usual = spec.options.parse({}).to_dict()
        given = {option: value for option, value in parsed.to_dict().items() if value != usual[option]}
        state = words.NONE
        if run.plan is not None:
            state = bytes_name(spec.state_bytes(run.plan.teacher.geometry(members[0]), parsed))
        said = ", ".join(f"{option} {words.plain(value)}" for option, value in given.items())
        yield [name, ranges(members), str(len(members)), state, said or "all at their defaults"]


def parameters(run: Run) -> Iterator[Block]:
    """Where every parameter of the mixers came from: transfer.json."""
    if run.transfer is None:
        yield Missing("Transfer has not run yet. It is the first stage of a run.", run_again(run))
        return
    taken = {layer: row for layer, row in run.transfer.items() if "from" in row}
    own = {layer: row for layer, row in run.transfer.items() if "from" not in row}
    if taken:
        sources = sorted({str(row["from"]) for row in taken.values()})
        left = sorted({name for row in taken.values() for name in row["transferred"]})
        yield Text(
            f"The mixers of layers {ranges(sorted(map(int, taken)))} came trained from {', '.join(sources)}."
            + (f" As transferred there: {', '.join(left)}." if left else "")
        )
    if not own:
        return
    totals = {kind: sum(row["parameters"][kind] for row in own.values()) for kind in KINDS}
    every = sum(totals.values())
    yield Table(
        "Parameters of the mixers by where they came from",
        ["", "parameters", "share", "what that means"],
        [
            [kind, words.whole(n), words.percent(n / every if every else None), _MEANT[kind]]
            for kind, n in totals.items()
        ],
        words=(0, 3),
    )
    for note in dict.fromkeys(note for row in own.values() for note in row.get("notes", [])):
        yield Notice(note)
    dropped = {str(name) for row in own.values() for name in row.get("dropped", [])}
    if dropped:
        yield Notice(f"Tensors of the attention that no mixer took up: {', '.join(sorted(dropped))}")
    yield from _tensors(own)


def _tensors(rows: dict[str, dict[str, Any]]) -> Iterator[Block]:
    """Every tensor with its source; layers that have the same tensors share a table."""
    groups: dict[str, list[str]] = {}
    for layer in sorted(rows, key=int):
        groups.setdefault(json.dumps([sorted(rows[layer][kind]) for kind in KINDS]), []).append(layer)
    for members in groups.values():
        first, last = rows[members[0]], rows[members[-1]]
        lines = []
        for kind in KINDS:
            for name, origin in first[kind].items():
                changes = f" (in layer {members[0]}; changes with depth)" if last[kind][name] != origin else ""
                lines.append([name, kind, f"{origin}{changes}"])
        where = ranges([int(layer) for layer in members])
        title = f"Tensors of layer {where}" if len(members) == 1 else f"Tensors of layers {where}"
        yield Table(title, ["tensor", "source", "from"], lines, words=(0, 1, 2), folded=f"{title} ({len(lines)})")


def calibrate(run: Run) -> Iterator[Block]:
    """Errors of the layers' outputs as random, as transferred, calibrated and aligned."""
    stages = [name for name, kind, _ in run.stages if kind == "calibrate"]
    if not stages:
        yield Missing("The recipe has no calibrate stage.", "relinear show rwkv7")
    for name in stages:
        rows = run.calibrate.get(name, {}).get("layers", {})
        if not rows:
            yield Missing(f"{name}.json is not there yet: the stage has not ended.", run_again(run))
            continue
        yield Picture(
            f"{name}.png",
            partial(plots.calibration_errors, rows),
            "Relative error of every layer's output on held-out tokens, and how far back each head looks",
            "How far each layer's output is from the attention's, relative to its norm: 0 is equal.",
        )
        yield Table(
            f"{name}: relative error of the layers' outputs on held-out tokens",
            ["layer", *STATES, "kept", "mean distance (tokens)"],
            [*_calibrated(rows), _mean(list(rows.values()))],
            words=(0, 5),
            folded="Layer by layer",
        )


def _calibrated(rows: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    for layer, row in rows.items():
        distance = row.get("distance") or []
        mean = f"{sum(distance) / len(distance):.1f}" if distance else words.NONE
        yield [layer, *(words.significant(row.get(state)) for state in STATES), str(row.get("kept", "")), mean]


def _mean(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The last line: means over layers, where every layer was measured."""
    cells = []
    for state in STATES:
        values = [row.get(state) for row in rows]
        known = [value for value in values if value is not None]
        cells.append(words.significant(sum(known) / len(known)) if len(known) == len(values) else words.NONE)
    return ["mean", *cells, "", ""]


def run_again(run: Run) -> str:
    """The command that goes on with an unfinished run."""
    import shlex

    return shlex.join(["relinear", "run", str(run.folder / "recipe.yaml"), "--out", str(run.folder), "--resume"])
