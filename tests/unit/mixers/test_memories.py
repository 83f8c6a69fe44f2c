"""What single mixers promise beyond the contract: Titans' bound, Mamba's groups, what attention without others is."""

from __future__ import annotations

import pytest
import torch

from relinear.mixers import registry
from relinear.mixers.heads import rotate
from relinear.mixers.ops.titans import OP as TITANS
from relinear.mixers.specs.base import Geometry
from relinear.mixers.transfer import transfer


def largest_output(step: float, momentum: float, chosen: torch.Tensor) -> float:
    """Of Titans' memory that never forgets, over 3000 random unit keys; gates are 0 where `chosen` (2, T) is."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, chosen.shape[1], 1, 6, generator=generator)
    theta, eta = (bound * part[None, :, None].float() for bound, part in ((step, chosen[0]), (momentum, chosen[1])))
    k = k / k.norm(dim=-1, keepdim=True)
    out, _ = TITANS.chunked(k, k, v, theta, eta, torch.zeros_like(eta))
    return float(out.abs().max())


def test_titans_does_not_resonate():
    """At the bounds of its gates, all the time or at random; with free gates it does."""
    mixer = registry.module("titans")(Geometry(8, 1, 1, 8), registry.spec("titans").options(), 0, 1, True)
    with torch.no_grad():
        for name in ("b_proj.bias", "e_bias"):
            mixer.get_parameter(name).fill_(50.0)
        gates = mixer.gates(torch.zeros(1, 1, 8))
    step, momentum = (float(gate.max()) for gate in gates[:2])
    assert step <= 1 - momentum
    always = torch.ones(2, 3000, dtype=torch.bool)
    at_random = torch.rand(2, 3000, generator=torch.Generator().manual_seed(1)) < 0.5
    assert largest_output(step, momentum, always) < 10
    assert largest_output(step, momentum, at_random) < 10
    assert not largest_output(0.99, 0.9, always) < 1e6


def mamba(geometry: Geometry, **options):
    return registry.module("mamba")(geometry, registry.spec("mamba").options.parse(options), 0, 1, True)


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
def test_mambas_groups_see_differences_of_positions(rotary):
    """What turns together is in one group: products within a group do not change when all positions move."""
    mixer = mamba(Geometry(16, 2, 1, 8, rotary=rotary), state=4)
    q, k = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)
    scores = []
    for shift in (0, 11):
        turned = []
        for x, position in ((q, 5 + shift), (k, 2 + shift)):
            angles = position * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
            angles = torch.cat([angles, angles]) if rotary == "half" else angles.repeat_interleave(2)
            turned.append(
                mixer.grouped(rotate(x, (angles.cos()[None, None], angles.sin()[None, None]), rotary[0] == "i"))
            )
        scores.append((turned[0] * turned[1]).sum(-1))
    assert scores[0].shape == (1, 1, 2, 2)
    torch.testing.assert_close(scores[0], scores[1])


def test_mambas_state_divides_the_head():
    geometry = Geometry(16, 2, 1, 24)
    assert mamba(geometry).A_log.shape == (48, 12)
    assert registry.spec("mamba").state_bytes(geometry, registry.spec("mamba").options()) == 4 * 48 * 12
    message = (
        r"layer 0: mamba cannot replace this attention: state 16 does not divide the head's 24 channels; take one of "
    )
    with pytest.raises(ValueError, match=message + "1, 2, 3, 4, 6, 8, 12, 24, or null"):
        mamba(geometry, state=16)


def test_identity_is_attention_that_sees_one_token():
    """transformers' own attention over rows of one token."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    config._attn_implementation = "eager"
    attention = LlamaAttention(config, 0)
    mixer = registry.module("identity")(Geometry(16, 4, 2, 4), registry.spec("identity").options(), 0, 1, True)
    transfer(mixer, attention.state_dict())
    x = torch.randn(1, 7, 16)
    alone = x.transpose(0, 1)
    rotary = (torch.ones(7, 1, 4), torch.zeros(7, 1, 4))
    wanted = attention(alone, position_embeddings=rotary, attention_mask=None)[0].transpose(0, 1)
    torch.testing.assert_close(mixer(x)[0], wanted)
