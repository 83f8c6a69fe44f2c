"""The teacher's attention weights are those of transformers' own eager attention, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.attention import attention_heads, attention_weights
from relinear.distill.data.batch import Batch
from relinear.distill.families import FAMILIES
from relinear.distill.teacher import load_teacher


def packed_batch() -> Batch:
    """Two documents per row; the second row's end padded."""
    tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    place = torch.arange(24).expand(2, 24)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, -5:] = False
    positions = torch.where(place >= 9, place - 9, place).masked_fill(~real, 0)
    segments = (place >= 9).long() + (~real).cumsum(1)
    return Batch(tokens, positions, segments, real, real & (positions > 0))


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_weights_are_those_of_eager_attention(family: str, make_teacher: Callable[..., Path]) -> None:
    teacher = load_teacher(make_teacher(family), attn_implementation="eager")
    batch, given = packed_batch(), {}

    def note(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            given[layer] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], kwargs)

        return hook

    for layer in range(teacher.num_layers):
        teacher.attention(layer).register_forward_pre_hook(note(layer), with_kwargs=True)
    call = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    expected = teacher.backbone(**call, output_attentions=True).attentions
    for layer in range(teacher.num_layers):
        hidden, kwargs = given[layer]
        found = attention_weights(teacher, layer, hidden, kwargs["position_embeddings"], batch)
        real = batch.real[:, None, :, None]
        torch.testing.assert_close(found, expected[layer] * real, rtol=1e-5, atol=1e-6)
        assert not found.masked_select(~real).any()
        torch.testing.assert_close(found.sum(-1)[:, 0][batch.real], torch.ones(int(batch.real.sum())))


@torch.no_grad()
def test_blocks_of_queries_are_rows_of_the_whole(make_teacher: Callable[..., Path]) -> None:
    teacher = load_teacher(make_teacher("gemma2"))  # a cap, a window, grouped heads
    batch = packed_batch()
    hidden = torch.randn(2, 24, teacher.config.hidden_size)
    rotary = teacher.backbone.rotary_emb(hidden, batch.position_ids)
    before = teacher.attention(0).config
    heads = attention_heads(teacher, 0, hidden, rotary)
    assert teacher.attention(0).config is before
    assert (heads.softcap, heads.window) == (teacher.config.attn_logit_softcapping, teacher.config.sliding_window)
    whole = heads.weights(batch)
    for start, stop in ((0, 1), (1, 17), (17, 24)):
        torch.testing.assert_close(heads.weights(batch, start, stop), whole[:, :, start:stop])
