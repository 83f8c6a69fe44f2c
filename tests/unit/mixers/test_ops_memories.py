"""Kimi delta attention, xLSTM's matrix memory, Titans' memory and the selective scan, on raw tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relinear.mixers.ops import kda, mlstm, segmented, selective_scan, titans

B, H, DK, DV = 2, 3, 6, 5
CHANNELS, SIZE, GROUPS = 6, 4, 2


def heads(length, last, batch, number):
    return torch.randn(batch, length, number, last).double()


def kda_inputs(length, batch=B, number=H, dk=DK, dv=DV):
    q, k, v = (heads(length, d, batch, number) for d in (dk, dk, dv))
    g = -5 * torch.sigmoid(4 * heads(length, dk, batch, number))
    return [q, normalize(k, dim=-1), v, g, torch.rand(batch, length, number).double()]


def mlstm_inputs(length, batch=B, number=H, dk=DK, dv=DV):
    """Memories in which what is remembered does not cancel: else no fp32 form could be exact."""
    q, k, v = (heads(length, d, batch, number) for d in (dk, dk, dv))
    i, f = torch.randn(2, batch, length, number).double()
    return [q * 0.3, k.abs() * 0.3, v, 2 * i, logsigmoid(2 * f + 1)]


def titans_inputs(length, batch=B, number=H, dk=DK, dv=DV):
    q, k, v = (heads(length, d, batch, number) for d in (dk, dk, dv))
    return [q, normalize(k, dim=-1), v, *torch.rand(3, batch, length, number).double()]


def scan_inputs(length, batch=B, channels=CHANNELS, size=SIZE, groups=GROUPS):
    x, dt = torch.randn(batch, length, channels).double(), torch.rand(batch, length, channels).double()
    A = -3 * torch.rand(channels, size).double() - 0.01
    return [x, dt, A, *torch.randn(2, batch, length, groups, size).double()]


def states(op, batch=B, number=H, dk=DK, dv=DV):
    """A random state as a list of its tensors."""
    memory = torch.randn(2, batch, number, dk, dv).double()
    if op is titans:
        return list(memory)
    if op is mlstm:
        return [memory[0], torch.randn(batch, number, dk).double().abs(), torch.randn(batch, number).double()]
    return [memory[0] if op is kda else torch.randn(batch, CHANNELS, SIZE).double()]


def packed(parts):
    return parts[0] if len(parts) == 1 else tuple(parts)


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def results(form, x, state, gradients=True, **options):
    """Output, final state and, with `gradients`, those of every input and of the state, of a fixed random loss."""
    out, final = form(*x, state=packed(state), **options)
    found = [out, *parts(final)]
    if not gradients:
        return found
    generator = torch.Generator().manual_seed(1)
    loss = sum((part * torch.randn(part.shape, generator=generator).to(part.dtype)).sum() for part in found)
    return found + list(torch.autograd.grad(loss, [*x, *state]))


def copied(state):
    return packed([part.detach().clone() for part in state])


def leaves(tensors, dtype=torch.float64):
    return [part.detach().to(dtype).requires_grad_() for part in tensors]


def at(x, where):
    """The inputs of some tokens; A of the selective scan has no tokens."""
    return [part[:, where] if part.dim() > 2 else part for part in x]


def places(length):
    padding = torch.rand(B, length) > 0.2
    segments = torch.randint(0, 2, (B, length)).cumsum(1) // 3
    return ({}, {"padding": padding}, {"segments": segments}, {"padding": padding, "segments": segments})


ALL = {"kda": (kda, kda_inputs), "mlstm": (mlstm, mlstm_inputs), "titans": (titans, titans_inputs)}
ALL["selective_scan"] = (selective_scan, scan_inputs)
OPS = pytest.mark.parametrize(("op", "inputs"), ALL.values(), ids=ALL)


def test_kda_is_its_equation():
    q, k, v, g, beta = kda_inputs(7, batch=1, number=1)
    S, eye = torch.zeros(DK, DV).double(), torch.eye(DK).double()
    out, state = kda.recurrent(q, k, v, g, beta)
    for t in range(7):
        kt, b = k[0, t, 0], beta[0, t, 0]
        S = (eye - b * torch.outer(kt, kt)) @ torch.diag(g[0, t, 0].exp()) @ S + b * torch.outer(kt, v[0, t, 0])
        assert torch.allclose(out[0, t, 0], S.T @ q[0, t, 0], atol=1e-12)
    assert torch.allclose(state[0, 0], S, atol=1e-12)


def test_mlstm_is_its_equation_without_a_stabiliser():
    """C and n as the gates describe them, and 1 for the paper's e^-m; m of the state is its maximum."""
    q, k, v, i, f = mlstm_inputs(7, batch=1, number=1)
    C, n, m = torch.zeros(DK, DV).double(), torch.zeros(DK).double(), torch.zeros(()).double()
    out, state = mlstm.recurrent(q, k, v, i, f)
    for t in range(7):
        spot = (0, t, 0)
        C = f[spot].exp() * C + i[spot].exp() * torch.outer(k[spot], v[spot])
        n = f[spot].exp() * n + i[spot].exp() * k[spot]
        m = torch.maximum(f[spot] + m, i[spot])
        assert torch.allclose(out[spot], C.T @ q[spot] / (n @ q[spot]).abs().clamp(min=1.0), atol=1e-12)
    for found, expected in zip(state, (C / m.exp(), n / m.exp(), m), strict=True):
        assert torch.allclose(found[0, 0], expected, atol=1e-12)


def test_titans_takes_the_gradient_at_every_token():
    q, k, v, theta, eta, alpha = titans_inputs(7, batch=1, number=1)
    M, S = torch.zeros(2, DK, DV).double()
    out, state = titans.recurrent(q, k, v, theta, eta, alpha)
    for t in range(7):
        spot = (0, t, 0)
        M = M.requires_grad_()
        (slope,) = torch.autograd.grad((M.T @ k[spot] - v[spot]).square().sum() / 2, M)
        S = eta[spot] * S - theta[spot] * slope
        M = (1 - alpha[spot]) * M.detach() + S
        assert torch.allclose(out[spot], M.T @ q[spot], atol=1e-12)
    assert torch.allclose(state[0][0, 0], M) and torch.allclose(state[1][0, 0], S)


def test_selective_scan_is_its_equation():
    x, dt, A, B_, C = scan_inputs(7, batch=1)
    h = torch.zeros(CHANNELS, SIZE).double()
    out, state = selective_scan.recurrent(x, dt, A, B_, C)
    for t in range(7):
        for c in range(CHANNELS):
            group = c // (CHANNELS // GROUPS)
            h[c] = (dt[0, t, c] * A[c]).exp() * h[c] + dt[0, t, c] * x[0, t, c] * B_[0, t, group]
            assert torch.allclose(out[0, t, c], h[c] @ C[0, t, group], atol=1e-12)
    assert torch.allclose(state[0], h, atol=1e-12)


@OPS
@pytest.mark.parametrize("chunk", [1, 2, 16, 32])
@pytest.mark.parametrize("length", [1, 15, 64, 130])
def test_chunked_equals_recurrent(op, inputs, chunk, length):
    x, state = leaves(inputs(length)), leaves(states(op))
    for where in places(length):
        found = results(op.chunked, x, state, chunk=chunk, **where)
        for a, b in zip(found, results(op.recurrent, x, state, **where), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@OPS
def test_pieces_of_a_sequence_are_computed_one_after_another(op, inputs, monkeypatch):
    """Long rows are cut to fit a cache: here into pieces of one or two chunks, with borders on their limits."""
    monkeypatch.setattr(selective_scan, "SCRATCH", 2 * 8 * B * CHANNELS * SIZE)
    monkeypatch.setattr(segmented, "WORKING_SET", 2 * 8 * B * H * DK)
    x, state = leaves(inputs(130)), leaves(states(op))
    limits = (torch.arange(130) // 16)[None].expand(B, -1)
    for where in (*places(130), {"segments": limits}, {"segments": limits.roll(1, 1).cummax(1).values}):
        found = results(op.chunked, x, state, chunk=8, **where)
        for a, b in zip(found, results(op.recurrent, x, state, **where), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@OPS
@pytest.mark.parametrize("length", [33, 257])
def test_chunked_in_fp32(op, inputs, length):
    x, state = leaves(inputs(length)), leaves(states(op))
    for where in places(length):
        truth = results(op.recurrent, x, state, **where)
        found = results(op.chunked, leaves(x, torch.float32), leaves(state, torch.float32), **where)
        for a, b in zip(found, truth, strict=True):
            assert a.dtype == torch.float32
            assert float((a - b).detach().abs().max() / b.detach().abs().max()) < 2e-5


@OPS
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_gradients_are_right(op, inputs, form):
    """Numerically, through three chunks, with a border and a gap, and through the final state."""
    small = {"batch": 1} if op is selective_scan else {"batch": 1, "number": 1, "dk": 3, "dv": 2}
    x = leaves(inputs(5, **small))
    state = leaves(states(op, **({"batch": 1} if op is selective_scan else small)))
    where = {"padding": torch.tensor([[True, True, False, True, True]]), "segments": torch.tensor([[0, 0, 0, 0, 1]])}
    options = {"chunk": 2} if form == "chunked" else {}

    def run(*args, **limits):
        return tuple(results(getattr(op, form), args[: len(x)], args[len(x) :], False, **limits, **options))

    for limits in ({}, where):
        assert torch.autograd.gradcheck(lambda *args, limits=limits: run(*args, **limits), (*x, *state))


@OPS
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_padding_does_not_exist(op, inputs, form):
    """On the left, on the right and between: the same as without, and 0 at its own places."""
    x, state = inputs(40), states(op)
    real = torch.ones(40, dtype=torch.bool)
    real[:3] = real[17:20] = real[36:] = False
    run = getattr(op, form)
    out, final = run(*x, state=packed(state), padding=real.expand(B, -1))
    alone, expected = run(*at(x, real), state=packed(state))
    assert torch.allclose(out[:, real], alone, atol=1e-12) and not out[:, ~real].any()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(parts(final), parts(expected), strict=True))


@OPS
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_documents_do_not_see_each_other(op, inputs, form):
    """Borders beside and on the limits of chunks; padding at a border neither opens a document nor closes one."""
    x, state, run = inputs(100), states(op), getattr(op, form)
    starts = [0, 31, 32, 64, 66, 97]
    segments = torch.zeros(100, dtype=torch.long)
    segments[starts[1:]] = 1
    segments = segments.cumsum(0).expand(B, -1).clone()
    padding = torch.ones(B, 100, dtype=torch.bool)
    padding[:, 61:64] = False
    segments[:, 61:64] = 9
    out, final = run(*x, state=packed(state), segments=segments, padding=padding)
    for start, end in zip(starts, [*starts[1:], 100], strict=True):
        document = torch.arange(start, end)
        document = document[padding[0, start:end]]
        alone, expected = run(*at(x, document), state=packed(state) if start == 0 else None)
        assert torch.allclose(out[:, document], alone, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(parts(final), parts(expected), strict=True))


@OPS
def test_many_calls_are_one(op, inputs):
    """Outputs and states do not depend on where calls or chunks end."""
    x, state = inputs(150), packed(states(op))
    whole, final = op.chunked(*x, state=state)
    outs, start = [], 0
    for n, length in enumerate((1, 63, 2, 32, 52)):
        out, state = op.chunked(*at(x, slice(start, start + length)), state=state, chunk=(16, 32, 5)[n % 3])
        outs.append(out)
        start += length
    assert torch.allclose(torch.cat(outs, 1), whole, rtol=1e-11, atol=1e-11)
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(parts(state), parts(final), strict=True))


@OPS
def test_without_a_state_it_begins_with_zeros(op, inputs):
    x, zeros = inputs(20), packed([torch.zeros_like(part) for part in states(op)])
    for form in (op.recurrent, op.chunked):
        for a, b in zip(tree_leaves(form(*x)), tree_leaves(form(*x, state=zeros)), strict=True):
            assert torch.equal(a, b)


@OPS
def test_a_state_of_another_shape_is_an_error(op, inputs):
    for n, part in enumerate(states(op)):
        wrong = states(op)
        wrong[n] = part[:1]
        for form in (op.recurrent, op.chunked):
            with pytest.raises(ValueError, match=r"state .*has shape"):
                form(*inputs(4), state=packed(wrong))


@OPS
def test_half_precision_keeps_an_fp32_state(op, inputs):
    x = [part.bfloat16() for part in inputs(50)]
    truth, _ = op.recurrent(*(part.double() for part in x))
    for form in (op.recurrent, op.chunked):
        copies = leaves(x, torch.bfloat16)
        out, state = form(*copies)
        assert out.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in parts(state))
        assert float((out - truth).detach().abs().max() / truth.abs().max()) < 5e-3
        out.sum().backward()
        assert all(part.grad.dtype == torch.bfloat16 and part.grad.isfinite().all() for part in copies)


@OPS
def test_autocast_changes_nothing(op, inputs):
    x, state = leaves(inputs(20), torch.float32), leaves(states(op), torch.float32)
    token = [part.detach().clone() for part in at(x, slice(0, 1))]
    expected = results(op.chunked, x, state), op.step(*[part.clone() for part in token], copied(state))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(op.chunked, x, state), op.step(*token, copied(state))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True))


class Allocations(TorchDispatchMode):
    """Counts the elements of every new storage, and the largest."""

    def __init__(self, *known):
        super().__init__()
        self.known = {part.untyped_storage().data_ptr() for part in tree_leaves(known)}
        self.alive, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in self.known:
                self.known.add(part.untyped_storage().data_ptr())
                self.alive.append(part)  # or its address would come again
                self.sizes.append(part.untyped_storage().nbytes() // part.element_size())
        return result


@OPS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_is_a_token_of_the_recurrence_in_place(op, inputs, dtype):
    x = [part.to(dtype) for part in inputs(9)]
    state = [part.to(torch.promote_types(dtype, torch.float32)) for part in states(op)]
    expected, final = op.recurrent(*x, state=packed(state))
    addresses = [part.data_ptr() for part in state]
    for t in range(9):
        token = [part.clone() for part in at(x, slice(t, t + 1))]
        with Allocations(token, state) as memory:
            out = op.step(*token, packed(state))
        assert out.shape == expected[:, :1].shape and out.dtype == dtype
        assert torch.allclose(out, expected[:, t : t + 1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-9)
        if dtype == torch.float64:
            decays = [state[0].numel()] if op is selective_scan else []
            assert sorted(memory.sizes) == sorted([out.numel(), *decays])
    assert [part.data_ptr() for part in state] == addresses
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(state, parts(final), strict=True))


@pytest.mark.slow
@OPS
def test_compiles_whole(op, inputs):
    """Two chunks and a rest, forward and backward, without a graph break."""
    torch._dynamo.reset()
    x, state, where = leaves(inputs(10)), leaves(states(op)), places(10)[3]
    compiled = torch.compile(op.chunked, backend="aot_eager", fullgraph=True)
    found, expected = (results(form, x, state, chunk=4, **where) for form in (compiled, op.chunked))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))


@OPS
def test_memory_per_token_is_constant(op, inputs):
    """What is kept for the backward grows with T, not with its square."""

    def saved(length):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.untyped_storage().nbytes()
            return tensor

        x = leaves(inputs(length), torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op.chunked(*x)
        return total

    assert saved(1024) < 4.5 * saved(256)


def test_the_scan_never_holds_all_states():
    """Forward and backward, no array is of (T, I, N) elements, and what is kept is a small multiple of the inputs."""
    length, channels, size = 1024, 64, 16
    x = leaves(scan_inputs(length, batch=1, channels=channels, size=size), torch.float32)
    kept = []
    selective_scan.SCRATCH, before = 2**16, selective_scan.SCRATCH
    try:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda part: kept.append(part.numel()) or part, lambda part: part
        ):
            out, _ = selective_scan.chunked(*x)
        with Allocations() as memory:
            out.sum().backward()
    finally:
        selective_scan.SCRATCH = before
    assert max(memory.sizes) < length * channels * size / 8
    assert sum(kept) < 2 * sum(part.numel() for part in x)


def test_kda_at_its_decay_bound_in_fp32():
    """Everywhere, nowhere, in turns, channel by channel; with the inverse of a matrix of ones (equal keys, beta 1)."""
    q, k, v, some, _ = kda_inputs(256, dk=8, dv=8)
    turns = ((torch.arange(256) // 20) % 2).double()[None, :, None, None]
    stripes = (torch.arange(8) % 2).double()
    for keys in (k, torch.ones_like(k) / math.sqrt(8)):
        for g in (
            0 * some,
            0 * some - 5,
            -5 * turns.expand_as(some),
            -5 * stripes.expand_as(some),
            -5 * turns * stripes,
        ):
            g = g.expand_as(some)
            x = leaves([q, keys, v, g, torch.ones(B, 256, H)])
            truth, _ = kda.recurrent(*x)
            expected = torch.autograd.grad(truth.sum(), x)
            for chunk in (16, 32):
                copies = leaves(x, torch.float32)
                found, _ = kda.chunked(*copies, chunk=chunk)
                gradients = torch.autograd.grad(found.sum(), copies)
                for a, b in zip((found, *gradients), (truth, *expected), strict=True):
                    assert float((a - b).detach().abs().max() / b.detach().abs().max()) < 2e-5


def test_kda_refuses_chunks_that_could_overflow():
    with pytest.raises(ValueError, match="32"):
        kda.chunked(*kda_inputs(4), chunk=33)


@pytest.mark.parametrize("level", [0.0, 50.0, -60.0, 1e3, -1e3])
def test_mlstm_with_extreme_gates(level):
    """Input gates far from 1 and forget gates from 1 to e^-10000, in fp32, with finite gradients."""
    q, k, v, i, f = mlstm_inputs(200)
    q[:, 30] *= abs(level) > 100  # nothing is read: the gradient is e^m, for larger m beyond fp32
    f[:, ::7] = 0.0
    f[:, 3::11] = -30.0
    f[:, 5::50] = -1e4
    i = i + level * (torch.arange(200) % 5 == 0)[None, :, None]
    x = leaves([q.abs(), k, v, i, f])
    x = leaves(leaves(x, torch.float32))  # the fp32 numbers, or 1e3 alone would differ by 1e-4
    truth, final = mlstm.recurrent(*x)
    copies = leaves(x, torch.float32)
    found, state = mlstm.chunked(*copies)
    assert float((found - truth).detach().abs().max() / truth.detach().abs().max()) < 2e-5 * max(1, abs(level) / 50)
    assert all(torch.allclose(a.double(), b, rtol=1e-3) for a, b in zip(state, final, strict=True))
    assert all(part.isfinite().all() for part in torch.autograd.grad(found.sum() + state[0].sum(), copies))


def test_mlstm_outputs_do_not_depend_on_the_stabiliser():
    x, (C, n, m) = mlstm_inputs(40), states(mlstm)
    out, _ = mlstm.chunked(*x, state=(C, n, m))
    for shift in (-7.0, 30.0):
        moved = (C / math.exp(shift), n / math.exp(shift), m + shift)
        for form in (mlstm.recurrent, mlstm.chunked):
            assert torch.allclose(form(*x, state=moved)[0], out, rtol=1e-10)


@pytest.mark.parametrize("start", [5, 8, 21])
def test_mlstm_stabilisers_end_with_their_documents(start):
    """A document of input gates e^500 before one of e^0: nothing of the second may vanish beside the first."""
    q, k, v, i, f = (part.float() for part in mlstm_inputs(30))
    i[:, :start] += 500.0
    segments = (torch.arange(30) >= start).long().expand(B, -1)
    C, n, m = (part.float() for part in states(mlstm))
    second = (q, k, v, i, f)
    alone, expected = mlstm.recurrent(*at(second, slice(start, None)))
    for form, options in ((mlstm.recurrent, {}), (mlstm.chunked, {"chunk": 8})):
        out, final = form(*second, state=(C, n, m + 500), segments=segments, **options)
        assert torch.allclose(out[:, start:], alone, rtol=1e-4, atol=1e-6)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(final, expected, strict=True))


def test_titans_with_saturated_gates():
    """Gates of exactly 0 and 1, as a sigmoid gives them in fp32, and a memory that is wiped amid a chunk."""
    q, k, v, theta, eta, alpha = titans_inputs(100)
    for gate, value in ((theta, 0.0), (theta, 1.0), (eta, 0.0), (eta, 1.0), (alpha, 0.0), (alpha, 1.0)):
        gate[torch.rand(gate.shape) < 0.05] = value
    x = leaves([q, k, v, theta, eta, alpha])
    truth, _ = titans.recurrent(*x)
    copies = leaves(x, torch.float32)
    found, _ = titans.chunked(*copies)
    assert float((found - truth).detach().abs().max() / truth.detach().abs().max()) < 2e-5
    assert all(part.isfinite().all() for part in torch.autograd.grad(found.sum(), copies))


def test_the_scan_with_extreme_steps():
    """Steps of 0 and of 1e4, where a decay is 1 or 0."""
    x, dt, A, B_, C = scan_inputs(100)
    dt[:, ::3] = 0.0
    dt[:, 1::5] = 1e4
    leaf, state = leaves([x, dt, A, B_, C]), leaves(states(selective_scan))
    truth = results(selective_scan.recurrent, leaf, state)
    found = results(selective_scan.chunked, leaves(leaf, torch.float32), leaves(state, torch.float32))
    assert all(part.isfinite().all() for part in found)
    assert float((found[0] - truth[0]).detach().abs().max() / truth[0].detach().abs().max()) < 2e-5
