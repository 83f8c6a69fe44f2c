"""Cache bytes are what the tensors hold: equal to a hand formula for attention, constant for a state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relinear.eval.cache import Sequence, cache_bytes, held_bytes

LAYERS, KV_HEADS, HEAD_DIM, FP32 = 4, 2, 8, 4  # of the tiny llama


def load(folder: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("prefill", [8, 10_000])
def test_attention_equals_the_hand_formula(llama, prefill):
    lengths = [300, 2, 64]
    found = cache_bytes(load(llama), lengths, prefill=prefill, chunk=50)
    assert found == {n: LAYERS * 2 * KV_HEADS * HEAD_DIM * FP32 * n for n in (2, 64, 300)}
    assert list(found) == [2, 64, 300]


def test_dtype_is_that_of_the_tensors(llama):
    model = load(llama).to(torch.bfloat16)
    assert cache_bytes(model, [128], prefill=32) == {128: LAYERS * 2 * KV_HEADS * HEAD_DIM * 2 * 128}


def test_sliding_window_stops_growing(make_teacher):
    model = load(make_teacher("mistral", sliding_window=16))
    found = cache_bytes(model, [8, 64, 200], prefill=32)
    per_token = LAYERS * 2 * KV_HEADS * HEAD_DIM * FP32
    # After a step the layer keeps the window's tensor, the newest token included.
    assert found == {8: 8 * per_token, 64: 16 * per_token, 200: 16 * per_token}


class Recurrent(torch.nn.Module):
    """A model whose cache is a state of constant size: it averages embeddings. `leak` keeps the whole chunk alive."""

    def __init__(self, leak: bool = False) -> None:
        super().__init__()
        self.embed, self.leak, self.calls = torch.nn.Embedding(50, 6), leak, []

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embed

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        self.calls.append(input_ids.shape[1])
        x = self.embed(input_ids)
        before = past_key_values.layers[0].states[0] if past_key_values else torch.zeros(1, 6)
        last = torch.cat([x, x.new_zeros(1, 1000, 6)], 1)[:, x.shape[1] - 1] if self.leak else x[:, -1].clone()
        layer = SimpleNamespace(states=(before + x.sum(1), last), tokens=torch.tensor(3))
        return {"past_key_values": SimpleNamespace(layers=[layer])}


def test_a_state_is_constant_and_prefilled_for_real_all_the_way():
    model = Recurrent()
    assert cache_bytes(model, [16, 700], prefill=32, chunk=100) == {16: 48, 700: 48}
    assert sum(model.calls) == 700


def test_a_view_counts_as_what_it_keeps_alive():
    assert cache_bytes(Recurrent(leak=True), [16]) == {16: 24 + 1001 * 24}


def test_each_storage_counts_once():
    keys = torch.zeros(10)
    layer = SimpleNamespace(keys=keys, same=keys, view=keys[2:4], more={"a": [torch.zeros(3, dtype=torch.int8)]})
    assert held_bytes(SimpleNamespace(layers=[layer], me=layer)) == 43


def test_a_filled_sequence_still_decodes(llama):
    model = load(llama)
    sequence = Sequence(model, prefill=32)
    sequence.grow(500)
    sequence.decode(3)
    assert sequence.length == 503 == sequence.cache.get_seq_length()
    assert float(sequence.cache.layers[0].keys[..., 32:500, :].abs().max()) == 0.0
    assert all(float(sequence.cache.layers[0].keys[..., at, :].abs().max()) > 0 for at in (0, 31, 500, 502))


def test_progress_ends_at_the_longest(llama):
    calls = []
    cache_bytes(load(llama), [20, 90], chunk=16, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (89, 90) and [d for d, _ in calls] == sorted(d for d, _ in calls)


def test_refusals(llama):
    for lengths in ([], [1, 5]):
        with pytest.raises(ValueError, match="at least 2"):
            cache_bytes(load(llama), lengths)

    class Cacheless(Recurrent):
        def forward(self, input_ids, past_key_values=None, use_cache=True):
            return {}

    with pytest.raises(ValueError, match="Cacheless returned no past_key_values"):
        cache_bytes(Cacheless(), [4])
