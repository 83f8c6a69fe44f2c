"""`bench ops`: every op against every baseline that computes the same, each pair in a process of its own.

A process of its own, because a baseline may take longer than anyone wants to wait or more memory than there is: it is
ended at the limit and the table says so, and what is left of the table is measured all the same.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..distill import checkpoint
from . import bench_baselines as baselines
from .bench_cases import CASES, INPUTS, Shape, alone
from .bench_measure import TOLERANCE, compare, scaling
from .bench_steps import STEP_CASES, compare_step, step_alone

OPS = tuple(INPUTS)
START_SECONDS = 120  # for a process to import torch and transformers


class Settings(NamedTuple):
    """What `bench ops` measures.

    Attributes:
        ops: names out of `OPS`.
        lengths: tokens, ascending.
        batches: rows of one decoded token, ascending.
        heads, head_dim: of every op; Mamba-1 takes heads * head_dim channels.
        threads: of torch.
        repeats: turns of each measurement at most.
        max_seconds: for one measurement, all its turns included.
        max_gb: memory that the process of one measurement may take, in 10^9 bytes.
        fla: folder of flash-linear-attention's sources; None: the installed package.
    """

    ops: tuple[str, ...] = OPS
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    batches: tuple[int, ...] = (1, 8, 64)
    heads: int = 8
    head_dim: int = 64
    threads: int = 1
    repeats: int = 7
    max_seconds: float = 60.0
    max_gb: float = 8.0
    fla: str | None = None


Row = dict[str, Any]


def measure(settings: Settings, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The whole of `bench ops`.

    Args:
        settings: what to measure.
        progress: called with a line before each measurement.

    Returns:
        {"settings", "environment", "tolerance",
        "alone": rows of {"op", and `bench_measure.scaling`'s result},
        "sequence": rows of {"op", "baseline", "length", and `bench_measure.compare`'s result},
        "step": rows of {"op", "baseline" (None: alone), "batch", and `bench_steps`' result}};
        a row that could not be measured has "note" in place of the result: `not there: …`, `skipped: …` or `failed: …`.
    """
    result: dict[str, Any] = {
        "settings": settings._asdict(),
        "environment": checkpoint.environment() | {"threads": settings.threads},
        "tolerance": TOLERANCE,
        "alone": [],
        "sequence": [],
        "step": [],
    }
    for op in settings.ops:
        progress(f"{op} alone")
        result["alone"] += _rows(settings, "alone", op, None)
        for name in [name for own, name in CASES if own == op]:
            progress(f"{op} / {name}")
            result["sequence"] += _rows(settings, "sequence", op, name)
        for name in [None, *(name for own, name in STEP_CASES if own == op)]:
            progress(f"{op}, one token / {name}" if name else f"{op}, one token")
            result["step"] += _rows(settings, "step", op, name)
    return result


def failures(result: dict[str, Any]) -> list[str]:
    """What of a result has no right to a ratio: pairs that do not compute the same, and what failed; each once."""
    rows = [row for kind in ("alone", "sequence", "step") for row in result[kind]]
    return list(dict.fromkeys(text for row in rows if (text := _failure(row))))


def _failure(row: Row) -> str:
    name = row["op"] + (f" / {row['baseline']}" if row.get("baseline") else "")
    if row.get("agrees") is False:
        return f"{name} compute different things (relative error {row['error']:.2g})"
    return f"{name} {row['note']}" if row.get("note", "").startswith("failed") else ""


def _rows(settings: Settings, kind: str, op: str, name: str | None) -> list[Row]:
    """The rows of one pair, measured in a process of its own; what it did not reach has a note."""
    axis, values = {
        "alone": ("lengths", (settings.lengths,)),
        "sequence": ("length", settings.lengths),
        "step": ("batch", settings.batches),
    }[kind]
    rows: list[Row] = []
    for value, result in zip(values, _ask(settings, kind, op, name, len(values)), strict=True):
        at = {} if kind == "alone" else {"baseline": name, axis: value}
        rows.append({"op": op, **at, **result})
    return rows


def _ask(settings: Settings, kind: str, op: str, name: str | None, count: int) -> Iterator[Row]:
    """`count` results from a fresh process; notes for those that it does not give."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, settings, kind, op, name), daemon=True)
    process.start()
    sender.close()
    limit = settings.max_seconds * (len(settings.lengths) if kind == "alone" else 1)
    note = None
    try:
        if not receiver.poll(START_SECONDS):
            note = f"no process started within {START_SECONDS} s"
        else:
            receiver.recv()
        for _ in range(count):
            row = {"note": note} if note else _receive(receiver, process, limit)
            yield row
            note = row.get("note")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _receive(receiver: Any, process: Any, limit: float) -> Row:
    try:
        return receiver.recv() if receiver.poll(limit) else {"note": f"skipped: takes over {limit:g} s"}
    except EOFError:
        process.join()
        return {"note": f"failed: its process ended with code {process.exitcode}"}


def _child(sender: Any, settings: Settings, kind: str, op: str, name: str | None) -> None:
    """Send True at the start, and then one result per length or batch."""
    sender.send(True)
    try:
        torch.set_num_threads(settings.threads)
        _limit_memory(settings.max_gb)
        for result in results(settings, kind, op, name):
            sender.send(result)
    except baselines.Missing as error:
        sender.send({"note": f"not there: {error}"})
    except Exception as error:  # whatever it is, the other rows are measured all the same
        reason = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        sender.send({"note": f"skipped: takes over {settings.max_gb:g} GB" if memory else reason})


def results(settings: Settings, kind: str, op: str, name: str | None) -> Iterator[Row]:
    """The measurements of one pair, in this process, in the order of the settings' lengths or batches.

    Args:
        settings: as for `measure`.
        kind: `alone`, `sequence` or `step`.
        op: our op.
        name: the baseline; None: our op alone.

    Raises:
        Missing: the op or the baseline is not installed.
    """
    repeats, seconds = settings.repeats, settings.max_seconds
    size = (settings.heads, settings.head_dim)
    if kind == "alone":
        sides = {length: alone(op, Shape(1, length, *size)) for length in settings.lengths}
        yield scaling(sides, repeats, seconds * len(sides))
    elif kind == "sequence":
        assert name is not None
        root = baselines.fla_root(settings.fla)
        for length in settings.lengths:
            yield compare(CASES[op, name](Shape(1, length, *size), root), repeats, seconds)
    else:
        for batch in settings.batches:
            shape = Shape(batch, 1, *size)
            if name is None:
                yield step_alone(op, shape, repeats, seconds)
            else:
                yield compare_step(STEP_CASES[op, name](shape), repeats, seconds)


def _limit_memory(gigabytes: float) -> None:
    """Let this process fail to allocate beyond the limit, before the system ends some other one."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9), resource.RLIM_INFINITY))
