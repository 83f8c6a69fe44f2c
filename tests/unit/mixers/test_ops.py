"""The recurrences against their equations and against each other, on raw tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from relinear.mixers.ops import gated_delta, gla, rwkv7, segmented, simple_gla
from relinear.mixers.ops.chunks import real_segments
from relinear.mixers.ops.op import Op
from relinear.mixers.ops.short_conv import short_conv

BOUND = math.exp(-0.5)


def gated_delta_inputs(length, batch=2, heads=3, dk=6, dv=5, decay=3.0):
    q, k = torch.randn(2, batch, length, heads, dk).double()
    g = -torch.rand(batch, length, heads).double() * decay
    beta = torch.rand(batch, length, heads).double()
    return [q, normalize(k, dim=-1), torch.randn(batch, length, heads, dv).double(), g, beta]


def deltanet_inputs(length, **sizes):
    q, k, v, _, beta = gated_delta_inputs(length, **sizes)
    return [q, k, v, beta]


def simple_gla_inputs(length, **sizes):
    return gated_delta_inputs(length, **sizes)[:4]


def fixed_inputs(length, **sizes):
    q, k, v, g = simple_gla_inputs(length, **sizes)
    return [q, k, v, g[0, 0].clone()]


def gla_inputs(length, batch=2, heads=3, dk=6, dv=5):
    q, k, v, _ = simple_gla_inputs(length, batch=batch, heads=heads, dk=dk, dv=dv)
    return [q, k, v, -5 * torch.sigmoid(4 * torch.randn(batch, length, heads, dk).double())]


def rwkv7_inputs(length, batch=2, heads=3, dk=6, dv=5):
    r, k, kappa = torch.randn(3, batch, length, heads, dk).double()
    w = -BOUND * torch.sigmoid(4 * torch.randn(batch, length, heads, dk).double())
    v = torch.randn(batch, length, heads, dv).double()
    return [r, w, k, v, normalize(kappa, dim=-1), torch.rand(batch, length, heads, dk).double()]


deltanet = Op(
    "deltanet",
    lambda q, k, v, beta, **options: gated_delta.recurrent(q, k, v, None, beta, **options),
    lambda q, k, v, beta, **options: gated_delta.chunked(q, k, v, None, beta, **options),
    lambda q, k, v, beta, state: gated_delta.step(q, k, v, None, beta, state),
)
OPS = pytest.mark.parametrize(
    ("op", "inputs"),
    [
        pytest.param(simple_gla.OP, simple_gla_inputs, id="simple_gla"),
        pytest.param(simple_gla.OP, fixed_inputs, id="fixed"),
        pytest.param(gla.OP, gla_inputs, id="gla"),
        pytest.param(gated_delta.OP, gated_delta_inputs, id="gated_delta"),
        pytest.param(deltanet, deltanet_inputs, id="deltanet"),
        pytest.param(rwkv7.OP, rwkv7_inputs, id="rwkv7"),
    ],
)


def leaves(x, dtype=torch.float64):
    return [part.detach().to(dtype).requires_grad_() for part in x]


def results(form, x, state=None, **options):
    """Output, final state and the gradients of the inputs, and of the incoming state, of a fixed random loss."""
    found = [*form(*x, state=state, **options)]
    generator = torch.Generator().manual_seed(1)
    loss = sum((part * torch.randn(part.shape, generator=generator).to(part.dtype)).sum() for part in found)
    return found + list(torch.autograd.grad(loss, x if state is None else [*x, state]))


def places(length):
    padding = torch.rand(2, length) > 0.2
    segments = torch.randint(0, 2, (2, length)).cumsum(1) // 3
    return {}, {"padding": padding}, {"segments": segments}, {"padding": padding, "segments": segments}


def agree(op, x, state, options, where):
    for limits in where:
        found, expected = results(op.chunked, x, state, **options, **limits), results(op.recurrent, x, state, **limits)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def error(a, b):
    """The largest error in terms of the largest number."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def test_linear_attention_is_its_equation():
    """Every token by hand, as a sum over all earlier ones: decays per token, per channel and fixed."""
    q, k, v, g = gla_inputs(7, batch=1, heads=1)
    forms = [(gla, g), (simple_gla, g[..., 0]), (simple_gla, g[0, 0, :, 0])]
    for op, decays in forms:
        out, state = op.recurrent(q, k, v, decays)
        per_channel = decays.view(1, -1, 1, decays.shape[-1] if op is gla else 1).expand(1, 7, 1, 6)
        for t in range(7):
            kept = [per_channel[0, s + 1 : t + 1, 0].sum(0).exp() for s in range(t + 1)]
            S = sum(torch.outer(kept[s] * k[0, s, 0], v[0, s, 0]) for s in range(t + 1))
            assert torch.allclose(out[0, t, 0], S.T @ q[0, t, 0], atol=1e-12)
        assert torch.allclose(state[0, 0], S, atol=1e-12)


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
    state = torch.randn(2, 3, 6, 5).double().requires_grad_()
    agree(op, leaves(inputs(length)), state, {"chunk": chunk}, places(length))


@OPS
def test_pieces_of_a_row_are_computed_one_after_another(op, inputs, monkeypatch):
    """Long rows are cut to fit a cache: here into pieces of two chunks, with borders beside and on their limits."""
    monkeypatch.setattr(segmented, "WORKING_SET", 2 * 8 * 2 * 3 * 6)
    state = torch.randn(2, 3, 6, 5).double().requires_grad_()
    limits = (torch.arange(130) // 16)[None].expand(2, -1)
    where = (*places(130), {"segments": limits}, {"segments": limits.roll(1, 1).cummax(1).values})
    agree(op, leaves(inputs(130)), state, {"chunk": 8}, where)


@OPS
@pytest.mark.parametrize("length", [33, 257])
def test_chunked_in_fp32(op, inputs, length):
    x, state = leaves(inputs(length)), torch.randn(2, 3, 6, 5).double().requires_grad_()
    for limits in places(length):
        found = results(op.chunked, leaves(x, torch.float32), state.detach().float().requires_grad_(), **limits)
        for a, b in zip(found, results(op.recurrent, x, state, **limits), strict=True):
            assert a.dtype == torch.float32 and error(a, b) < 2e-5


@OPS
def test_gradients_are_right(op, inputs):
    """Numerically, through three chunks, with a border and a gap, and through the final state."""
    x = leaves(inputs(5, batch=1, heads=1, dk=3, dv=2))
    state = torch.randn(1, 1, 3, 2).double().requires_grad_()
    padding = torch.tensor([[True, True, False, True, True]])
    segments = torch.tensor([[0, 0, 0, 0, 1]])
    for limits in ({}, {"padding": padding, "segments": segments}):

        def run(*args, limits=limits):
            return op.chunked(*args[:-1], state=args[-1], chunk=2, **limits)

        assert torch.autograd.gradcheck(run, (*x, state))


@OPS
def test_only_what_wants_a_gradient_gets_one(op, inputs):
    """Frozen inputs, and no gradients at all, change no number."""
    x = inputs(40)
    everything = results(op.chunked, leaves(x))
    for n in range(len(x)):
        copies = [part.clone().requires_grad_(i == n) for i, part in enumerate(x)]
        out, state = op.chunked(*copies)
        generator = torch.Generator().manual_seed(1)
        parts = [(part * torch.randn(part.shape, generator=generator).double()).sum() for part in (out, state)]
        (gradient,) = torch.autograd.grad(sum(parts), copies[n])
        assert torch.equal(out, everything[0]) and torch.equal(gradient, everything[2 + n])
    assert torch.equal(op.chunked(*x)[1], everything[1])


@OPS
def test_inputs_and_what_is_kept_are_left_alone(op, inputs):
    """One head and one row: inputs need no rearranging. And a caller may overwrite the state that it got."""
    x = leaves(inputs(64, batch=1, heads=1))
    before = [part.detach().clone() for part in x]
    expected = results(op.chunked, x, chunk=16)[2:]
    out, state = op.chunked(*x, chunk=16)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator).double() for part in (out, state)]
    loss = sum((part * weight).sum() for part, weight in zip((out, state), weights, strict=True))
    state.detach().zero_()
    for a, b in zip(torch.autograd.grad(loss, x), expected, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


@OPS
def test_half_precision_and_autocast(op, inputs):
    """bf16 inputs: fp32 inside, a fp32 state, gradients in bf16. Under autocast nothing is rounded on the way."""
    x = [part.bfloat16() for part in inputs(50)]
    truth, _ = op.recurrent(*(part.double() for part in x))
    for form in (op.recurrent, op.chunked):
        copies = leaves(x, torch.bfloat16)
        out, state = form(*copies)
        assert out.dtype == torch.bfloat16 and state.dtype == torch.float32 and error(out, truth) < 5e-3
        out.sum().backward()
        assert all(part.grad.dtype == torch.bfloat16 and part.grad.isfinite().all() for part in copies)
    copies = leaves(x, torch.float32)
    plain = results(op.chunked, copies)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results(op.chunked, copies)
        token = [part if part.dim() == 1 else part[:, :1].float() for part in x]
        stepped = torch.randn(2, 3, 6, 5)
        expected, _ = op.recurrent(*(part.float().clone() for part in token), state=stepped)
        out = op.step(*(part.float().clone() for part in token), stepped)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert error(out, expected) < 1e-2


def courses(length, floor):
    """Log-decays (1, length, 1) at the floor nowhere, everywhere, in turns of 1 and of 20 tokens, once, spread."""
    t = torch.arange(length)
    signs = [t < 0, t >= 0, t % 2 == 0, t // 20 % 2 == 0, t == 40]
    return [floor * part.double()[None, :, None] for part in signs] + [floor * torch.rand(1, length, 1).double()]


def exact(op, x, chunks=(16, 32)):
    """Outputs, state and gradients in fp32, to rounding, of the largest number of each."""
    truth = results(op.recurrent, leaves([part.float() for part in x]))
    for chunk in chunks:
        for a, b in zip(results(op.chunked, leaves(x, torch.float32), chunk=chunk), truth, strict=True):
            assert a.isfinite().all() and error(a, b) < 2e-5


@pytest.mark.parametrize("course", range(6))
def test_extreme_decays_in_fp32(course):
    """The gradients of decays of e^-50 as well: they are as small, and exact in terms of themselves."""
    q, k, v, _, beta = gated_delta_inputs(256, dk=8, dv=8)
    g = courses(256, -50.0)[course].expand(2, -1, 3)
    exact(simple_gla.OP, (q, k, v, g), (16, 32, 64))
    exact(gated_delta.OP, (q, k, v, g, beta), (16, 32, 64))
    channels = courses(256, -5.0)[course][..., None].expand(2, -1, 3, 8)
    exact(gla.OP, (q, k, v, channels))
    exact(gla.OP, (q, k, v, channels * (torch.arange(8) % 2)))
    r, _, k, v, kappa, a = rwkv7_inputs(256, dk=8, dv=8)
    exact(rwkv7.OP, (r, channels * BOUND / 5, k, v, kappa, a), (16, 32, 64))


def test_fixed_decays_at_any_strength_in_fp32():
    q, k, v, _ = simple_gla_inputs(130, heads=4)
    exact(simple_gla.OP, (q, k, v, torch.tensor([0.0, -0.01, -5.0, -50.0]).double()))


def test_equal_keys_in_fp32():
    """Every key the same, beta 1: the inverse of a matrix of ones."""
    q, k, v, _, _ = gated_delta_inputs(256, dk=8, dv=8)
    k = torch.ones_like(k) / 8**0.5
    beta = torch.ones(2, 256, 3)
    exact(deltanet, (q, k, v, beta), (16, 32, 64))
    for g in courses(256, -1e4)[:5]:
        found, _ = gated_delta.chunked(*(part.float() for part in (q, k, v, g.expand(2, -1, 3), beta)))
        truth, _ = gated_delta.recurrent(q, k, v, g.expand(2, -1, 3), beta)
        assert error(found, truth) < 2e-5


def test_chunks_that_could_overflow_are_refused():
    with pytest.raises(ValueError, match="64"):
        rwkv7.chunked(*rwkv7_inputs(4), chunk=128)
    with pytest.raises(ValueError, match="32"):
        gla.chunked(*gla_inputs(4), chunk=33)


@OPS
def test_a_state_of_another_shape_is_an_error(op, inputs):
    for form in (op.recurrent, op.chunked):
        with pytest.raises(ValueError, match="state has shape"):
            form(*inputs(4), state=torch.zeros(2, 3, 5, 6))


@OPS
def test_memory_per_token_is_constant(op, inputs):
    """What is kept for the backward is the inputs and, per chunk, a state and two more arrays at most."""

    def kept(length):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor  # alive, or its address would come again
            return tensor

        x = leaves(inputs(length, heads=8, dk=16, dv=16), torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op.chunked(*x)
        total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        return total / length / (2 * 8 * 4)

    assert kept(2048) == pytest.approx(kept(512), rel=0.01)
    assert kept(512) < 6 * 16 + 16 * 16 / 32 + 32 + 16 + 1


class Allocations(TorchDispatchMode):
    """The elements of every new storage."""

    def __init__(self, *known):
        super().__init__()
        self.known = {part.untyped_storage().data_ptr() for part in known}
        self.alive, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.known.add(result.untyped_storage().data_ptr())
            self.alive.append(result)  # or its address would come again
            self.sizes.append(result.untyped_storage().nbytes() // result.element_size())
        return result


@OPS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_is_a_token_of_the_recurrence_in_place(op, inputs, dtype):
    x = [part.to(dtype) for part in inputs(9)]
    state = torch.randn(2, 3, 6, 5, dtype=torch.promote_types(dtype, torch.float32))
    expected, final = op.recurrent(*x, state=state)
    address = state.data_ptr()
    for t in range(9):
        token = [part if part.dim() == 1 else part[:, t : t + 1].clone() for part in x]
        fixed = [part.clone() for part in token if part.dim() == 1]
        with Allocations(*token, state) as memory:
            out = op.step(*token, state)
        assert out.shape == (2, 1, 3, 5) and out.dtype == dtype
        assert error(out, expected[:, t : t + 1]) < (1e-2 if dtype == torch.bfloat16 else 1e-12)
        assert all(torch.equal(a, b) for a, b in zip(fixed, (p for p in token if p.dim() == 1), strict=True))
        if dtype == torch.float64:
            assert memory.sizes == [out.numel()]
    assert state.data_ptr() == address and torch.allclose(state, final, atol=1e-5)


@OPS
def test_compiles_whole(op, inputs):
    """Forward and backward in one graph each: a whole chunk and a short one; with borders where they differ most."""
    torch._dynamo.reset()
    x, state = leaves(inputs(21)), torch.randn(2, 3, 6, 5).double().requires_grad_()
    limits = places(21)[0 if inputs in (fixed_inputs, gated_delta_inputs) else 3]
    compiled = torch.compile(op.chunked, backend="aot_eager", fullgraph=True)
    found, expected = (results(form, x, state, chunk=16, **limits) for form in (compiled, op.chunked))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))


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
