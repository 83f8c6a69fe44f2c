"""How much memory a call takes: counted by torch, not guessed from the process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator held at once during a call, beyond those held before it.

    From torch's profiler, which sees every allocation of tensors, temporary ones inside operators too, and gives the
    same number every time; a process's resident memory would show pages that were freed but kept.
    """
    held = peak = 0
    for change in _allocations(call):
        held += change
        peak = max(peak, held)
    return peak


def allocated_bytes(call: Callable[[], Any]) -> int:
    """All bytes that a call asked of torch's allocator, freed again or not."""
    return sum(change for change in _allocations(call) if change > 0)


def _allocations(call: Callable[[], Any]) -> list[int]:
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports to stderr that it begins and that it ends
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    recorded: Any = profiled.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_on(device: torch.device, call: Callable[[], Any]) -> int:
    """`peak_bytes` of a call on a device: on a GPU by its allocator's own count (max_memory_allocated)."""
    if device.type != "cuda":
        return peak_bytes(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def weights_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers; what is shared (tied embeddings) once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
