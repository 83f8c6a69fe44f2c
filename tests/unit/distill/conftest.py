"""A teacher, mixers and batches for the training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from relinear.distill.data.batch import Batch
from relinear.distill.student import transfer
from relinear.distill.teacher import Teacher, load_teacher


def toy_batch(number: int, rows: int = 4, length: int = 24, vocab: int = 320, padding: bool = True) -> Batch:
    """Random tokens: two packed documents per row, the second row's end padded, targets inside documents."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    border = torch.randint(4, length - 6, (rows, 1), generator=generator)
    place = torch.arange(length).expand(rows, length)
    segments = (place >= border).long()
    positions = torch.where(place >= border, place - border, place)
    real = torch.ones_like(ids, dtype=torch.bool)
    if padding:
        real[1::2, -5:] = False
        segments = segments + (~real).cumsum(1)
        positions = positions.masked_fill(~real, 0)
    return Batch(ids, positions, segments, real, real & (positions > 0))


class ToySource:
    """Batches that are a function of their number; with tensors in the state, as streams have."""

    def __init__(self, **shape: Any) -> None:
        self.number = 0
        self.shape = shape

    def next_batch(self) -> Batch:
        self.number += 1
        return toy_batch(self.number, **self.shape)

    def state_dict(self) -> dict[str, Any]:
        return {"feeds": [{"number": torch.tensor([self.number]), "name": "toy"}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = int(state["feeds"][0]["number"])


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    """toy_batch."""
    return toy_batch


@pytest.fixture
def source_of() -> Callable[..., ToySource]:
    """ToySource."""
    return ToySource


@pytest.fixture
def teacher(llama: Path) -> Teacher:
    """A tiny llama of four layers with tied embeddings, its own copy for each test."""
    return load_teacher(llama)


@pytest.fixture
def mixers_of() -> Callable[..., Any]:
    """mixers_of(teacher, layers, name) -> mixers initialised from the teacher's attention."""

    def make(teacher: Teacher, layers: Any = None, name: str = "gated_deltanet") -> dict[int, Any]:
        chosen = range(teacher.num_layers) if layers is None else layers
        return transfer(teacher, {layer: (name, {}) for layer in chosen}, seed=1)[0]

    return make


def measure_peak(work: Callable[[], object]) -> int:
    """The most bytes that torch had allocated at one time while `work` ran, beyond those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """measure_peak."""
    return measure_peak
