"""Window and linear attention under one denominator, against the paper's formula over all pairs."""

from __future__ import annotations

import pytest
import torch

from relinear.mixers.ops import hedgehog as ops

WINDOWS = [1, 5, 13, 64]


def inputs(length, batch=2, heads=4, kv=2, dk=6, dv=5, features=7):
    q, k = torch.randn(batch, length, heads, dk).double(), torch.randn(batch, length, kv, dk).double()
    phi_q = torch.rand(batch, length, heads, features).double()
    phi_k = torch.rand(batch, length, kv, features).double()
    return [q, k, torch.randn(batch, length, kv, dv).double(), phi_q, phi_k, torch.rand(heads).double() + 0.1]


def full(q, k, v, phi_q, phi_k, gamma, window, scale, softcap=None, padding=None, segments=None):
    """The definition, one row and head at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1]).double()
    for row in range(len(q)):
        real = torch.arange(q.shape[1]) if padding is None else padding[row].nonzero()[:, 0]
        if not len(real):
            continue
        numbers = torch.zeros(len(real)) if segments is None else segments[row, real]
        order = torch.arange(len(real))
        gap = order[:, None] - order
        same = (numbers[:, None] == numbers) & (gap >= 0)
        near, far = same & (gap < window), same & (gap >= window)
        for head in range(q.shape[2]):
            kv = head // (q.shape[2] // k.shape[2])
            logits = scale * q[row, real, head] @ k[row, real, kv].T
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~near, float("-inf"))
            weights = gamma[head] * (logits - logits.max(1, keepdim=True).values).exp()
            weights = weights + (phi_q[row, real, head] @ phi_k[row, real, kv].T).masked_fill(~far, 0.0)
            out[row, real, head] = weights / weights.sum(1, keepdim=True) @ v[row, real, kv]
    return out


def places(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(2, length, generator=generator) > 0.2
    segments = (torch.rand(2, length, generator=generator) > 0.97).long().cumsum(1)
    return [{}, {"padding": padding}, {"segments": segments}, {"padding": padding, "segments": segments}]


@pytest.mark.parametrize("form", [ops.recurrent, ops.chunked])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 33, 130])
def test_every_form_is_the_formula(form, window, length):
    x = inputs(length)
    for where in places(length, length):
        for softcap in (None, 2.0):
            found, _ = form(*x, window, 0.7, softcap, **where)
            assert torch.allclose(found, full(*x, window, 0.7, softcap, **where), atol=1e-12), where.keys()


@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("window", WINDOWS)
def test_state_and_gradients_equal_those_of_recurrent(window, chunk):
    """With a state whose window is full or not, and the gradients of inputs, state and final state."""
    for history in (1, 6, 90):
        with torch.no_grad():
            _, state = ops.recurrent(*inputs(history), window, 0.7)
        for where in places(50, history):
            results = []
            for form in (ops.recurrent, lambda *a, **k: ops.chunked(*a, chunk=chunk, **k)):
                torch.manual_seed(history)
                leaves = [part.requires_grad_() for part in inputs(50)]
                carried = [part.clone().requires_grad_() for part in state[:4]]
                out, after = form(*leaves, window, 0.7, state=(*carried, state[4]), **where)
                weights = [torch.randn(part.shape).double() for part in (out, *after[:4])]
                loss = sum((a * b).sum() for a, b in zip((out, *after[:4]), weights, strict=True))
                results.append([out, *after, *torch.autograd.grad(loss, [*leaves, *carried])])
            for found, expected in zip(*results, strict=True):
                assert torch.allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", [[1] * 60, [33, 27], [2, 1, 30, 1, 16, 10], [59, 1]], ids=str)
def test_many_calls_equal_one(window, sizes):
    x = inputs(60)
    expected, last = ops.chunked(*x, window, 0.7)
    out, state = [], None
    for parts in zip(*(part.split(sizes, 1) for part in x[:5]), strict=True):
        o, state = ops.chunked(*parts, x[5], window, 0.7, state=state)
        out.append(o)
    assert torch.allclose(torch.cat(out, 1), expected, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(state, last, strict=True))


@pytest.mark.parametrize("window", WINDOWS)
def test_step_is_one_token_in_place(window):
    x = inputs(200)
    state = tuple(part.clone() for part in ops.initial(None, *(part[:, :1] for part in (x[1], x[2], x[4])), window))
    held = [part.data_ptr() for part in state]
    expected, last = ops.chunked(*x, window, 0.7, 2.0)
    for t in range(200):
        o = ops.step(*(part[:, t : t + 1] for part in x[:5]), x[5], window, 0.7, 2.0, state)
        assert torch.allclose(o, expected[:, t : t + 1], atol=1e-12)
    assert [part.data_ptr() for part in state] == held
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(state, last, strict=True))


def test_gradients_are_right():
    """Numerically, with grouped heads, a border, a gap and a softcap, over three blocks."""
    leaves = [part.requires_grad_() for part in inputs(6, batch=1, heads=2, kv=1, dk=2, dv=2, features=2)]
    where = {
        "padding": torch.tensor([[True, True, False, True, True, True]]),
        "segments": torch.tensor([[0, 0, 0, 0, 0, 1]]),
    }

    def run(*x):
        out, state = ops.chunked(*x, 2, 0.7, 2.0, chunk=2, **where)
        return out, *state[:4]

    assert torch.autograd.gradcheck(run, leaves)


def test_fp32_under_autocast():
    x = inputs(300)
    truth, _ = ops.recurrent(*x, 20, 1.0)
    leaves = [part.float().requires_grad_() for part in x]
    with torch.autocast("cpu", torch.bfloat16):
        found, state = ops.chunked(*leaves, 20, 1.0)
    assert found.dtype == torch.float32 and all(part.dtype == torch.float32 for part in state)
    assert float((found.detach() - truth).abs().max() / truth.abs().max()) < 2e-5
    assert all(part.isfinite().all() for part in torch.autograd.grad(found.sum(), leaves))


def test_no_graph_break():
    """Forward and backward in one graph each, with a state, padding and borders."""
    run = torch.compile(ops.chunked, backend="aot_eager", fullgraph=True)
    _, state = ops.recurrent(*inputs(5), 4, 0.7)
    for where, carried in ((places(12)[0], None), (places(12)[3], state)):
        leaves = [part.requires_grad_() for part in inputs(12)]
        results = []
        for form in (run, ops.chunked):
            out, after = form(*leaves, 4, 0.7, 2.0, state=carried, **where)
            loss = out.square().sum() + after[3].sum()
            results.append([out, *after, *torch.autograd.grad(loss, leaves)])
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results, strict=True))


def test_memory_is_linear_in_length():
    def saved(length):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.untyped_storage().nbytes()
            return tensor

        x = [part.requires_grad_() for part in inputs(length)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ops.chunked(*x, 40, 0.7)
        return total

    assert saved(2048) < 4.5 * saved(512)


@pytest.mark.parametrize("form", [ops.recurrent, ops.chunked])
def test_a_state_of_another_shape_is_an_error(form):
    x = inputs(4)
    _, state = form(*x, 3, 1.0)
    with pytest.raises(ValueError, match="state has shapes"):
        form(*x, 4, 1.0, state=state)
    with pytest.raises(ValueError, match="state has shapes"):
        form(*x, 3, 1.0, state=(*state[:3], state[3][..., :-1], state[4]))
