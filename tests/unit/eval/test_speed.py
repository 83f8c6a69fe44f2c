"""Timings are of the machine, so only what is deterministic about them is tested: order, counts, arithmetic."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from relinear.eval import speed


class Clock:
    """Advances by what the fake model says a call takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Model(torch.nn.Module):
    """Takes 1 ms + 1 µs per token of context for a step; slower by a factor while `slow` is set."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.embed, self.clock, self.steps, self.slow = torch.nn.Embedding(10, 2), clock, [], [1.0]

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embed

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=True) -> dict[str, Any]:
        tokens, seen = input_ids.shape[1], past_key_values or 0
        if tokens == 1:
            self.clock.now += (1e-3 + 1e-6 * (seen - seen % 10)) * self.slow[len(self.steps) // 4 % len(self.slow)]
            self.steps.append(seen)
        else:
            self.clock.now += 0.5 * input_ids.shape[0]
        return {"past_key_values": seen + tokens}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return Model(clock)


def test_median_per_token_in_turns(model):
    found = speed.decode_ms_per_token(model, [1000, 100], repeats=3, tokens=2)
    assert list(found) == [100, 1000]
    assert found[100]["median_ms"] == pytest.approx(1.1)
    assert found[1000]["median_ms"] == pytest.approx(2.0)
    assert found[100]["iqr"] == pytest.approx(0)
    # four turns (one to warm up), the order of the two contexts changing from turn to turn
    order = ["long" if seen >= 1000 else "short" for seen in model.steps]
    assert order == ["long"] * 2 + ["short"] * 4 + ["long"] * 4 + ["short"] * 4 + ["long"] * 2


def test_ratio_is_paired_within_turns(model):
    model.slow = [1.0, 1.0, 7.0, 1.0, 3.0]  # whole turns are slow, both contexts alike
    found = speed.decode_ratio(model, 100, 1000, repeats=4, tokens=2)
    assert found["ratio"] == pytest.approx(2.0 / 1.1)
    assert found["iqr"] == pytest.approx(0)
    assert found["short_ms"] == pytest.approx(statistics.median([1.1, 7.7, 1.1, 3.3]))


def test_throughput(model):
    assert speed.throughput(model, batch=4, seq=256) == pytest.approx(4 * 256 / 2.0)


def test_a_real_model(llama):
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(llama).eval()
    found = speed.decode_ms_per_token(real, [16, 200], repeats=2, tokens=1, prefill=32)
    assert all(row["median_ms"] > 0 and row["iqr"] >= 0 for row in found.values())
    assert speed.throughput(real, 2, 64, repeats=1) > 0


def test_refusals(model):
    with pytest.raises(ValueError, match="at least 1"):
        speed.decode_ms_per_token(model, [])
    with pytest.raises(ValueError, match="at least 1"):
        speed.decode_ms_per_token(model, [4], repeats=0)
