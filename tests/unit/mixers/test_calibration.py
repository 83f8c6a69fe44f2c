"""What mixers make of an attention's statistics."""

from __future__ import annotations

import math

import pytest
import torch

from relinear.mixers import registry
from relinear.mixers.base import MixerInputs
from relinear.mixers.calibration import AttentionStats, channel_rates, entropy_strength, head_rates
from relinear.mixers.specs.base import Geometry

SHAPE = Geometry(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8)
EDGES = torch.tensor([0.0, 1, 2, 3, 4, 8, 16, 32, 64], dtype=torch.float64)
SHARES = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.25, 0.25, 0]], dtype=torch.float64)
STATS = AttentionStats(
    distance=torch.tensor([1.0, 10.0, 40.0, 200.0], dtype=torch.float64),
    histogram=SHARES.repeat(2, 1),
    edges=EDGES,
    entropy=torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64),
    near=torch.ones(4, dtype=torch.float64),
    window=64,
)
ONE = torch.ones(4, dtype=torch.float64)


def test_quantiles_are_those_of_the_distribution():
    assert STATS.quantiles(2)[:2].tolist() == [[0.5, 1.5], [6.0, 16.0]]
    assert bool((STATS.quantiles(8).diff(dim=1) > 0).all())


def test_half_lives_are_the_distances_times_the_reach():
    lives = math.log(2) / head_rates(STATS, 2 * ONE)
    torch.testing.assert_close(lives, 2 * STATS.distance)
    same = math.log(2) / channel_rates(STATS, ONE, 0 * ONE, 4, 2)
    torch.testing.assert_close(same, STATS.distance[:, None].expand(4, 8))
    spread = channel_rates(STATS, ONE, ONE, 4, 2)
    assert torch.equal(spread[:, :4], spread[:, 4:])  # what turns together decays together
    assert bool((spread[:, :4].diff(dim=1) <= 0).all())
    torch.testing.assert_close(math.log(2) / spread[1, :4], STATS.quantiles(4)[1])


def test_strengths_fall_with_the_entropy():
    torch.testing.assert_close(
        entropy_strength(STATS), torch.tensor([0.7, 0.5 + 0.2 / 3, 0.5 - 0.2 / 3, 0.3]).double(), rtol=1e-6, atol=1e-6
    )


# Half-life in tokens -> what one step leaves of a state, as each mixer's own parameters say.
@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2", "gla", "hgrn2", "rwkv6", "kda"])
def test_a_mixer_decays_as_it_is_told(name: str):
    cls = registry.module(name)
    mixer = cls(SHAPE, cls.spec.options.parse({}), 0, 4, True)
    mixer.reset_parameters(torch.Generator().manual_seed(0))
    knobs = {key: values[0] * ONE for key, values in mixer.knobs().items()}
    mixer.calibrate(STATS, {**knobs, "reach": ONE, "spread": 0 * ONE})
    x = 1e-6 * torch.randn(1, 3, 32)  # too small to move what depends on the token
    if hasattr(mixer, "log_decay"):
        given = x.expand(5, 1, 3, 32) if name == "rwkv6" else x
        g = mixer.log_decay(given)
    else:
        g = mixer.gates(x)[0]
    wanted = -math.log(2) / STATS.distance.clamp(min=1.0)
    found = g[0, 1].double() if g.dim() == 3 else g[0, 1].double().mean(-1)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7", "gla"])
def test_gates_are_one_where_the_slopes_are_zero_and_follow_them(name: str):
    cls = registry.module(name)
    mixer = cls(SHAPE, cls.spec.options.parse({"rope": False}), 0, 4, True)
    mixer.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    given = mixer.gate_inputs(x)
    slopes = torch.zeros(4, given.shape[-1], dtype=torch.float64)
    seen: list[torch.Tensor] = []
    mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(-1, (4, 8))))
    mixer.set_gates(slopes)
    mixer(x, mixer_inputs=MixerInputs())
    slopes[2, 1] = 1e-3
    mixer.set_gates(slopes)
    mixer(x, mixer_inputs=MixerInputs())
    factor = seen[1] / seen[0]
    torch.testing.assert_close(factor[:, :, 2], (1 + 1e-3 * given[..., 1:2]).expand(-1, -1, 8), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factor[:, :, [0, 1, 3]], torch.ones(1, 5, 3, 8))


def test_every_knob_of_every_mixer_can_be_set_and_stays_finite():
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(2))
    turned = torch.ones(1, 9, 8), torch.zeros(1, 9, 8)
    for name in registry.names():
        cls = registry.module(name)
        mixer = cls(SHAPE, cls.spec.options.parse({}), 0, 4, True)
        mixer.reset_parameters(torch.Generator().manual_seed(0))
        options = mixer.knobs()
        for knob, values in options.items():
            for value in (min(values), max(values)):
                mixer.calibrate(STATS, {**{key: v[0] * ONE for key, v in options.items()}, knob: value * ONE})
                out = mixer(x, position_embeddings=turned, mixer_inputs=MixerInputs())[0]
                assert bool(out.isfinite().all()), (name, knob, value)
