"""Options, registry, choice of form, head helpers, derived tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from relinear.mixers import registry
from relinear.mixers.gated_deltanet import GatedDeltaNet
from relinear.mixers.heads import HeadNorm, rotate, unit
from relinear.mixers.rwkv7 import RWKV7
from relinear.mixers.specs.base import Geometry
from relinear.mixers.specs.gated_deltanet import GatedDeltaNetOptions
from relinear.mixers.specs.rwkv7 import RWKV7Options, ranks
from relinear.mixers.transfer import repeat_heads, transfer


def test_specs_and_registry_need_no_torch():
    code = (
        "import sys; from relinear.mixers import registry; [registry.spec(n).options() for n in registry.names()];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_name_every_mistake_at_once():
    with pytest.raises(ValueError) as error:
        GatedDeltaNetOptions.parse({"bta": 1, "beta": 2.0, "gate": 1, "out_norm": "layer", "conv": 0.5})
    text = str(error.value)
    for part in (
        "bta: unknown option",
        "beta: must be at most 0.99",
        "gate: expected str",
        "out_norm: expected one of",
        "conv: expected int",
    ):
        assert part in text


def test_options_read_integers_as_floats_and_null():
    assert GatedDeltaNetOptions.parse({"half_life_min": 8}).half_life_min == 8.0
    assert isinstance(GatedDeltaNetOptions.parse({"half_life_min": 8}).half_life_min, float)
    assert RWKV7Options.parse({"gate_rank": None, "chunk": None}) == RWKV7Options()


def test_unknown_mixer_names_the_nearest():
    with pytest.raises(ValueError, match=r"Did you mean rwkv7\?"):
        registry.resolve("rwkv8")


def test_ranks_are_the_papers():
    """radlads.md §2."""
    table = {896: (64, 32, 128), 2048: (96, 64, 256), 3584: (96, 64, 416), 5120: (128, 96, 544), 8192: (160, 128, 800)}
    for hidden, (decay, value, gate) in table.items():
        found = ranks(hidden, RWKV7Options())
        assert (found["w"], found["a"], found["v"], found["g"]) == (decay, decay, value, gate)
    assert ranks(896, RWKV7Options(gate_rank=5))["g"] == 5


def test_rotate_is_transformers_rotation():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, angle = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 4)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    expected = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)[0].transpose(1, 2)
    assert torch.equal(rotate(q, (cos, sin)), expected)
    wide = torch.cat([q, torch.randn(2, 5, 3, 4)], -1)
    partial = rotate(wide, (cos, sin))
    assert torch.equal(partial[..., :8], expected) and torch.equal(partial[..., 8:], wide[..., 8:])


def test_head_norm_is_transformers_norm():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    ours, theirs = HeadNorm(8, 1e-6), Qwen3RMSNorm(8, 1e-6)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(8))
    theirs.load_state_dict(ours.state_dict())
    for x in (torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8).bfloat16()):
        assert torch.equal(ours.to(x.dtype)(x), theirs.to(x.dtype)(x))


def test_unit_vectors():
    x = torch.randn(3, 4).bfloat16()
    assert unit(x).dtype == torch.float32
    assert torch.allclose(unit(x).norm(dim=-1), torch.ones(3), atol=1e-5)
    zero = torch.zeros(3, 4, requires_grad=True)
    assert torch.autograd.grad(unit(zero).sum(), zero)[0].isfinite().all()


def test_heads_are_repeated_whole():
    """By hand: two k/v heads of two rows for four query heads. Never row by row."""
    source = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    found = repeat_heads(source, Geometry(1, 4, 2, 2))
    assert found.flatten().tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert repeat_heads(source[:, 0], Geometry(1, 4, 2, 2)).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]


@pytest.mark.parametrize(("build", "options"), [(GatedDeltaNet, GatedDeltaNetOptions), (RWKV7, RWKV7Options)])
def test_expanded_heads_start_as_shared_ones(build, options):
    """With every query head's keys and values its own, the first output is that of shared heads."""
    geometry = Geometry(16, 4, 2, 6, qkv_bias=True, qk_norm="head")
    shared, expanded = (build(geometry, options(expand_kv=e), 0, 2, True) for e in (False, True))
    attention = {row.name: torch.randn(row.shape) for row in shared.table() if row.source == "copied"}
    for mixer in (shared, expanded):
        transfer(mixer, attention, torch.Generator().manual_seed(0))
    x, angle = torch.randn(2, 20, 16), torch.randn(1, 20, 6)
    rotary = (angle.cos(), angle.sin())
    assert torch.allclose(shared(x, rotary)[0], expanded(x, rotary)[0], atol=1e-5)


def test_gates_start_open_and_decays_long():
    geometry = Geometry(16, 4, 2, 6)
    mixer = GatedDeltaNet(geometry, GatedDeltaNetOptions(half_life_min=4, half_life_max=256), 0, 2, True)
    assert mixer.g_proj.weight.abs().max() == 0
    half_lives = torch.log(torch.tensor(2.0)) / torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert torch.allclose(half_lives, torch.tensor([4.0, 16.0, 64.0, 256.0]), rtol=1e-4)
    rwkv = RWKV7(geometry, RWKV7Options(), 1, 2, False)
    assert torch.equal(rwkv.g0, torch.ones(24)) and rwkv.g2.abs().max() == 0
    assert float(rwkv.w0.detach().min()) == -6.5 and float(rwkv.w0.detach().max()) == -1.5


def test_value_residual_needs_the_lowest_layer():
    geometry = Geometry(16, 4, 2, 6, rope=False)
    upper = RWKV7(geometry, RWKV7Options(), 1, 2, False)
    with pytest.raises(ValueError, match="v_first"):
        upper(torch.randn(1, 3, 16))
    assert RWKV7.couples_layers and not GatedDeltaNet.couples_layers
