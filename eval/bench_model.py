"""How fast a converted model reads and writes beside its teacher, and what memory that takes, over the context length.

Both models run in one process, in turns of alternating order; figures are medians over the turns and ratios are taken
within a turn, so that a slow spell of the machine touches both sides. The text is arbitrary: what a step takes does not
depend on what it says, and so a length may exceed the context that a model was made for.

A pass of a turn: from an empty cache the whole context is read, in one call or in pieces (prefill), the likeliest next
token is fetched to the host (time to first token: prefill included), and from there tokens are decoded one by one,
batch 1. Pieces bound the memory, but all behind the first take attention's slower way with an explicit mask.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .cache import Sequence, held_bytes
from .memory import peak_on, weights_bytes
from .speed import spread

TIMED = ("prefill_tokens_per_second", "time_to_first_token", "decode_tokens_per_second")
"""Figures with a median over turns, NAME_min and NAME_max."""
SIZED = ("peak_bytes", "cache_bytes", "batch_at_memory")
MEMORY_IS = {
    "cpu": "peak_bytes: weights, cache and temporary tensors as torch's profiler counts its allocations; "
    "batch_at_memory: computed from them, not run",
    "cuda": "peak_bytes: weights, cache and temporary tensors by the GPU allocator's max_memory_allocated; "
    "batch_at_memory: computed from them, then run and lowered until it fits",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How speed is measured.

    Attributes:
        tokens: decoded in each pass.
        repeats: turns at most; one pass of each model before them warms up and is where memory is measured.
        chunk: tokens of one prefill call; None: all.
        memory: bytes that weights, caches and temporary tensors of a batch may take.
        max_seconds: no further turn of a length begins when it would end after so long; one always runs.
    """

    tokens: int = 32
    repeats: int = 3
    chunk: int | None = None
    memory: int = 16 * 10**9
    max_seconds: float = 600.0


def measure(
    models: Mapping[str, Any],
    lengths: Iterable[int],
    settings: Settings,
    *,
    kept: Mapping[int, Row] | None = None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """One row for every length.

    Args:
        models: "student" and, to compare with, "teacher": causal language models with a cache, in eval mode.
        lengths: tokens of context, each at least 2.
        settings: see `Settings`.
        kept: rows of lengths that were measured before; they are taken as they are.
        keep: called with all rows so far after each length that was measured.
        progress: called with a line before and after each length.

    Returns:
        Rows by ascending length, of those kept as well: {"length", "beyond_context" (of the teacher, alone: the model),
        "turns", "student": {the figures `TIMED`, each with NAME_min and NAME_max, in tokens per second and seconds;
        "peak_bytes", "cache_bytes" (of one sequence), "batch_at_memory" (0: not even one), "weights_bytes",
        "prefill_bytes", "step_bytes" (temporary tensors of prefill and of one decoded token)}, "teacher": likewise or
        None, "ratios": student over teacher, {NAME: value, and of the timed ones NAME_min and NAME_max} or None}.

    Raises:
        ValueError: a length below 2, or a model that returns no cache.
    """
    rows = dict(kept or {})
    for length in sorted(set(lengths) - set(rows)):
        if length < 2:
            raise ValueError(f"lengths must be at least 2 tokens, found {length}")
        progress(f"{length} tokens")
        begin = time.perf_counter()
        rows[length] = measure_length(models, length, settings)
        progress(f"{length} tokens: {rows[length]['turns']} turns, {time.perf_counter() - begin:.0f} s")
        keep([rows[known] for known in sorted(rows)])
    return [rows[length] for length in sorted(rows)]


def measure_length(models: Mapping[str, Any], length: int, settings: Settings) -> Row:
    """One row; see `measure`."""
    begin = time.perf_counter()
    sizes = {name: sizes_at(model, length, settings) for name, model in models.items()}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for turn in range(settings.repeats):
        started = time.perf_counter()
        for name in models if turn % 2 == 0 else reversed(list(models)):
            times[name].append(timed_pass(models[name], length, settings))
        now = time.perf_counter()
        if now - begin + (now - started) > settings.max_seconds:
            break
    contexts = {name: getattr(model.config, "max_position_embeddings", None) for name, model in models.items()}
    context = contexts.get("teacher", contexts["student"])
    rates = {name: _rates(own, length, settings.tokens) for name, own in times.items()}
    figures: dict[str, Any] = {
        name: {key: value for timed in TIMED for key, value in spread(timed, rates[name][timed]).items()} | sizes[name]
        for name in models
    }
    return {
        "length": length,
        "beyond_context": context is not None and length > context,
        "turns": len(times["student"]),
        "student": figures["student"],
        "teacher": figures.get("teacher"),
        "ratios": _ratios(rates, figures) if "teacher" in models else None,
    }


@torch.no_grad()
def timed_pass(model: Any, length: int, settings: Settings) -> tuple[float, float, float]:
    """Seconds of (prefill, prefill and the first token on the host, decoding `settings.tokens`)."""
    watch = Stopwatch(next(model.parameters()).device)
    sequence = Sequence(model, chunk=settings.chunk or length)
    begin = watch.now()
    watch.start()
    sequence.grow(length)
    prefill = watch.stop()
    sequence.next_token()
    first = watch.now() - begin
    watch.start()
    sequence.decode(settings.tokens)
    return prefill, first, watch.stop()


@torch.no_grad()
def sizes_at(model: Any, length: int, settings: Settings) -> dict[str, int]:
    """Bytes of one sequence at a length, and how many fit; warms up on the way."""
    device = next(model.parameters()).device
    sequence = Sequence(model, chunk=settings.chunk or length)
    prefill = peak_on(device, lambda: sequence.grow(length))
    cache, weights = held_bytes(sequence.cache), weights_bytes(model)
    step = peak_on(device, lambda: sequence.decode(1))
    aside = max(0, prefill - cache)
    batch = batch_at(settings.memory, weights, cache, aside, step)
    if device.type == "cuda" and batch > 0:
        batch = largest_fitting(batch, lambda rows: _fits(sequence, rows, weights + aside, settings.memory))
    return {
        "peak_bytes": weights + max(prefill, cache + step),
        "cache_bytes": cache,
        "batch_at_memory": batch,
        "weights_bytes": weights,
        "prefill_bytes": aside,
        "step_bytes": step,
    }


def batch_at(memory: int, weights: int, cache: int, prefill: int, step: int) -> int:
    """Sequences that fit: weights, caches, one prefill's temporary tensors and every row's of decoding."""
    return max(0, (memory - weights - prefill) // max(1, cache + step))


def largest_fitting(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, by bisection; 0 where not even 1 does."""
    low, high = 0, most
    if fits(most):
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(sequence: Sequence, rows: int, aside: int, memory: int) -> bool:
    """Whether so many copies of a sequence decode a token within `memory` bytes, `aside` of which are taken."""
    import copy

    device = next(sequence.model.parameters()).device
    many = copy.copy(sequence)
    many.cache = copy.deepcopy(sequence.cache)
    try:
        peak = peak_on(device, lambda: (many.repeat(rows), many.decode(1)))
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        many.cache = None
        torch.cuda.empty_cache()
    return aside + peak <= memory


class Stopwatch:
    """Seconds between start and stop: on a GPU by events on its stream, so that both ends are the device's own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin: Any = None

    def now(self) -> float:
        """The host's clock, once the device has done everything asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        """Begin."""
        self._begin = self._event() if self.device.type == "cuda" else time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`; waits for the device."""
        if self.device.type != "cuda":
            return time.perf_counter() - self._begin
        end = self._event()
        end.synchronize()
        return self._begin.elapsed_time(end) / 1000

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def machine(device: torch.device) -> dict[str, Any]:
    """What figures were measured on."""
    found: dict[str, Any] = {
        "device": str(device.type),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf"):
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    return found


def _rates(times: list[tuple[float, float, float]], length: int, tokens: int) -> dict[str, list[float]]:
    """The figures `TIMED` of every turn."""
    return {
        "prefill_tokens_per_second": [length / prefill for prefill, _, _ in times],
        "time_to_first_token": [first for _, first, _ in times],
        "decode_tokens_per_second": [tokens / decode for _, _, decode in times],
    }


def _ratios(rates: dict[str, dict[str, list[float]]], figures: dict[str, Any]) -> dict[str, float | None]:
    made: dict[str, float | None] = {}
    for name in TIMED:
        pairs = zip(rates["student"][name], rates["teacher"][name], strict=True)
        made |= spread(name, [ours / theirs for ours, theirs in pairs])
    for name in SIZED:
        ours, theirs = (figures[side][name] for side in ("student", "teacher"))
        made[name] = ours / theirs if theirs else None
    return made
