"""How fast a model decodes at a given context, and how fast it reads.

Other programs on the machine disturb timings. Contexts that are to be compared are therefore timed in turns within one
run, in alternating order, and what is reported are medians and interquartile ranges over the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .cache import Sequence


def decode_ms_per_token(
    model: Any,
    lengths: Iterable[int],
    repeats: int = 9,
    *,
    tokens: int = 8,
    prefill: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, dict[str, float]]:
    """Time of one decode step (batch 1) at each context length, in milliseconds.

    Args:
        model: any causal language model that takes past_key_values, in eval mode.
        lengths: tokens of context. A context grows by the `tokens` decoded in each turn.
        repeats: turns; in each, every context is timed once. One more turn before them warms up.
        tokens: decode steps per timing.
        prefill: as for `cache_bytes`: tokens to prefill for real where attention layers are present (None: all).
        progress: called with (turns done, turns in all).

    Returns:
        {length: {"median_ms", "iqr"}}, both in ms per token over the turns, in ascending order of length.
    """
    turns = _turns(model, sorted(set(lengths)), repeats, tokens, prefill, progress)
    return {length: {"median_ms": statistics.median(ms), "iqr": _iqr(ms)} for length, ms in turns.items()}


def decode_ratio(
    model: Any,
    short: int = 1024,
    long: int = 16384,
    repeats: int = 9,
    *,
    tokens: int = 8,
    prefill: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """How much longer a decode step takes at `long` tokens of context than at `short` ones.

    The ratio is taken within each turn, where both were timed one right after the other, and then the median over
    turns, so that a slow spell of the machine touches both sides. Arguments as for `decode_ms_per_token`.

    Returns:
        {"ratio", "iqr" (of the ratio), "short_ms", "long_ms" (medians)}.
    """
    turns = _turns(model, [short, long], repeats, tokens, prefill, progress)
    ratios = [b / a for a, b in zip(turns[short], turns[long], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "iqr": _iqr(ratios),
        "short_ms": statistics.median(turns[short]),
        "long_ms": statistics.median(turns[long]),
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


def _turns(
    model: Any,
    lengths: list[int],
    repeats: int,
    tokens: int,
    prefill: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[int, list[float]]:
    """ms per token of each context in each turn."""
    if not lengths or lengths[0] < 1 or repeats < 1 or tokens < 1:
        raise ValueError(f"need lengths, repeats and tokens of at least 1, found {lengths}, {repeats}, {tokens}")
    contexts = {length: Sequence(model, prefill=prefill) for length in lengths}
    for length, sequence in contexts.items():
        sequence.grow(length)
    device = next(model.parameters()).device
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for turn in range(repeats + 1):
        for length in lengths if turn % 2 else reversed(lengths):
            _settle(device)
            start = time.perf_counter()
            contexts[length].decode(tokens)
            _settle(device)
            times[length].append((time.perf_counter() - start) * 1000 / tokens)
        if progress is not None:
            progress(turn + 1, repeats + 1)
    return {length: ms[1:] for length, ms in times.items()}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _iqr(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
