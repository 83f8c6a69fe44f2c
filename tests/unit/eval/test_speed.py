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
        self.config, self.ahead = None, 0  # steps before the first turn

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embed

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=True) -> dict[str, Any]:
        tokens, seen = input_ids.shape[1], past_key_values or 0
        if tokens == 1:
            turn = max(len(self.steps) - self.ahead, 0) // 4
            self.clock.now += (1e-3 + 1e-6 * (seen - seen % 10)) * self.slow[turn % len(self.slow)]
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
    found = speed.decode({"m": model}, [1000, 100], repeats=3, tokens=2)["m"]["lengths"]
    assert list(found) == [100, 1000]
    assert found[100]["median_ms"] == pytest.approx(1.1)
    assert found[1000]["median_ms"] == pytest.approx(2.0)
    assert found[100]["iqr"] == pytest.approx(0)
    # four turns (one to warm up), the order of the two contexts changing from turn to turn; before them the last
    # token of each context
    order = ["long" if seen >= 999 else "short" for seen in model.steps]
    assert order == [*["short", "long"], *["long"] * 2, *["short"] * 4, *["long"] * 4, *["short"] * 4, *["long"] * 2]


def test_ratio_is_paired_within_turns(model):
    model.slow = [1.0, 1.0, 7.0, 1.0, 3.0]  # whole turns are slow, both contexts alike
    model.ahead = 2
    found = speed.decode({"m": model}, [100, 1000], repeats=4, tokens=2)["m"]
    assert [found["ratio"], found["ratio_min"], found["ratio_max"]] == pytest.approx([2.0 / 1.1] * 3)
    assert found["lengths"][100]["median_ms"] == pytest.approx(statistics.median([1.1, 7.7, 1.1, 3.3]))
    assert found["bytes_ratio"] is None  # the fake carries a number, no tensor


def test_models_side_by_side(llama):
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(llama).eval()
    config = real.config
    lines = []
    models = {"student": real, "teacher": real}
    found = speed.decode(models, [16, 200], repeats=2, tokens=1, prefill=32, progress=lines.append)
    assert list(found) == ["student", "teacher"] and len(lines) == 5
    for model in found.values():
        assert all(row["median_ms"] > 0 and row["iqr"] >= 0 for row in model["lengths"].values())
        heads = config.num_hidden_layers * config.num_key_value_heads
        size = 2 * heads * config.head_dim * 4
        assert [row["bytes"] for row in model["lengths"].values()] == [16 * size, 200 * size]
        assert model["bytes_ratio"] == 12.5
        assert model["trained_context"] == config.max_position_embeddings
    alone = speed.decode({"m": real}, [16], repeats=1, tokens=1)["m"]
    assert "ratio" not in alone


def test_throughput(model):
    assert speed.throughput(model, batch=4, seq=256) == pytest.approx(4 * 256 / 2.0)


def test_throughput_of_a_real_model(llama):
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(llama).eval()
    assert speed.throughput(real, 2, 64, repeats=1) > 0


def test_refusals(model):
    with pytest.raises(ValueError, match="at least 2"):
        speed.decode({"m": model}, [])
    with pytest.raises(ValueError, match="at least 2"):
        speed.decode({"m": model}, [4], repeats=0)
