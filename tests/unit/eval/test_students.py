"""The measurements on real students: mixers in place of attention, untrained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relinear.distill.data.batch import Batch
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import Teacher, load_teacher
from relinear.eval.cache import cache_bytes
from relinear.eval.fidelity import measure
from relinear.mixers import registry

KV_BYTES = 2 * 2 * 8 * 4  # keys and values, heads, head_dim, fp32: per token and attention layer of the tiny llama


@pytest.fixture(scope="module")
def teacher(llama) -> Teacher:
    return load_teacher(llama)


def student(teacher: Teacher, mixer: str, layers: tuple[int, ...], **options: Any) -> Any:
    mixers, _ = transfer(teacher, dict.fromkeys(layers, (mixer, options)))
    return assemble(teacher, mixers)


@pytest.mark.parametrize("mixer", registry.names())
def test_state_is_as_large_as_the_spec_says_at_every_length(teacher, mixer):
    made = student(teacher, mixer, (0, 1, 2, 3))
    spec = registry.spec(mixer)
    expected = 4 * spec.state_bytes(teacher.geometry(0), made.mixers()[0].options)
    assert cache_bytes(made, [16, 300], chunk=64) == {16: expected, 300: expected}


@pytest.mark.parametrize("prefill", [32, 10_000])
def test_a_hybrid_grows_with_what_it_keeps(teacher, prefill):
    made = student(teacher, "gated_deltanet", (0, 2))
    state = 2 * registry.spec("gated_deltanet").state_bytes(teacher.geometry(0), made.mixers()[0].options)
    found = cache_bytes(made, [16, 300], prefill=prefill, chunk=64)
    assert found == {n: 2 * KV_BYTES * n + state for n in (16, 300)}


def two_documents(split: bool) -> Batch:
    """Documents of 11 and 20 tokens: in one row, or one per row with padding on the right."""
    first, second = torch.randint(3, 320, (31,), generator=torch.Generator().manual_seed(2)).split((11, 20))
    rows = [[first], [second]] if split else [[first, second]]
    width = max(sum(map(len, row)) for row in rows)
    ids, position, segment = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for r, row in enumerate(rows):
        at = 0
        for s, document in enumerate(row):
            span = slice(at, at := at + len(document))
            ids[r, span], position[r, span], segment[r, span] = document, torch.arange(len(document)), s
            real[r, span] = True
        segment[r, at:] = torch.arange(len(row), len(row) + width - at)
    return Batch(ids, position, segment, real, real & (position > 0))


@pytest.mark.parametrize("mixer", registry.names())
def test_packing_changes_nothing(teacher, mixer):
    # A window, where the mixer has one, must be shorter than the documents to make a difference.
    windowed = getattr(registry.spec(mixer).options(), "window", 0)
    made = student(teacher, mixer, (0, 1, 3), **({"window": 5} if windowed else {}))
    packed, apart = (measure(made, teacher.model, [two_documents(split)]) for split in (False, True))
    assert packed["tokens"] == apart["tokens"] == 29
    assert packed["documents"] == apart["documents"] == 2
    assert packed["student"] == pytest.approx(apart["student"], rel=1e-4)
    assert packed["kl"] == pytest.approx(apart["kl"], rel=1e-4)
    assert packed["kl"] > 0.01


def test_converting_nothing_loses_nothing(teacher):
    found = measure(assemble(teacher, {}), teacher.model, [two_documents(False)])
    assert (found["kl"], found["perplexity_ratio"], found["top1_agreement"]) == (0.0, 1.0, 1.0)
