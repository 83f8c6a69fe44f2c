"""Sliding-window attention against a full masked softmax, in one call and in many."""

from __future__ import annotations

import pytest
import torch

from relinear.mixers.ops import window as ops

SHAPES = [(1, 0), (2, 1), (8, 0), (13, 3), (64, 0), (500, 1)]
LENGTHS = [1, 33, 130]


def inputs(length, batch=2, heads=4, kv=2, dk=6, dv=5):
    q = torch.randn(batch, length, heads, dk).double()
    return [q, torch.randn(batch, length, kv, dk).double(), torch.randn(batch, length, kv, dv).double()]


def full(q, k, v, window, scale, softcap=None, sinks=0, padding=None, segments=None):
    """The definition, one row at a time: a softmax over all pairs under a mask of document, order and distance."""
    out = torch.zeros(*q.shape[:3], v.shape[-1]).double()
    for row in range(len(q)):
        real = torch.arange(q.shape[1]) if padding is None else padding[row].nonzero()[:, 0]
        if not len(real):
            continue
        numbers = torch.zeros(len(real)) if segments is None else segments[row, real]
        same = numbers[:, None] == numbers
        order = torch.arange(len(real))
        gap = order[:, None] - order
        index = order - torch.stack([(numbers < n).sum() for n in numbers])
        mask = same & (gap >= 0) & ((gap < window) | (index < sinks))
        for head in range(q.shape[2]):
            kv = head // (q.shape[2] // k.shape[2])
            logits = scale * q[row, real, head] @ k[row, real, kv].T
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            out[row, real, head] = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v[row, real, kv]
    return out


def places(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(2, length, generator=generator) > 0.2
    segments = (torch.rand(2, length, generator=generator) > 0.95).long().cumsum(1)
    return [{}, {"padding": padding}, {"segments": segments}, {"padding": padding, "segments": segments}]


@pytest.mark.parametrize("form", [ops.recurrent, ops.chunked])
@pytest.mark.parametrize(("window", "sinks"), SHAPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_is_the_masked_softmax(form, window, sinks, length):
    x = inputs(length)
    for where in places(length, length):
        for softcap in (None, 2.0):
            found, _ = form(*x, window, 0.7, softcap, sinks, **where)
            assert torch.allclose(found, full(*x, window, 0.7, softcap, sinks, **where), atol=1e-12), where.keys()


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize(("window", "sinks"), SHAPES)
def test_state_and_gradients_equal_those_of_recurrent(window, sinks, chunk):
    """With a state that has wrapped around or not, and the gradients of inputs, state and final state."""
    for history in (1, 6, 90):
        with torch.no_grad():
            _, state = ops.recurrent(*inputs(history), window, 0.7, None, sinks)
        for where in places(50, history):
            results = []
            for form in (ops.recurrent, lambda *a, **k: ops.chunked(*a, chunk=chunk, **k)):
                torch.manual_seed(history)
                leaves = [part.requires_grad_() for part in inputs(50)]
                carried = [part.clone().requires_grad_() for part in state[:2]]
                out, after = form(*leaves, window, 0.7, None, sinks, state=(*carried, state[2]), **where)
                weights = [torch.randn(part.shape).double() for part in (out, *after[:2])]
                loss = sum((a * b).sum() for a, b in zip((out, *after[:2]), weights, strict=True))
                results.append([out, *after, *torch.autograd.grad(loss, [*leaves, *carried])])
            for found, expected in zip(*results, strict=True):
                assert torch.allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize(("window", "sinks"), SHAPES)
@pytest.mark.parametrize("sizes", [[1] * 60, [33, 27], [2, 1, 30, 1, 16, 10], [59, 1]], ids=str)
def test_many_calls_equal_one(window, sinks, sizes):
    x = inputs(60)
    expected, last = ops.chunked(*x, window, 0.7, None, sinks)
    out, state = [], None
    for parts in zip(*(part.split(sizes, 1) for part in x), strict=True):
        form = ops.recurrent if parts[0].shape[1] == 2 else ops.chunked
        o, state = form(*parts, window, 0.7, None, sinks, state=state)
        out.append(o)
    assert torch.allclose(torch.cat(out, 1), expected, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))


@pytest.mark.parametrize(("window", "sinks"), SHAPES)
def test_step_is_one_token_in_place(window, sinks):
    x = inputs(300)
    state = ops.initial(None, x[1][:, :1], x[2][:, :1], window, sinks)
    held = [part.data_ptr() for part in state]
    expected, last = ops.chunked(*x, window, 0.7, 2.0, sinks)
    for t in range(300):
        o = ops.step(*(part[:, t : t + 1] for part in x), window, 0.7, 2.0, sinks, state)
        assert torch.allclose(o, expected[:, t : t + 1], atol=1e-12)
    assert [part.data_ptr() for part in state] == held
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))


def test_gradients_are_right():
    """Numerically, with grouped heads, a border, a gap, sinks and a softcap, over three blocks."""
    leaves = [part.requires_grad_() for part in inputs(6, batch=1, heads=2, kv=1, dk=2, dv=2)]
    where = {
        "padding": torch.tensor([[True, True, False, True, True, True]]),
        "segments": torch.tensor([[0, 0, 0, 0, 0, 1]]),
    }

    def run(*x):
        out, state = ops.chunked(*x, 2, 0.7, 2.0, 1, chunk=2, **where)
        return out, *state[:2]

    assert torch.autograd.gradcheck(run, leaves)


def test_fp32_under_autocast_and_with_large_logits():
    x = inputs(300)
    x[0] *= 30
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
    _, state = ops.recurrent(*inputs(5), 4, 0.7, None, 1)
    for where, carried in ((places(12)[0], None), (places(12)[3], state)):
        leaves = [part.requires_grad_() for part in inputs(12)]
        results = []
        for form in (run, ops.chunked):
            out, after = form(*leaves, 4, 0.7, 2.0, 1, state=carried, **where)
            results.append([out, *after, *torch.autograd.grad(out.square().sum() + after[0].sum(), leaves)])
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
            ops.chunked(*x, 40, 0.7, None, 2)
        return total

    assert saved(2048) < 4.5 * saved(512)


@pytest.mark.parametrize("form", [ops.recurrent, ops.chunked])
def test_what_cannot_be_is_an_error(form):
    x = inputs(4)
    _, state = form(*x, 3, 1.0)
    with pytest.raises(ValueError, match="state has shapes"):
        form(*x, 4, 1.0, state=state)
    with pytest.raises(ValueError, match="window=0"):
        form(*x, 0, 1.0)
