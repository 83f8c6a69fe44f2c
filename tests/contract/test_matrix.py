"""Mixers that materialise: the mixing matrix, times the values, is what the heads give before norm and gate."""

from __future__ import annotations

import pytest
import torch

from relinear.mixers import registry
from relinear.mixers.base import MixerInputs

LENGTH = 19


def heads_and_values(layer, x, rotary, inputs):
    """What the heads of one layer give, (B, T, H, d), the values that they mix, (B, T, H, d), and the layer output."""
    seen = {}
    output, values = layer.output, layer.values

    def note_values(x, v, inputs):
        seen["v"] = values(x, v, inputs)
        return seen["v"]

    def note_output(x, o):
        seen["o"] = o
        return output(x, o)

    layer.values, layer.output = note_values, note_output
    try:
        made, _ = layer.mix(x, rotary, inputs, None)
    finally:
        del layer.values, layer.output
    return seen["o"].double(), layer.repeat(seen["v"]).double(), made


def packed(batch, length, kind):
    """MixerInputs and positions: plain, two documents per row, or with the first tokens of row 0 padded."""
    place = torch.arange(length).expand(batch, length)
    if kind == "packed":
        segments = (place >= 8).long() + (place >= 15).long()
        return MixerInputs(segments=segments), torch.where(place >= 8, place - 8, place) - 7 * (place >= 15)
    if kind == "padded":
        padding = torch.ones(batch, length, dtype=torch.bool)
        padding[0, :5] = False
        return MixerInputs(padding=padding), (padding.cumsum(1) - 1).clamp(min=0)
    return MixerInputs(), place


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_matrix_times_values_is_what_the_heads_give(name, options, kind, gqa, make_stack, make_tokens, close):
    stack = make_stack(name, options, gqa).double()
    length = stack.beyond(LENGTH)
    inputs, positions = packed(2, length, kind)
    x = make_tokens(2, length, gqa.hidden_size)
    rotary = stack.rotary(positions, torch.float64)
    for layer in stack.mixers():
        if layer.spec.no_matrix(layer.options):
            with pytest.raises(ValueError, match=f"layer {layer.layer_idx}: {name} has no mixing matrix: "):
                layer.matrix(x, rotary, inputs)
            continue
        o, v, _ = heads_and_values(layer, x, rotary, inputs)
        matrix = layer.matrix(x, rotary, MixerInputs(inputs.padding, inputs.segments))
        assert matrix.shape == (2, gqa.num_heads, length, length)
        made = (matrix @ v.transpose(1, 2)).transpose(1, 2)
        if getattr(layer, "has_residual", False) and layer.has_branches:
            continue  # the window mixes the values from before the residual: no one matrix does both
        close(made, o, 1e-9, "heads")
        assert not matrix.triu(1).any()
        if inputs.segments is not None:
            other = inputs.segments[:, :, None] != inputs.segments[:, None]
            assert not matrix.masked_select(other[:, None]).any()
        if inputs.padding is not None:
            unreal = ~(inputs.padding[:, :, None] & inputs.padding[:, None])
            off = ~torch.eye(length, dtype=torch.bool)  # Mamba-2's skip lets a padded token see itself
            assert not (matrix.masked_select((unreal & off)[:, None]).abs() > 1e-100).any()


def test_matrices_learn(name, gqa, make_stack, make_tokens):
    """The gradient reaches queries and keys, and no value, gate or output projection."""
    layer = make_stack(name, {}, gqa).mixers()[0]
    if layer.spec.no_matrix(layer.options):
        pytest.skip(f"{name} has no matrix")
    x = make_tokens(1, 9, gqa.hidden_size).float()
    positions = torch.arange(9)[None]
    stack = make_stack(name, {}, gqa)
    matrix = layer.matrix(x, stack.rotary(positions, torch.float32), MixerInputs())
    assert matrix.dtype == torch.float32
    matrix.square().sum().backward()
    reached = {key for key, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"q_proj.weight", "k_proj.weight"} <= reached
    assert not {"v_proj.weight", "o_proj.weight", "g_proj.weight"} & reached


def test_most_mixers_materialise():
    refused = [n for n in registry.names() if registry.spec(n).no_matrix(registry.spec(n).options())]
    assert refused == ["mamba", "identity"]
