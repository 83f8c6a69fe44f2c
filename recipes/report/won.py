"""What was won and what it cost: speed and memory over the length, FLOPs, hours, price."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial
from typing import Any

from ...eval import run_plots
from ...eval.tables import bytes_name, context_name, count_name, time_name
from . import words
from .blocks import Block, Gallery, Missing, Picture, Table, Text
from .made import run_again
from .read import Run
from .trained import Spent, spent


def cache(run: Run) -> Iterator[Block]:
    """The decode cache at the plan's lengths, counted from both models' shapes."""
    if run.plan is None:
        yield Missing(f"Sizes of the decode cache need the teacher's config.json: {run.unplanned}")
        return
    yield Table(
        f"Decode cache of one sequence, counted from the shapes ({run.plan.cache_dtype} keys and values, fp32 states)",
        ["tokens", "teacher", "student", "smaller by"],
        [
            [f"{tokens:,}", bytes_name(before), bytes_name(after), words.smaller(before, after)]
            for tokens, before, after in run.plan.cache
        ],
    )


def speed(run: Run) -> Iterator[Block]:
    """Speed and memory over the length, as `relinear bench model` measured them; the cache as counted."""
    yield from cache(run)
    if run.bench is None:
        text = "Speed and memory over the length were not measured."
        if run.result is None:
            yield Missing(f"{text} That needs the exported model, which a run leaves at its end.", run_again(run))
        else:
            export = str(run.folder / "export")
            yield Missing(text, shlex.join(["relinear", "bench", "model", export, "--against", run.teacher]))
        return
    lengths: list[dict[str, Any]] = run.bench["lengths"]
    yield Picture(
        "speed.png",
        partial(run_plots.over_length, lengths),
        "Tokens per second when reading and writing, peak memory and decode cache over the context, of both models",
    )
    tables = []
    for key, title, write in FIGURES:
        rows = [_beside(row, key, write) for row in lengths if (row.get("student") or {}).get(key) is not None]
        if rows:
            tables.append(Table(title, ["context", "teacher", "student", "student / teacher"], rows))
    yield Gallery(tables)
    machine = run.bench.get("machine") or {}
    if machine:
        yield Text(
            "Measured on: "
            + "; ".join(f"{key} {words.plain(value)}" for key, value in machine.items() if value is not None)
            + "."
        )


def _beside(row: dict[str, Any], key: str, write: Any) -> list[str]:
    teacher, student = (row.get("teacher") or {}).get(key), row["student"][key]
    ratio = f"{student / teacher:.3g} ×" if teacher else words.NONE
    return [context_name(row["length"]), words.NONE if teacher is None else write(teacher), write(student), ratio]


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


FIGURES = (
    ("prefill_tokens_per_second", "Reading, tokens per second", count_name),
    ("time_to_first_token", "Time to the first token", _seconds),
    ("decode_tokens_per_second", "Writing, tokens per second", count_name),
    ("peak_bytes", "Peak memory", bytes_name),
    ("cache_bytes", "Decode cache, measured", bytes_name),
    ("batch_at_memory", "Sequences that fit the memory at once", words.whole),
)
"""What bench.json has of each length: key, title, and how it is written."""


def devices(run: Run) -> tuple[int, str]:
    """On how many devices the run was, and what they are."""
    environment = (run.result or {}).get("environment") or run.record["environment"]
    return environment.get("world_size") or 1, environment.get("gpu") or "CPU process"


def cost(run: Run, price: float | None) -> Iterator[Block]:
    """FLOPs as planned, hours as measured, and the price of both.

    Args:
        run: its files.
        price: of an hour of one device, in whatever currency.
    """
    number, name = devices(run)
    stages = [one for one in spent(run) if one.tokens or run.plan]
    rows = [_stage(run, one, number, price) for one in stages]
    totals = [one.seconds for one in stages if one.seconds is not None]
    hours = sum(totals) * number / 3600
    flops = _flops(run, stages)
    end = [
        "together",
        count_name(sum(one.tokens for one in stages if one.trains)),
        _count(flops),
        time_name(sum(totals)),
    ]
    end += [f"{hours:.3g}", _count(flops / sum(totals) if flops and sum(totals) else None)]
    yield Table(
        f"What it took on {number} × {name}; the tokens of all together are those of training",
        ["stage", "tokens", "FLOPs", "time", "device-hours", "FLOP/s", *(["price"] if price is not None else [])],
        [*rows, end + ([f"{hours * price:,.2f}"] if price is not None else [])],
    )
    yield Text(
        "Time is that of the steps; loading, evaluations and saves are not in it. FLOPs are the plan's: those of "
        "matrix products, for the tokens done."
        + ("" if price is not None else " For a price: --price X, of one device's hour.")
    )
    if run.plan is None:
        yield Missing(f"FLOPs and other GPUs' hours need the teacher's config.json: {run.unplanned}")
        return
    yield Table(
        f"The whole recipe on other devices, estimated at {run.plan.mfu:.0%} of their bf16 peak",
        ["GPU", "tokens/s", "GPU-hours", *([f"at {price:,.2f} an hour"] if price is not None else [])],
        [
            [gpu, count_name(rate), f"{gpu_hours:.3g}", *([f"{gpu_hours * price:,.2f}"] if price is not None else [])]
            for gpu, (rate, gpu_hours) in run.plan.gpus.items()
        ],
        folded="The same recipe on one GPU, estimated",
    )


def _flops_of(run: Run, one: Spent) -> float | None:
    """The plan's FLOPs of a stage, for the tokens that were done."""
    if run.plan is None or not one.asked:
        return None
    return run.plan.stage(one.name).flops * min(1.0, one.tokens / one.asked)


def _flops(run: Run, stages: list[Spent]) -> float | None:
    known = [flops for one in stages if (flops := _flops_of(run, one)) is not None]
    return sum(known) if known else None


def _stage(run: Run, one: Spent, number: int, price: float | None) -> list[str]:
    flops, seconds = _flops_of(run, one), one.seconds
    hours = None if seconds is None else seconds * number / 3600
    cells = [
        one.name,
        count_name(one.tokens),
        _count(flops),
        words.NONE if seconds is None else time_name(seconds),
        words.NONE if hours is None else f"{hours:.3g}",
        _count(flops / seconds if flops and seconds else None),
    ]
    if price is not None:
        cells.append(words.NONE if hours is None else f"{hours * price:,.2f}")
    return cells


def _count(value: float | None) -> str:
    """A large count in powers of ten: 1.23e+15."""
    return words.NONE if value is None else f"{value:.3g}"
