"""The forms of a recurrence agree, forward and backward, and stay finite."""

from __future__ import annotations

import pytest
import torch

LENGTHS = [1, 2, 15, 33, 63, 65, 130]


def results(stack, x, cache, positions=None, padding=None, segments=None):
    """Output, every state and the gradients of x, of the incoming states and of every parameter."""
    x = x.requires_grad_()
    incoming = [part.requires_grad_() for layer in cache.layers for part in layer.state or ()]
    out = stack(x, positions, padding, segments, cache)
    states = [part for layer in cache.layers for part in layer.state]
    generator = torch.Generator().manual_seed(9)
    loss = out.new_zeros(())
    for part in (out, *states):
        weights = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)
        loss = loss + (part * weights).sum()
    names = ["x", *(f"state {i}" for i in range(len(incoming))), *(n for n, _ in stack.named_parameters())]
    grads = torch.autograd.grad(loss, [x, *incoming, *stack.parameters()], allow_unused=True)
    named = {f"gradient of {n}": g for n, g in zip(names, grads, strict=True)}
    return {"output": out, **{f"final state {i}": s for i, s in enumerate(states)}, **named}


def run(make_stack, make_cache, name, options, geometry, x, dtype, form, with_state, **places):
    stack = make_stack(name, options, geometry, form).to(dtype)
    cache = make_cache(2)
    if with_state:
        # A state that the mixer itself can produce, the same in every run up to rounding.
        past = make_stack(name, options, geometry, "recurrent").to(dtype)
        with torch.no_grad():
            shape = (x.shape[0], past.beyond(5), x.shape[2])
            past(torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype), cache=cache)
    return results(stack, x.detach().to(dtype), cache, **places)


def compare(close, found, expected, tolerance):
    for key, value in expected.items():
        pair = [part for part in (found[key], value) if part is not None]
        if len(pair) == 2:
            close(*pair, tolerance, key)
        else:  # no gradient in one form must be none or zero in the other: a count in a state
            assert not any(part.any() for part in pair), key


@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_recurrent(name, length, small, make_stack, make_cache, make_tokens, close):
    """fp32 chunks against fp64 steps."""
    x = make_tokens(2, length, small.hidden_size)
    args = (make_stack, make_cache, name, {}, small, x)
    truth = run(*args, torch.float64, "recurrent", True)
    compare(close, run(*args, torch.float64, "chunked", True), truth, 1e-10)
    compare(close, run(*args, torch.float32, "chunked", True), truth, 2e-5)
    compare(close, run(*args, torch.float32, "recurrent", True), truth, 2e-5)


def test_every_option(name, any_options, small, make_stack, make_cache, make_tokens, close):
    x = make_tokens(2, 70, small.hidden_size)
    args = (make_stack, make_cache, name, any_options, small, x)
    for with_state in (False, True):
        truth = run(*args, torch.float64, "recurrent", with_state)
        compare(close, run(*args, torch.float32, "chunked", with_state), truth, 1e-4)


def test_forms_agree_at_borders_and_padding(name, small, make_stack, make_cache, make_tokens, close):
    """Borders at and beside chunk limits; padding left, right and both; all with an incoming state."""
    length = 100
    x = make_tokens(3, length, small.hidden_size)
    borders = torch.zeros(3, length, dtype=torch.long)
    borders[0, [1, 16, 32, 33, 64, 99]] = 1
    borders[1, [15, 31, 63, 65, 66, 67]] = 1
    real = torch.ones(3, length, dtype=torch.bool)
    real[0, :40] = False
    real[1, 70:] = False
    real[2, :3], real[2, 97:] = False, False
    args = (make_stack, make_cache, name, {}, small, x)
    for places in (
        {"segments": borders.cumsum(1)},
        {"padding": real},
        {"segments": borders.cumsum(1) + 5, "padding": real},
    ):
        truth = run(*args, torch.float64, "recurrent", True, **places)
        compare(close, run(*args, torch.float64, "chunked", True, **places), truth, 1e-10)
        compare(close, run(*args, torch.float32, "chunked", True, **places), truth, 2e-5)


def test_bf16_inputs_and_parameters(name, options, small, make_stack, make_cache, make_tokens):
    """bf16 outside, fp32 inside: both forms as near to the fp64 truth as bf16 rounding allows, output in bf16."""
    x = make_tokens(2, 50, small.hidden_size).bfloat16()
    stacks = {form: make_stack(name, options, small, form) for form in ("recurrent", "chunked")}
    for stack in stacks.values():
        stack.bfloat16()
        for mixer in stack.mixers():
            for fp32 in mixer.fp32_parameter_names():
                mixer.get_parameter(fp32).data = mixer.get_parameter(fp32).data.float()
    exact = make_stack(name, options, small, "recurrent")
    exact.load_state_dict({key: value.float() for key, value in stacks["recurrent"].state_dict().items()})
    truth = exact.double()(x.double()).detach()
    for stack in stacks.values():
        cache = make_cache(2)
        out = stack(x, cache=cache)
        assert out.dtype == torch.bfloat16
        assert all(part.dtype == torch.float32 for layer in cache.layers for part in layer.state)
        # Over all numbers: a norm may blow up the rounding of a single small one.
        assert float((out.detach().double() - truth).norm() / truth.norm()) <= 3e-2
        if out.requires_grad:
            out.float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in stack.parameters())


def test_autocast(name, small, make_stack, make_tokens, close):
    """The recurrence stays in fp32 under autocast, forward and backward."""
    x = make_tokens(2, 50, small.hidden_size).float()
    stack = make_stack(name, {}, small, "chunked")
    with torch.autocast("cpu", torch.bfloat16):
        out = stack(x)
        out.float().square().sum().backward()
    close(out, stack(x), 6e-2, "output")
    assert all(p.grad is None or p.grad.isfinite().all() for p in stack.parameters())


@pytest.mark.parametrize("scale", [1.0, 8.0, 60.0])
def test_extreme_parameters_stay_finite(name, scale, gqa, make_stack, make_tokens):
    """Decays and gates driven to their ends, alternating along a long row with borders."""
    length = 1000
    borders = torch.zeros(2, length, dtype=torch.long)
    borders[:, [100, 101, 555]] = 1
    for sign in (1.0, -1.0):
        for mixer in make_stack(name, {}, gqa, "chunked").mixers():
            stack = make_stack(name, {}, gqa, "chunked")
            layer = stack.mixers()[mixer.layer_idx]
            new = {row.name for row in layer.table() if row.source == "new"}
            with torch.no_grad():
                for key, parameter in layer.named_parameters():
                    if key in new:
                        parameter.copy_(parameter * scale if parameter.dim() == 2 else sign * scale * torch.ones(()))
            x = make_tokens(2, length, gqa.hidden_size).float().requires_grad_()
            for segments in (None, borders.cumsum(1)):
                out = stack(x, segments=segments)
                assert out.isfinite().all()
                grads = torch.autograd.grad(out.mean(), [x, *stack.parameters()], allow_unused=True)
                assert all(g is None or g.isfinite().all() for g in grads)
