"""The recurrences against their equations and against each other, on raw tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from relinear.mixers.ops import gated_delta, gla, rwkv7, simple_gla
from relinear.mixers.ops.chunks import real_segments
from relinear.mixers.ops.short_conv import short_conv

BOUND = math.exp(-0.5)


def gated_delta_inputs(length, batch=2, heads=3, dk=6, dv=5, decay=3.0):
    q, k = torch.randn(2, batch, length, heads, dk).double()
    g = -torch.rand(batch, length, heads).double() * decay
    beta = torch.rand(batch, length, heads).double()
    return [q, normalize(k, dim=-1), torch.randn(batch, length, heads, dv).double(), g, beta]


def rwkv7_inputs(length, batch=2, heads=3, dk=6, dv=5):
    r, k, kappa = torch.randn(3, batch, length, heads, dk).double()
    w = -BOUND * torch.sigmoid(4 * torch.randn(batch, length, heads, dk).double())
    v = torch.randn(batch, length, heads, dv).double()
    return [r, w, k, v, normalize(kappa, dim=-1), torch.rand(batch, length, heads, dk).double()]


def simple_gla_inputs(length, batch=2, heads=3, dk=6, dv=5):
    q, k, v, g, _ = gated_delta_inputs(length, batch, heads, dk, dv)
    return [q, k, v, g]


def fixed_inputs(length, batch=2, heads=3, dk=6, dv=5):
    return [*simple_gla_inputs(length, batch, heads, dk, dv)[:3], -torch.rand(heads).double()]


def gla_inputs(length, batch=2, heads=3, dk=6, dv=5):
    q, k, v, _ = simple_gla_inputs(length, batch, heads, dk, dv)
    return [q, k, v, -5 * torch.sigmoid(4 * torch.randn(batch, length, heads, dk).double())]


OPS = pytest.mark.parametrize(
    ("op", "inputs"),
    [
        pytest.param(simple_gla, simple_gla_inputs, id="simple_gla"),
        pytest.param(simple_gla, fixed_inputs, id="fixed"),
        pytest.param(gla, gla_inputs, id="gla"),
        pytest.param(gated_delta, gated_delta_inputs, id="gated_delta"),
        pytest.param(rwkv7, rwkv7_inputs, id="rwkv7"),
    ],
)


def test_gated_delta_is_its_equation():
    """The paper's own form, S (dv, dk): S_t = S_{t-1} (alpha (I - beta k k^T)) + beta v k^T, o = S q."""
    q, k, v, g, beta = gated_delta_inputs(7, batch=1, heads=1)
    S, eye = torch.zeros(5, 6).double(), torch.eye(6).double()
    out, state = gated_delta.recurrent(q, k, v, g, beta)
    for t in range(7):
        kt, b = k[0, t, 0], beta[0, t, 0]
        S = S @ (g[0, t, 0].exp() * (eye - b * torch.outer(kt, kt))) + b * torch.outer(v[0, t, 0], kt)
        assert torch.allclose(out[0, t, 0], S @ q[0, t, 0], atol=1e-12)
    assert torch.allclose(state[0, 0], S.T, atol=1e-12)


def test_rwkv7_is_its_equation():
    """The paper's own form, S (dv, dk): S_t = S_{t-1} (diag(w) - kappa^T (a * kappa)) + v^T k, o = S r."""
    r, w, k, v, kappa, a = rwkv7_inputs(7, batch=1, heads=1)
    S = torch.zeros(5, 6).double()
    out, state = rwkv7.recurrent(r, w, k, v, kappa, a)
    for t in range(7):
        at = (0, t, 0)
        S = S @ (torch.diag(w[at].exp()) - torch.outer(kappa[at], a[at] * kappa[at])) + torch.outer(v[at], k[at])
        assert torch.allclose(out[at], S @ r[at], atol=1e-12)
    assert torch.allclose(state[0, 0], S.T, atol=1e-12)


@OPS
@pytest.mark.parametrize("chunk", [1, 2, 16, 32])
@pytest.mark.parametrize("length", [1, 15, 64, 130])
def test_chunked_equals_recurrent(op, inputs, chunk, length):
    x = [part.requires_grad_() for part in inputs(length)]
    state = torch.randn(2, 3, 6, 5).double().requires_grad_()
    padding = torch.rand(2, length) > 0.2
    segments = torch.randint(0, 2, (2, length)).cumsum(1) // 3
    for places in ({}, {"padding": padding}, {"segments": segments}, {"padding": padding, "segments": segments}):
        found, expected = (
            [*f(*x, state=state, **places)] for f in (lambda *a, **k: op.chunked(*a, chunk=chunk, **k), op.recurrent)
        )
        for results in (found, expected):
            weights = [
                torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).double() for part in results[:2]
            ]
            loss = sum((part * weight).sum() for part, weight in zip(results[:2], weights, strict=True))
            results += torch.autograd.grad(loss, [*x, state])
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@OPS
def test_gradients_are_right(op, inputs):
    """Numerically, through three chunks, with a border and a gap, and through the final state."""
    x = [part.requires_grad_() for part in inputs(5, batch=1, heads=1, dk=3, dv=2)]
    state = torch.randn(1, 1, 3, 2).double().requires_grad_()
    padding = torch.tensor([[True, True, False, True, True]])
    segments = torch.tensor([[0, 0, 0, 0, 1]])

    def run(*args):
        out, final = op.chunked(*args[:-1], state=args[-1], padding=padding, segments=segments, chunk=2)
        return out, final * 2

    assert torch.autograd.gradcheck(run, (*x, state))


def test_strongest_decay_and_equal_keys_in_fp32():
    """Every key the same, beta 1: the inverse of a matrix of ones. Decays at the floor and at zero, side by side."""
    q, k, v, _, _ = gated_delta_inputs(256, dk=8, dv=8)
    k = torch.ones_like(k) / 8**0.5
    beta = torch.ones(2, 256, 3).double()
    for g in (
        torch.zeros(2, 256, 3),
        torch.full((2, 256, 3), -5.0),
        -5.0 * (torch.arange(256) % 2)[None, :, None].expand(2, 256, 3),
        torch.full((2, 256, 3), -1e4),
    ):
        truth, _ = gated_delta.recurrent(q, k, v, g.double(), beta)
        leaves = [part.float().requires_grad_() for part in (q, k, v, g, beta)]
        for chunk in (16, 32, 64):
            found, _ = gated_delta.chunked(*leaves, chunk=chunk)
            assert torch.allclose(found.double(), truth, atol=1e-4)
            assert all(part.isfinite().all() for part in torch.autograd.grad(found.sum(), leaves))


def test_rwkv7_at_its_decay_bound_in_fp32():
    r, some, k, v, kappa, a = rwkv7_inputs(256, dk=8, dv=8)
    for w in (
        torch.full_like(some, -BOUND),
        torch.zeros_like(some),
        -BOUND * ((torch.arange(256) // 40) % 2)[None, :, None, None].double().expand_as(some),
    ):
        truth, _ = rwkv7.recurrent(r, w, k, v, kappa, a)
        leaves = [part.float().requires_grad_() for part in (r, w, k, v, kappa, a)]
        for chunk in (16, 32, 64):
            found, _ = rwkv7.chunked(*leaves, chunk=chunk)
            assert float((found.double() - truth).detach().abs().max() / truth.abs().max()) < 2e-5
            assert all(part.isfinite().all() for part in torch.autograd.grad(found.sum(), leaves))


def test_rwkv7_refuses_chunks_that_could_overflow():
    with pytest.raises(ValueError, match="64"):
        rwkv7.chunked(*rwkv7_inputs(4), chunk=128)


@OPS
def test_a_state_of_another_shape_is_an_error(op, inputs):
    for form in (op.recurrent, op.chunked):
        with pytest.raises(ValueError, match="state has shape"):
            form(*inputs(4), state=torch.zeros(2, 3, 5, 6))


@OPS
def test_long_rows_cost_linear_backward_memory_and_time(op, inputs):
    """Tensors saved for backward grow with T, not with its square."""

    def saved(length):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.untyped_storage().nbytes()
            return tensor

        x = [part.float().requires_grad_() for part in inputs(length)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op.chunked(*x)
        return total

    assert saved(1024) < 4.5 * saved(256)


def test_padding_takes_the_number_of_its_neighbour():
    segments = torch.tensor([[0, 1, 2, 3, 3, 4, 5]])
    real = torch.tensor([[False, False, True, True, False, True, False]])
    assert real_segments(segments, real).tolist() == [[2, 2, 2, 3, 3, 4, 4]]
    assert real_segments(segments, torch.zeros_like(real)) is not None
    assert real_segments(None, real) is None and real_segments(segments, None) is segments


def test_short_conv_is_a_causal_convolution():
    x, taps = torch.randn(2, 9, 4).double(), torch.randn(4, 3).double()
    out, buffer = short_conv(x, taps)
    expected = torch.nn.functional.conv1d(x.mT, taps[:, None], padding=2, groups=4)[..., :9].mT
    assert torch.allclose(out, expected) and torch.equal(buffer, x[:, -2:])


def test_short_conv_stops_at_borders_and_skips_padding():
    x, taps = torch.randn(1, 6, 4).double(), torch.randn(4, 3).double()
    whole, _ = short_conv(x[:, 2:5], taps)
    segments = torch.tensor([[0, 0, 1, 1, 1, 2]])
    out, buffer = short_conv(x, taps, segments=segments)
    assert torch.allclose(out[:, 2:5], whole)
    assert torch.equal(buffer, torch.stack([torch.zeros(4).double(), x[0, 5]])[None])
    padding = torch.tensor([[False, False, True, True, True, False]])
    out, buffer = short_conv(x, taps, padding=padding)
    assert torch.allclose(out[:, 2:5], whole) and torch.equal(buffer, x[:, 3:5])
