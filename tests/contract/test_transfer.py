"""Where every parameter comes from."""

from __future__ import annotations

import pytest
import torch

from relinear.mixers import registry
from relinear.mixers.transfer import transfer


def attention_tensors(geometry, dtype=torch.float32):
    """What transformers' attention of this geometry holds."""
    generator = torch.Generator().manual_seed(1)
    widths = {"q": geometry.inner_size, "k": geometry.kv_size, "v": geometry.kv_size}
    shapes = {f"{part}_proj.weight": (width, geometry.hidden_size) for part, width in widths.items()}
    shapes["o_proj.weight"] = (geometry.hidden_size, geometry.inner_size)
    if geometry.qkv_bias:
        shapes |= {f"{part}_proj.bias": (width,) for part, width in widths.items()}
    if geometry.o_bias:
        shapes["o_proj.bias"] = (geometry.hidden_size,)
    if geometry.qk_norm:
        full = geometry.qk_norm == "full"
        shapes |= {f"{part}_norm.weight": (widths[part] if full else geometry.head_dim,) for part in "qk"}
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def build(name, options, geometry, layer=1):
    return registry.module(name)(geometry, registry.spec(name).options.parse(options), layer, 2, layer == 0)


def test_every_geometry(name, geometry):
    check_transfer(name, {}, geometry)


def test_every_option(name, any_options, small):
    check_transfer(name, any_options, small)


def check_transfer(name, options, geometry):
    """The report names every parameter, and each holds what the report says."""
    attention = attention_tensors(geometry)
    for layer in (0, 1):
        mixer = build(name, options, geometry, layer)
        report = transfer(mixer, attention, torch.Generator().manual_seed(0))
        parameters = dict(mixer.named_parameters())
        assert sorted([*report.copied, *report.derived, *report.new]) == sorted(parameters)
        for key, origin in report.copied.items():
            assert torch.equal(parameters[key], attention[origin]), key
        for row in mixer.table():
            assert getattr(report, row.source)[row.name] == row.origin
        assert sum(report.parameters.values()) == sum(p.numel() for p in parameters.values())
        fresh = build(name, options, geometry, layer)
        fresh.reset_parameters(torch.Generator().manual_seed(0))
        for key in report.new:
            assert torch.equal(parameters[key], fresh.get_parameter(key)), key
        assert all(p.isfinite().all() for p in parameters.values())


def test_transfer_is_a_function_of_its_seed(name, small):
    attention = attention_tensors(small)
    mixers = [build(name, {}, small) for _ in range(2)]
    for mixer in mixers:
        torch.rand(3)
        transfer(mixer, attention, torch.Generator().manual_seed(4))
    for a, b in zip(mixers[0].parameters(), mixers[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_dropped_or_missing(name, small):
    attention = attention_tensors(small)
    mixer = build(name, {}, small)
    dropped = mixer.spec.drops(small, mixer.options)
    assert transfer(mixer, attention).dropped == [key for key in attention if key in dropped]
    assert not set(dropped) - set(attention), "drops what is not there"
    for key in attention:
        if key in dropped:
            continue
        with pytest.raises(ValueError, match=f"needs {key}, which the attention lacks"):
            transfer(build(name, {}, small), {k: v for k, v in attention.items() if k != key})
    with pytest.raises(ValueError, match="sinks would be dropped"):
        transfer(build(name, {}, small), {**attention, "sinks": torch.zeros(4)})
    with pytest.raises(ValueError, match="shape"):
        transfer(build(name, {}, small), {**attention, "o_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="would lose bits"):
        transfer(build(name, {}, small).bfloat16(), attention)


def test_parameters_and_rows_must_pair(name, small):
    mixer = build(name, {}, small)
    mixer.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="parameter extra has no row"):
        transfer(mixer, attention_tensors(small))
    mixer = build(name, {}, small)
    missing = mixer.table()[-1].name
    path, _, leaf = missing.rpartition(".")
    delattr(mixer.get_submodule(path), leaf)
    with pytest.raises(ValueError, match=f"row {missing} has no parameter"):
        transfer(mixer, attention_tensors(small))


def test_bf16_attention_is_copied_bit_exact(name, small):
    attention = attention_tensors(small, torch.bfloat16)
    mixer = build(name, {}, small)
    report = transfer(mixer, attention)
    for key, origin in report.copied.items():
        assert torch.equal(mixer.get_parameter(key).bfloat16(), attention[origin])


def test_a_failed_transfer_changes_nothing(name, small):
    mixer = build(name, {}, small)
    before = {key: value.clone() for key, value in mixer.named_parameters()}
    with pytest.raises(ValueError):
        transfer(mixer, {**attention_tensors(small), "sinks": torch.zeros(4)})
    assert all(torch.equal(value, before[key]) for key, value in mixer.named_parameters())


def test_grouped_heads_read_their_own_keys_and_values(name, geometry, make_tokens):
    """Query head h uses key/value head h // group. Silence one k/v head: exactly its group's outputs change."""
    mixer = build(name, {}, geometry, layer=0)
    attention = attention_tensors(geometry)
    transfer(mixer, attention)
    mixer.double()
    # With o_proj the identity the output shows each head's channels.
    inner = geometry.inner_size
    mixer.o_proj = torch.nn.Linear(inner, inner, bias=False).double()
    with torch.no_grad():
        mixer.o_proj.weight.copy_(torch.eye(inner))
    x = make_tokens(1, 20, geometry.hidden_size)
    rotary = (torch.ones(1, 20, geometry.head_dim).double(), torch.zeros(1, 20, geometry.head_dim).double())
    before, _ = mixer(x, position_embeddings=rotary)
    group = geometry.num_heads // geometry.num_kv_heads
    for kv in range(geometry.num_kv_heads):
        changed = dict(mixer.named_parameters())["v_proj.weight"]
        rows = slice(kv * geometry.head_dim, (kv + 1) * geometry.head_dim)
        saved = changed.detach().clone()
        with torch.no_grad():
            changed[rows] += 1.0
        after, _ = mixer(x, position_embeddings=rotary)
        with torch.no_grad():
            changed.copy_(saved)
        moved = (after - before).unflatten(-1, (geometry.num_heads, -1)).abs().amax((0, 1, 3)) > 1e-9
        assert moved.tolist() == [h // group == kv for h in range(geometry.num_heads)]
