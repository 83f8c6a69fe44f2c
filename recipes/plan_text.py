"""A plan as text: tables that fit a terminal."""

from __future__ import annotations

import textwrap
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from . import costs
from .layers import ranges
from .plan import Plan, StagePlan, TensorTable
from .units import format_bytes, format_count


def render(plan: Plan, width: int = 110) -> str:
    """The plan as plain text of at most `width` columns, without colour."""
    console = Console(file=StringIO(), width=width, no_color=True, highlight=False, markup=False, emoji=False)
    console.print(_head(plan), soft_wrap=True)
    for table in plan.tensors:
        layers = "layer" if len(table.layers) == 1 else "layers"
        each = "" if len(table.layers) == 1 else " each"
        console.print(f"\n{table.mixer} in {layers} {ranges(table.layers)}: {table.parameters:,} parameters{each}")
        console.print(_tensors(table))
    console.print("\nStages")
    console.print(_stages(plan))
    console.print(_footnote(plan))
    console.print(f"\n{_each_rank(plan)}")
    console.print(_memory(plan))
    if plan.gpus:
        console.print(f"\nThe whole recipe on {plan.world.size} GPU{'s' if plan.world.size > 1 else ''}")
        console.print(_gpus(plan))
    console.print(f"\nDecode cache of one sequence ({plan.cache_dtype} keys and values, fp32 states)")
    console.print(_cache(plan))
    if plan.notes:
        console.print("\nNotes")
        for note in plan.notes:
            lines = textwrap.wrap(note, width - 4, break_long_words=False, break_on_hyphens=False)
            console.print("\n".join([f"  - {lines[0]}", *(f"    {line}" for line in lines[1:])]), soft_wrap=True)
    file = console.file
    assert isinstance(file, StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))


def _head(plan: Plan) -> str:
    teacher, counts, g = plan.teacher, plan.counts, plan.teacher.geometry(0)
    kept, converted = plan.layers.kept, list(plan.layers.converted)
    return "\n".join(
        [
            f"Teacher  {teacher.source}: {teacher.family.name}, {format_count(counts.teacher)} parameters, "
            f"{teacher.num_layers} layers, context {teacher.context}",
            f"         width {g.hidden_size}, {g.num_heads} query and {g.num_kv_heads} key/value heads of {g.head_dim}"
            + (", q/k/v biases" if g.qkv_bias else "")
            + (", q/k norms" if g.qk_norm else ""),
            f"Student  {format_count(counts.student)} parameters, {format_count(counts.all_mixers)} of them in mixers",
            f"Layers   {plan.layers.drawing}   ({plan.layers.legend})",
            f"         attention stays in {ranges(kept) or 'none'}; converted: {ranges(converted) or 'none'}",
            *([f"         kept attention from glue on: {plan.layers.changes}"] if plan.layers.changes else []),
        ]
    )


def _table(left: tuple[str, ...], right: tuple[str, ...] = ()) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in left:
        made.add_column(name)
    for name in right:
        made.add_column(name, justify="right")
    return made


def _tensors(table: TensorTable) -> Table:
    made = _table(("tensor", "shape", "source", "from"))
    for row in table.rows:
        made.add_row(row.name, " × ".join(map(str, row.shape)), row.source, row.origin)
    return made


def _stages(plan: Plan) -> Table:
    right = ("tokens", "window", "batch", "steps", "FLOPs", "tokens/s", f"{plan.gpu}-hours")
    made = _table(("stage", "what", "trains"), right)
    for stage in plan.stages:
        made.add_row(stage.name, stage.title, *_figures(stage))
    flops = sum(stage.flops for stage in plan.stages)
    made.add_row("all", "", "", "", "", "", "", f"{flops:.2g}", "", _hours(plan.gpu_hours))
    return made


def _figures(stage: StagePlan) -> list[str]:
    if not stage.settings:
        return ["nothing", *["-"] * 7]
    settings = stage.settings
    return [
        format_count(stage.trained) if stage.kind != "calibrate" else "fitted",
        format_count(settings["tokens"]),
        str(settings["seq_len"]),
        str(settings["batch"]),
        f"{stage.steps:,}",
        f"{stage.flops:.2g}",
        format_count(round(stage.tokens_per_second)) if stage.tokens_per_second else "-",
        _hours(stage.gpu_hours),
    ]


def _hours(hours: float) -> str:
    return "< 0.01" if hours < 0.01 else f"{hours:.3g}"


def _footnote(plan: Plan) -> str:
    return (
        f"Hours are estimates, at {plan.mfu:.0%} of {costs.GPUS[plan.gpu][0]:g} TFLOP/s (bf16 peak of one {plan.gpu}); "
        "reading, evaluation and what ranks send each other are not counted."
    )


def _each_rank(plan: Plan) -> str:
    world = plan.world
    if world.size == 1:
        return "Memory on one device"
    nodes = f" on each of {world.nodes} nodes" if world.nodes > 1 else ""
    return f"Memory of each rank: {world.parallel}, {world.nproc} processes{nodes}, {world.size} ranks"


def _memory(plan: Plan) -> Table:
    names = list(dict.fromkeys(name for stage in plan.stages for name in stage.memory))
    made = _table(("stage",), (*names, "together"))
    for stage in plan.stages:
        if not stage.memory:
            continue
        cells = [format_bytes(stage.memory[name]) if stage.memory.get(name) else "-" for name in names]
        made.add_row(stage.name, *cells, format_bytes(stage.total_memory))
        for rank, size in stage.ranks[1:]:
            made.add_row(f"  from rank {rank}", *[""] * len(names), format_bytes(size))
    return made


def _gpus(plan: Plan) -> Table:
    """Time on every GPU of the table; the price is that of the plan's own."""
    made = _table(("GPU",), ("tokens/s", "GPU-hours", "hours", *(["cost"] if plan.cost is not None else [])))
    for name, (rate, hours) in plan.gpus.items():
        cost = f"{plan.cost:,.2f}" if plan.cost is not None and name == plan.gpu else ""
        row = (name, format_count(round(rate)), _hours(hours), _hours(hours / plan.world.size))
        made.add_row(*row, *([cost] if plan.cost is not None else []))
    return made


def _cache(plan: Plan) -> Table:
    made = _table((), ("tokens", "teacher", "student", "smaller by"))
    for tokens, before, after in plan.cache:
        ratio = before / after
        smaller = f"{ratio:,.0f} ×" if ratio >= 100 else f"{ratio:.3g} ×"
        made.add_row(f"{tokens:,}", format_bytes(before), format_bytes(after), smaller)
    return made
