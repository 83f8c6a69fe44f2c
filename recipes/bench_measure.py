"""How two computations are compared: agreement first, then time in turns within one process, then memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..eval.memory import peak_bytes
from ..eval.speed import spread
from .bench_cases import Case, Tensors

# Relative to the largest value: fp32 sums in another order stay below, another computation does not.
TOLERANCE = 1e-3


def forward_backward(call: Callable[..., torch.Tensor], inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    """The output, and the gradients of all inputs that take one, for a gradient of ones at the output."""
    out = call(*inputs)
    return out.detach(), torch.autograd.grad(out, [x for x in inputs if x.requires_grad], torch.ones_like(out))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest expected value; infinite where shapes differ or something is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def disagreement(case: Case) -> float:
    """The largest relative error between both sides, over the output and the gradients of every input."""
    out, grads = forward_backward(case.ours, case.inputs)
    leaves = theirs_inputs(case)
    found, found_grads = forward_backward(case.theirs, leaves)
    pairs = [(out, case.restore(found)), *zip(case.prepare(*grads), found_grads, strict=True)]
    return max(relative_error(ours, theirs) for ours, theirs in pairs)


def theirs_inputs(case: Case) -> Tensors:
    """The inputs in the baseline's layout, as leaves that require gradients."""
    with torch.no_grad():
        return tuple(x.detach().requires_grad_() for x in case.prepare(*case.inputs))


def turns(
    calls: list[Callable[[], Any]], repeats: int, seconds: float, before: Callable[[], None] | None = None
) -> list[list[float]]:
    """Seconds of every call in every turn; a turn runs each call once, every second turn in reverse order.

    Args:
        calls: what to time; each has run before.
        repeats: turns at most.
        seconds: no further turn begins when it would end after this long; one turn always runs.
        before: called at the beginning of a turn, not timed.
    """
    times: list[list[float]] = [[] for _ in calls]
    gc.collect()
    begin = time.perf_counter()
    for turn in range(repeats):
        numbered = list(enumerate(calls))
        if before is not None:
            before()
        for place, call in numbered if turn % 2 else reversed(numbered):
            start = time.perf_counter()
            call()
            times[place].append(time.perf_counter() - start)
        if (time.perf_counter() - begin) * (turn + 2) / (turn + 1) > seconds:
            break
    return times


def compare(case: Case, repeats: int, seconds: float) -> dict[str, Any]:
    """Both sides of a case, forward and backward.

    Args:
        case: what to compare.
        repeats: turns at most.
        seconds: for all of it. Where a few calls fill it already, one turn is timed.

    Returns:
        {"error" (see `disagreement`), "agrees", "turns", "ratio" (theirs over ours within a turn: median, with
        "ratio_min", "ratio_max"), "ours_ms", "theirs_ms" (medians), "ours_bytes", "theirs_bytes" (see `peak_bytes`)}.
        A pair that does not agree has no more than the first two.
    """
    begin = time.perf_counter()
    error = disagreement(case)
    if error > TOLERANCE:
        return {"error": error, "agrees": False}
    leaves = theirs_inputs(case)
    sides = [lambda: forward_backward(case.ours, case.inputs), lambda: forward_backward(case.theirs, leaves)]
    once = time.perf_counter() - begin
    ours, theirs = turns(sides, repeats, 0.8 * seconds - 2 * once)  # what is left serves the memory
    return {
        "error": error,
        "agrees": True,
        "turns": len(ours),
        **spread("ratio", [b / a for a, b in zip(ours, theirs, strict=True)]),
        "ours_ms": statistics.median(ours) * 1000,
        "theirs_ms": statistics.median(theirs) * 1000,
        "ours_bytes": peak_bytes(sides[0]),
        "theirs_bytes": peak_bytes(sides[1]),
    }


def scaling(
    sides: dict[int, tuple[Tensors, Callable[..., torch.Tensor]]], repeats: int, seconds: float
) -> dict[str, Any]:
    """One op alone at several lengths, timed in turns.

    Args:
        sides: tokens -> (inputs, call).
        repeats, seconds: as for `compare`.

    Returns:
        {"lengths": {tokens: {"us_per_token", "bytes_per_token"}}, "turns", and with two lengths or more "cost_ratio"
        (time per token at the longest over that at the shortest: median, with _min and _max), "memory_ratio"}.
    """
    lengths = sorted(sides)
    calls = [lambda side=sides[length]: forward_backward(side[1], side[0]) for length in lengths]
    begin = time.perf_counter()
    memory = [peak_bytes(call) / length for call, length in zip(calls, lengths, strict=True)]
    times = turns(calls, repeats, 0.8 * seconds - (time.perf_counter() - begin))
    per_token = [[t / length for t in seen] for seen, length in zip(times, lengths, strict=True)]
    result: dict[str, Any] = {
        "lengths": {
            length: {"us_per_token": statistics.median(seen) * 1e6, "bytes_per_token": held}
            for length, seen, held in zip(lengths, per_token, memory, strict=True)
        },
        "turns": len(times[0]),
    }
    if len(lengths) > 1:
        result |= spread("cost_ratio", [b / a for a, b in zip(per_token[0], per_token[-1], strict=True)])
        result["memory_ratio"] = memory[-1] / memory[0]
    return result
