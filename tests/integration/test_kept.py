"""Attention that stays but is changed: what the scores are made of, and everything that a student must still do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.export import export_student
from relinear.distill.families import FAMILIES
from relinear.distill.modeling.cache import CACHE, MixerCacheLayer
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import Teacher, load_model, load_teacher
from relinear.mixers.base import MixerInputs

KEPT: dict[str, Any] = {"rope": False, "logit_scale": 4.0, "window": 10}
MIXER = "gated_deltanet"


@pytest.fixture(scope="module", params=list(FAMILIES))
def teacher(request: pytest.FixtureRequest, make_teacher: Callable[..., Path]) -> Teacher:
    return load_teacher(make_teacher(request.param))


@pytest.fixture(scope="module")
def student(teacher: Teacher) -> Any:
    """Layer 1 converted, the others changed: not to be changed further."""
    return assemble(teacher, transfer(teacher, {1: (MIXER, {})})[0], KEPT)


def ids(rows: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(tokens, attention_mask=mask, **settings)


@torch.no_grad()
def test_scores_are_those_of_unrotated_scaled_queries_in_the_window(teacher: Teacher) -> None:
    """The attention function gets the projections' heads after norms, queries times log_a(t + a), and the window."""
    from transformers import AttentionInterface

    model = assemble(teacher, {}, KEPT)
    seen: dict[int, Any] = {}
    given: dict[int, torch.Tensor] = {}

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        assert module.config._attn_implementation == "spy"
        seen[module.layer_idx] = (query, key, kwargs)
        return query.transpose(1, 2).contiguous(), None

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given[module.layer_idx] = args[0] if args else kwargs["hidden_states"]

    positions = torch.cat([torch.arange(12), torch.arange(9)])[None]
    AttentionInterface.register("spy", spy)
    try:
        model.set_attn_implementation("spy")
        for block in getattr(model.base_model, teacher.family.layers):
            getattr(block, teacher.family.attention).register_forward_pre_hook(note, with_kwargs=True)
        model(ids(), position_ids=positions, use_cache=False)
    finally:
        AttentionInterface._global_mapping.pop("spy")
    mixers, _ = transfer(teacher, dict.fromkeys(range(4), (MIXER, {})))
    scale = torch.log(positions + 4.0) / math.log(4.0)
    assert scale[0, 0] == 1 and scale[0, 12] == 1
    for layer, mixer in mixers.items():
        query, key, kwargs = seen[layer]
        q, k, _, _ = mixer.project(given[layer], MixerInputs(), None)
        torch.testing.assert_close(query.transpose(1, 2), q * scale[..., None, None], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(key.transpose(1, 2), k, rtol=1e-5, atol=1e-5)
        assert kwargs["scaling"] == pytest.approx(mixer.geometry.query_scale)
        assert kwargs.get("softcap") == mixer.geometry.softcap
        assert kwargs["sliding_window"] == (8 if teacher.layer_types[layer] == "sliding_attention" else 10)


@torch.no_grad()
def test_nothing_beyond_the_window_is_seen(teacher: Teacher) -> None:
    model = assemble(teacher, {}, {"window": 2})
    tokens, other = ids(1), ids(1)
    other[0, 0] = tokens[0, 0] % 300 + 3
    moved = (model(tokens).logits - model(other).logits).abs().amax(-1)[0]
    assert (moved[:5] > 0).all() and (moved[5:] == 0).all()  # four layers, each one token back
    held = model(tokens, use_cache=True)[CACHE]
    assert [layer.keys.shape[2] for layer in held.layers] == [1] * 4


@torch.no_grad()
def test_cache_padding_and_packing(student: Any, teacher: Teacher) -> None:
    tokens = ids()
    whole = student(tokens, use_cache=False).logits
    cache, pieces = None, []
    for start, stop in ((0, 1), (1, 2), (2, 9), (9, 20), (20, 21)):
        output = student(tokens[:, start:stop], use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-4)
    assert isinstance(cache.layers[1], MixerCacheLayer)
    for layer in (0, 2, 3):
        own = teacher.layer_types[layer] == "sliding_attention"
        assert cache.layers[layer].keys.shape[2] == (7 if own else 9)

    lengths = [5, 1, 12, 3]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = student(tokens[:1], position_ids=positions, use_cache=False).logits[0].split(lengths)
    for piece, document in zip(packed, tokens[0].split(lengths), strict=True):
        torch.testing.assert_close(piece, student(document[None], use_cache=False).logits[0], rtol=1e-4, atol=2e-4)

    mask = torch.ones_like(tokens)
    tokens[0, :6], mask[0, :6] = 0, 0
    alone = student(tokens[:1, 6:], use_cache=False).logits[0]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = student(tokens, attention_mask=mask, position_ids=places, use_cache=False).logits[0, 6:]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_generation(student: Any) -> None:
    tokens, mask = ids(), torch.ones(2, 21, dtype=torch.long)
    plain = generate(student, tokens, use_cache=False)
    assert torch.equal(generate(student, tokens), plain)
    assert torch.equal(generate(student, tokens, cache_implementation="static"), plain)
    assert torch.equal(generate(student, tokens, num_beams=2), generate(student, tokens, num_beams=2, use_cache=False))
    tokens[0, :6], mask[0, :6] = 0, 0
    alone = generate(student, tokens[:1, 6:])[0, 15:]
    assert torch.equal(generate(student, tokens, mask)[0, 21:], alone)


def test_gradient_checkpointing(teacher: Teacher, checkpointing_keeps_gradients: Any) -> None:
    checkpointing_keeps_gradients(assemble(teacher, transfer(teacher, {1: (MIXER, {})})[0], KEPT), ids())


# What is the same in every family


@torch.no_grad()
def test_positions_are_counted_from_the_first_real_token(llama: Path) -> None:
    model = assemble(load_teacher(llama), {}, {"logit_scale": 4.0})
    tokens, mask = ids(1), torch.ones(1, 21, dtype=torch.long)
    tokens[0, :6], mask[0, :6] = 0, 0
    padded = model(tokens, attention_mask=mask, use_cache=False).logits[0, 6:]
    torch.testing.assert_close(padded, model(tokens[:, 6:], use_cache=False).logits[0], rtol=1e-4, atol=1e-4)
    plain = assemble(load_teacher(llama), {})
    torch.testing.assert_close(model(ids()).logits[:, 0], plain(ids()).logits[:, 0])
    assert (model(ids()).logits - plain(ids()).logits).abs().max() > 1e-2


@torch.no_grad()
def test_each_change_by_itself_and_none(llama: Path, tmp_path: Path) -> None:
    teacher = load_teacher(llama)
    wanted = teacher.model(ids()).logits
    for kept in (None, {"rope": True, "logit_scale": None, "window": None}, {"window": 64}):
        assert torch.equal(assemble(teacher, {}, kept)(ids()).logits, wanted)
    made = [assemble(teacher, {}, {key: value})(ids()).logits for key, value in KEPT.items()]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (made[one] - made[other]).abs().max() > 1e-2
    student = assemble(teacher, transfer(teacher, {1: (MIXER, {})})[0], KEPT)
    export_student(student, llama, tmp_path / "export")
    again, _ = load_model(tmp_path / "export")
    assert again.config.kept_attention == KEPT
    assert torch.equal(again(ids()).logits, student(ids()).logits)


@torch.no_grad()
def test_a_copy_stands_by_itself(llama: Path) -> None:
    teacher = load_teacher(llama)
    student = assemble(teacher, transfer(teacher, {1: (MIXER, {})})[0], KEPT)
    wanted = student(ids()).logits
    copied = copy.deepcopy(student)
    copied.set_attn_implementation("eager")
    torch.testing.assert_close(copied(ids()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert copied.config.layer_types == student.config.layer_types != copied.model.config.layer_types
    assert student.model.layers[0].self_attn.config._attn_implementation_internal == "sdpa"
    copied.config.use_cache = False
    assert not copied.model.config.use_cache and student.config.use_cache


@torch.no_grad()
def test_masks_and_caches_that_do_not_fit(llama: Path) -> None:
    teacher = load_teacher(llama)
    student = assemble(teacher, {}, {"window": 5})
    with pytest.raises(ValueError, match=r"give a mask of shape \(batch, tokens\), or none"):
        student(ids(), attention_mask=torch.ones(2, 1, 21, 21, dtype=torch.bool))
    cache = teacher.model(ids(), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="keys and values at layer 0, which is a window of its own in this model"):
        student(ids(), **{CACHE: cache})
