"""One branch of a mixer alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.eval.branches import branched, only
from relinear.mixers.base import MixerInputs

X = torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gated_deltanet", "gla", "hedgehog"])
def test_the_window_alone_is_sliding_window_attention(qwen2: Path, name: str):
    teacher = load_teacher(qwen2)
    mixers, _ = transfer(teacher, {1: (name, {"window": 5}), 2: ("swa", {"window": 5, "sinks": 0})})
    place = torch.arange(19)[None]
    rotary = teacher.backbone.rotary_emb(X, place)
    mixers[2].load_state_dict({k: v for k, v in mixers[1].state_dict().items() if k in mixers[2].state_dict()})
    inputs = MixerInputs()
    both = mixers[1](X, position_embeddings=rotary, mixer_inputs=inputs)[0]
    with only(torch.nn.ModuleList(mixers.values()), "window"):
        alone = mixers[1](X, position_embeddings=rotary, mixer_inputs=inputs)[0]
    with only(torch.nn.ModuleList(mixers.values()), "linear"):
        linear = mixers[1](X, position_embeddings=rotary, mixer_inputs=inputs)[0]
    torch.testing.assert_close(alone, mixers[2](X, position_embeddings=rotary, mixer_inputs=inputs)[0])
    assert not torch.allclose(linear, alone) and not torch.allclose(both, alone)
    torch.testing.assert_close(mixers[1](X, position_embeddings=rotary, mixer_inputs=inputs)[0], both)


@torch.no_grad()
def test_no_word_of_the_far_past_passes_the_window_and_none_of_the_near_is_needed(llama: Path):
    mixers, _ = transfer(load_teacher(llama), {0: ("hedgehog", {"window": 4})})
    other = X.clone()
    other[:, :3] += 1.0
    rotary = tuple(torch.ones(1, 19, 8) * value for value in (1.0, 0.0))
    module = torch.nn.ModuleList(mixers.values())
    for branch, same in (("window", True), ("linear", False)):
        with only(module, branch):
            outs = [mixers[0](x, position_embeddings=rotary)[0][:, -1] for x in (X, other)]
        assert torch.equal(*outs) == same


def test_what_has_no_branches_is_refused(llama: Path):
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, {0: ("gated_deltanet", {}), 1: ("swa", {})})
    student = assemble(teacher, mixers)
    assert branched(student) == []
    with pytest.raises(ValueError, match="no mixer of this model has a window"), only(student, "window"):
        pass
    with pytest.raises(ValueError, match="expected one of both, linear, window"), only(student, "far"):
        pass
    with only(student, "both"):
        pass
