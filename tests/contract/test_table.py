"""What a mixer says of itself without torch is what its module is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relinear.mixers import registry
from relinear.mixers.base import MixerInputs


def test_poison_works():
    assert torch.empty(1000).isnan().all()


def test_parameters_are_the_rows_of_the_table(name, any_options, small, make_stack):
    for mixer in make_stack(name, any_options, small).mixers():
        rows = {row.name: row.shape for row in mixer.table()}
        assert {key: tuple(value.shape) for key, value in mixer.named_parameters()} == rows
        assert len(rows) == len(mixer.table()), "a name occurs twice"
        assert not list(mixer.buffers()), "what is not in the table would not survive a checkpoint"
        assert set(mixer.fp32_parameter_names()) == {row.name for row in mixer.table() if row.fp32}


def test_a_new_module_is_finite_and_works(name, geometry):
    """Without transfer and without noise: every parameter set by reset_parameters, none left as the memory was."""
    build, parsed = registry.module(name), registry.spec(name).options()
    for mixer in (build(geometry, parsed, 0, 1, True), build(geometry, parsed, 1, 2, True)):
        assert all(parameter.isfinite().all() for parameter in mixer.parameters())
        rotary = (torch.ones(1, 5, geometry.head_dim), torch.zeros(1, 5, geometry.head_dim))
        out, _ = mixer(torch.randn(2, 5, geometry.hidden_size), position_embeddings=rotary)
        assert out.shape == (2, 5, geometry.hidden_size) and out.isfinite().all()


def test_registry_and_spec_agree(name):
    spec = registry.spec(name)
    assert spec.name == name and spec.title and spec.paper.startswith("https://")
    assert registry.module(name).spec is spec
    assert [registry.resolve(alias.upper()) for alias in spec.aliases] == [name] * len(spec.aliases)
    assert registry._MIXERS[name][2] == spec.aliases


def test_options_are_documented_and_round_trip(name):
    cls = registry.spec(name).options
    for f in dataclasses.fields(cls):
        assert f.metadata["help"] and {"low", "high", "choices"} <= set(f.metadata), f.name
        numeric = {"int", "float"} & set(str(f.type).split(" | "))
        assert not numeric or f.metadata["choices"] or f.metadata["low"] is not None, f"{f.name} has no lower bound"
        assert cls.parse({f.name: f.default}) == cls()
    assert cls.parse(cls().to_dict()) == cls()


def test_reset_parameters_is_reproducible(name, options, small, make_stack):
    for mixer in make_stack(name, options, small).mixers():
        mixer.reset_parameters(torch.Generator().manual_seed(3))
        first = {key: value.clone() for key, value in mixer.named_parameters()}
        torch.rand(7)  # the global state must not matter
        mixer.reset_parameters(torch.Generator().manual_seed(3))
        assert all(torch.equal(value, first[key]) for key, value in mixer.named_parameters())


def test_state_is_as_large_as_the_spec_says_and_does_not_grow(
    name, options, small, make_stack, make_cache, make_tokens
):
    stack = make_stack(name, options, small)
    parsed = stack.mixers()[0].options
    expected = registry.spec(name).state_bytes(small, parsed)
    for length in (1, 3, 200):
        cache = make_cache(2)
        stack(make_tokens(3, length, small.hidden_size).float(), cache=cache)
        for layer in cache.layers:
            assert all(part.dtype == torch.float32 and part.shape[0] == 3 for part in layer.state)
            held = sum(part.untyped_storage().nbytes() for part in {p.data_ptr(): p for p in layer.state}.values())
            assert sum(part.numel() * 4 for part in layer.state) == 3 * expected
            assert held == 3 * expected, "the state keeps a larger tensor alive"
            assert layer.tokens == length


def _triangular_flops(matrix, right, *args, out_shape=None, **kwargs) -> int:
    batch, size, columns = right
    return batch * size * size * columns


def _product_flops(added, left, right, *args, out_shape=None, **kwargs) -> int:
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[-1]


@pytest.fixture
def counted():
    """counted() -> a counter of torch's that knows the products which it does not know by itself."""
    aten = torch.ops.aten
    unknown = {aten.linalg_solve_triangular: _triangular_flops, aten.baddbmm_: _product_flops}
    return lambda: FlopCounterMode(display=False, custom_mapping=unknown)


def _parts(name, any_options, small, gradient=False):
    """A mixer, a call of it on many chunks, longer than a window, and how many tokens that has."""
    parsed = registry.spec(name).options.parse(any_options)
    mixer = registry.module(name)(small, parsed, 1, 2, False)
    batch, length = 2, 256 * (1 + -(-getattr(parsed, "window", 0) // 256))
    inputs = MixerInputs()
    lower = registry.module(name)(small, parsed, 0, 2, True)
    rotary = (torch.ones(1, length, small.head_dim), torch.zeros(1, length, small.head_dim))
    x = torch.randn(batch, length, small.hidden_size, requires_grad=gradient)
    with torch.no_grad():
        lower(x, position_embeddings=rotary, mixer_inputs=inputs)
    return parsed, lambda: mixer(x, position_embeddings=rotary, mixer_inputs=inputs)[0], batch * length


def test_flops_are_those_of_the_matrix_products(name, any_options, small, counted):
    parsed, call, tokens = _parts(name, any_options, small)
    with torch.no_grad(), counted() as counter:
        call()
    found = counter.get_total_flops() / tokens
    assert abs(registry.spec(name).flops_per_token(small, parsed) - found) <= 0.01 * found


@pytest.mark.parametrize("gradient", [True, False])
def test_backward_flops_are_those_of_the_matrix_products(name, any_options, small, counted, gradient):
    spec = registry.spec(name)
    parsed, call, tokens = _parts(name, any_options, small, gradient)
    out = call()
    if not out.requires_grad:  # nothing in it to train
        assert spec.backward_flops(small, parsed) == 0
        return
    with counted() as counter:
        out.backward(torch.ones_like(out))
    found = counter.get_total_flops() / tokens
    assert abs(spec.backward_flops(small, parsed, gradient) - found) <= 0.02 * found
