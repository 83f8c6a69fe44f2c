"""How fast a model decodes at a given context and what it carries there, and how fast it reads.

Other programs on the machine disturb timings. Contexts that are to be compared are therefore timed in turns within one
run, in alternating order, and what is reported are medians and interquartile ranges over the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .cache import Sequence, held_bytes


def decode(
    models: Mapping[str, Any],
    lengths: Iterable[int],
    repeats: int = 9,
    *,
    tokens: int = 8,
    prefill: int | None = 2048,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Time of one decode step (batch 1), and the bytes carried from step to step, at each context length.

    Every model at every context is timed once in each turn, one right after the other, in alternating order. Ratios
    are taken within a turn, so that a slow spell of the machine touches both sides.

    Args:
        models: name -> any causal language model that takes a cache, in eval mode.
        lengths: tokens of context, each at least 2; they may exceed the contexts that the models were made for: what a
            step takes does not depend on what it says. A context grows by the `tokens` decoded in each turn.
        repeats: turns. One more before them warms up.
        tokens: decode steps per timing.
        prefill: as for `cache_bytes`: tokens to prefill for real where attention layers are present (None: all).
        progress: called with a line before each context is filled, and before the turns.

    Returns:
        {name: {"trained_context": max_position_embeddings or None,
        "lengths": {length: {"median_ms", "iqr" (both per token), "bytes" (of the cache, as `cache_bytes` measures)}},
        and with two lengths or more "ratio" (time at the longest over that at the shortest: median, with "ratio_min",
        "ratio_max") and "bytes_ratio" (None where nothing is held)}}. Lengths ascend.

    Raises:
        ValueError: no lengths, a length below 2, no repeats or no tokens; a model that returns no cache.
    """
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 2 or repeats < 1 or tokens < 1:
        raise ValueError(f"need lengths of at least 2, repeats and tokens of at least 1: {wanted}, {repeats}, {tokens}")
    contexts: dict[tuple[str, int], Sequence] = {}
    held: dict[tuple[str, int], int] = {}
    for name, model in models.items():
        for length in wanted:
            progress(f"{name}: {length} tokens of context")
            contexts[name, length] = sequence = Sequence(model, prefill=prefill)
            sequence.grow(length - 1)
            sequence.decode(1)
            held[name, length] = held_bytes(sequence.cache)
    progress(f"{repeats} turns")
    times = _turns(contexts, repeats, tokens)
    return {
        name: {
            "trained_context": getattr(model.config, "max_position_embeddings", None),
            "lengths": {
                length: {
                    "median_ms": statistics.median(times[name, length]),
                    "iqr": _iqr(times[name, length]),
                    "bytes": held[name, length],
                }
                for length in wanted
            },
        }
        | _growth([times[name, length] for length in wanted], [held[name, length] for length in wanted])
        for name, model in models.items()
    }


@torch.no_grad()
def throughput(model: Any, batch: int, seq: int, repeats: int = 5) -> float:
    """Tokens per second of a forward pass without cache over `batch` rows of `seq` tokens: the median of `repeats`."""
    device = next(model.parameters()).device
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(batch * seq, device=device).view(batch, seq) * 7919 + 1) % vocab
    positions = torch.arange(seq, device=device)[None].expand(batch, -1)
    rates = []
    for _ in range(repeats + 1):
        _settle(device)
        start = time.perf_counter()
        model(input_ids=ids, position_ids=positions, use_cache=False)
        _settle(device)
        rates.append(batch * seq / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def spread(name: str, values: list[float]) -> dict[str, float]:
    """{NAME: median, NAME_min, NAME_max}."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _turns(contexts: dict[tuple[str, int], Sequence], repeats: int, tokens: int) -> dict[tuple[str, int], list[float]]:
    """ms per token of each context in each turn."""
    times: dict[tuple[str, int], list[float]] = {key: [] for key in contexts}
    for turn in range(repeats + 1):
        for key in contexts if turn % 2 else reversed(contexts):
            device = next(contexts[key].model.parameters()).device
            _settle(device)
            start = time.perf_counter()
            contexts[key].decode(tokens)
            _settle(device)
            times[key].append((time.perf_counter() - start) * 1000 / tokens)
    return {key: ms[1:] for key, ms in times.items()}


def _growth(times: list[list[float]], held: list[int]) -> dict[str, float | None]:
    """What the longest context costs over the shortest; nothing where there is but one."""
    if len(times) < 2:
        return {}
    ratios = [b / a for a, b in zip(times[0], times[-1], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "bytes_ratio": held[-1] / held[0] if held[0] else None,
    }


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _iqr(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
