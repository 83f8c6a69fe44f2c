"""A window as long as the text is the attention itself: of every family, in every layer, trained and decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.families import FAMILIES
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import Teacher, load_teacher

LENGTH = 21


@pytest.fixture(scope="module", params=list(FAMILIES))
def teacher(request: pytest.FixtureRequest, make_teacher: Callable[..., Path]) -> Teacher:
    """A tiny teacher of each family in turn; windows of 8 tokens where the family has any."""
    return load_teacher(make_teacher(request.param))


def student(teacher: Teacher, long: int, **options: Any) -> Any:
    """Every layer as `swa`: with the teacher's own window, or one of `long` tokens where it has none."""
    windows = {"sliding_attention": teacher.config.sliding_window} if "sliding_attention" in teacher.layer_types else {}
    plan = {
        layer: ("swa", {"window": windows.get(kind, long), "sinks": 0, **options})
        for layer, kind in enumerate(teacher.layer_types)
    }
    return assemble(teacher, transfer(teacher, plan)[0]).eval()


def ids() -> torch.Tensor:
    return torch.randint(3, 320, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("long", [LENGTH, 64])
@pytest.mark.parametrize("expand_kv", [False, True])
def test_it_is_the_teacher(teacher: Teacher, long: int, expand_kv: bool) -> None:
    with torch.no_grad():
        expected = teacher.model(ids()).logits
        found = student(teacher, long, expand_kv=expand_kv)(ids()).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


def test_a_shorter_window_is_not(teacher: Teacher) -> None:
    """The last token sees one token less than there are; sinks give it back the first."""
    with torch.no_grad():
        expected = teacher.model(ids()).logits
        short = student(teacher, LENGTH - 1)(ids()).logits
    full = [kind for kind in teacher.layer_types if kind == "full_attention"]
    assert torch.allclose(short[:, :-1], expected[:, :-1], atol=2e-5 * float(expected.abs().max()))
    assert bool(full) != torch.allclose(short[:, -1], expected[:, -1], atol=1e-5)
    if len(full) == teacher.num_layers:
        with torch.no_grad():
            found = student(teacher, LENGTH - 1, sinks=1)(ids()).logits
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


def test_it_decodes_as_the_teacher(teacher: Teacher) -> None:
    """With a cache, token by token, past the teacher's windows; and a row padded on the left."""
    made, tokens = student(teacher, 64), ids()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    outputs = []
    for model in (made, teacher.model):
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        outputs.append(
            model.generate(tokens, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
        )
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for found, expected in zip(outputs[0].logits, outputs[1].logits, strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5
