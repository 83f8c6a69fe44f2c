"""The student against its teacher, its cache against none, for every family and mixer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.modeling.cache import CACHE, MixerCacheLayer
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.mixers import registry

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYOUTS = {"some": [1, 2], "outer": [0, 3], "all": [0, 1, 2, 3]}


def student(folder: Path, mixer: str, layers: list[int], **options: Any) -> Any:
    """A transferred student whose parameters are moved away from their start, so that every part of a mixer counts."""
    teacher = load_teacher(folder)
    mixers, _ = transfer(teacher, dict.fromkeys(layers, (mixer, options)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in mixers.values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return assemble(teacher, mixers)


# Every family and layout with a mixer whose layers are linked and one whose layers are not; every other mixer with two
# of both in turn.
LINKED = ("rwkv7", "gated_deltanet")
CASES = [(family, mixer, layout) for mixer in LINKED for family in FAMILIES for layout in LAYOUTS] + [
    (FAMILIES[(i + j) % len(FAMILIES)], mixer, layout)
    for i, mixer in enumerate(name for name in registry.names() if name not in LINKED)
    for j, layout in enumerate(("some", "all"))
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    return request.param


@pytest.fixture
def teacher(case: tuple[str, str, str], make_teacher: Any) -> Path:
    return make_teacher(case[0])


@pytest.fixture
def mixer(case: tuple[str, str, str]) -> str:
    return case[1]


@pytest.fixture
def layers(case: tuple[str, str, str]) -> list[int]:
    return LAYOUTS[case[2]]


def ids(rows: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(tokens, attention_mask=mask, **settings)


@torch.no_grad()
def test_cache_equals_no_cache(teacher: Path, mixer: str, layers: list[int]) -> None:
    model = student(teacher, mixer, layers)
    whole = model(ids(), use_cache=False).logits
    cache, pieces = None, []
    for start, stop in ((0, 1), (1, 2), (2, 9), (9, 20), (20, 21)):
        output = model(ids()[:, start:stop], use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 21
    assert [isinstance(layer, MixerCacheLayer) for layer in cache.layers] == [n in layers for n in range(4)]


@torch.no_grad()
def test_a_lost_state_is_noticed(llama: Path, mixer: str) -> None:
    """The check above proves something: without the state the same comparison fails, where there is one."""
    model = student(llama, mixer, [1, 2])
    stateful = registry.spec(mixer).state_bytes(load_teacher(llama).geometry(1), model.mixers()[1].options) > 0
    whole = model(ids(), use_cache=False).logits
    cache = model(ids()[:, :9], use_cache=True)[CACHE]
    cache.layers[1].states = None
    rest = model(ids()[:, 9:], use_cache=True, **{CACHE: cache}).logits
    assert bool((rest - whole[:, 9:]).abs().max() > 1e-3) == stateful


@torch.no_grad()
def test_generation_ways_agree(teacher: Path, mixer: str, layers: list[int]) -> None:
    model = student(teacher, mixer, layers)
    tokens = ids()
    plain = generate(model, tokens, use_cache=False)
    assert torch.equal(generate(model, tokens), plain)
    assert torch.equal(generate(model, tokens, num_beams=3), generate(model, tokens, num_beams=3, use_cache=False))
    assert torch.equal(generate(model, tokens, prefill_chunk_size=4), plain)
    assert torch.equal(generate(model, tokens, cache_implementation="static"), plain)
    assert generate(model, tokens, do_sample=True, num_return_sequences=2).shape[0] == 4


@torch.no_grad()
def test_left_padding(teacher: Path, mixer: str, layers: list[int]) -> None:
    model = student(teacher, mixer, layers)
    tokens, mask = ids(), torch.ones(2, 21, dtype=torch.long)
    tokens[0, :6], mask[0, :6] = 0, 0
    alone = generate(model, tokens[:1, 6:])[0, 15:]
    assert torch.equal(generate(model, tokens, mask)[0, 21:], alone)
    assert torch.equal(generate(model, tokens[:1], mask[:1])[0, 21:], alone)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, 6:]
    torch.testing.assert_close(padded, model(tokens[:1, 6:], use_cache=False).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_documents_are_separate(teacher: Path, mixer: str, layers: list[int]) -> None:
    model = student(teacher, mixer, layers)
    lengths = [5, 1, 12, 3]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    tokens = ids(1)
    packed = model(tokens, position_ids=positions, use_cache=False).logits[0].split(lengths)
    for piece, document in zip(packed, tokens[0].split(lengths), strict=True):
        torch.testing.assert_close(piece, model(document[None], use_cache=False).logits[0], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing(teacher: Path, mixer: str, checkpointing_keeps_gradients: Any) -> None:
    checkpointing_keeps_gradients(student(teacher, mixer, [0, 2, 3]), ids())


@torch.no_grad()
def test_cache_follows_the_batch(llama: Path, mixer: str) -> None:
    model = student(llama, mixer, [0, 1, 2, 3])
    tokens = ids(3)
    cache = model(tokens[:, :-1], use_cache=True)[CACHE]
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    last = model(tokens[rows, -1:], use_cache=True, **{CACHE: cache}).logits
    whole = model(tokens[rows], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(-1)


@torch.no_grad()
def test_labels_logits_to_keep_and_num_items(llama: Path, mixer: str) -> None:
    model = student(llama, mixer, [1, 2])
    tokens = ids()
    whole = model(tokens, use_cache=False)
    torch.testing.assert_close(model(tokens, use_cache=False, logits_to_keep=1).logits, whole.logits[:, -1:])
    loss = model(tokens, labels=tokens, use_cache=False).loss
    double = model(tokens, labels=tokens, use_cache=False, num_items_in_batch=torch.tensor(80)).loss
    torch.testing.assert_close(double, loss / 2)


@torch.no_grad()
def test_a_cache_that_the_caller_made(llama: Path, mixer: str) -> None:
    from transformers import DynamicCache

    model = student(llama, mixer, [1, 2])
    cache = DynamicCache(config=model.config)
    pieces = [model(ids()[:, part], **{CACHE: cache}).logits for part in (slice(0, 20), slice(20, 21))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids(), use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert generate(model, ids(), **{CACHE: DynamicCache(config=model.config)}).shape == (2, 31)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(llama: Path, mixer: str) -> None:
    teacher = load_teacher(llama)
    cache = teacher.model(ids(), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="keys and values at layer 1"):
        student(llama, mixer, [1, 2])(ids(), **{CACHE: cache})


def test_bfloat16_keeps_decays(teacher: Path, mixer: str, tmp_path: Path) -> None:
    from relinear.distill.modeling.classes import student_classes

    model = student(teacher, mixer, [1, 2])
    model.save_pretrained(tmp_path)
    classes = student_classes(model.config.base_model_type)
    low = classes.causal_lm.from_pretrained(tmp_path, dtype=torch.bfloat16)
    keep = {name for module in model.mixers().values() for name in module.fp32_parameter_names()}
    new = any(row.source == "new" for module in model.mixers().values() for row in module.table())
    assert bool(keep) == new
    for name, parameter in low.named_parameters():
        expected = torch.float32 if name.endswith(tuple(keep)) else torch.bfloat16
        assert parameter.dtype == expected, name
    assert torch.isfinite(low(ids(), use_cache=False).logits).all()
