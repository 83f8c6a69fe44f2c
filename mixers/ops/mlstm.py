"""The matrix memory of xLSTM: exponential input gate, normaliser, running maximum (arXiv 2405.04517, eq. 19-27).

    m_t = max(f_t + m_{t-1}, i_t)
    C_t = e^(f_t + m_{t-1} - m_t) C_{t-1} + e^(i_t - m_t) k_t v_t^T      n_t likewise with k_t for k_t v_t^T
    o_t = C_t^T q_t / max(|n_t^T q_t|, e^(-m_t))

with C (dk, dv), so the transpose of the paper's, f the log of the forget gate and i that of the input gate. Without
history C = 0, n = 0, m = 0. The caller scales q or k.

What m is for. C e^m and n e^m are the memory that the gates describe; m only keeps what is stored within range, and the
outputs do not depend on it. Hence every form may use any stabiliser inside and take it for a constant in the backward;
just the final states are brought to the m of the recurrence, through which their gradients flow.

Precision. A sum of log-gates far from zero has lost the digits that later differences need, so the chunked form sums
multiples of 1/16, which is exact, and the rest apart: a forget gate of e^-10000 does not blur its neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .chunks import Borders, borders, compute_dtype, initial_state, join, real_segments, split
from .op import Op

CHUNK = 64
SEGMENT = 512  # tokens at a time: what is computed in between stays in the processor's cache

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    state: State | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """Token by token: the truth that the other forms are held against.

    Args:
        q, k: (B, T, H, dk). v: (B, T, H, dv).
        i: (B, T, H) log input gate, any finite number. f: (B, T, H) log forget gate, <= 0.
        state: C (B, H, dk, dv), n (B, H, dk), m (B, H) from the previous call; of the first token's document.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; the state is zeroed where the number changes.

    Returns:
        (B, T, H, dv) in the dtype of v, and the state in fp32 (fp64 for fp64 inputs).
    """
    length = v.shape[1]
    dtype = compute_dtype(v.dtype)
    C, n, m = _initial(state, k, v, dtype)
    (i_, f_), segments = _masked(i, f, padding, dtype), real_segments(segments, padding)
    fresh = None if segments is None or length == 1 else (segments[:, 1:] == segments[:, :-1]).unbind(1)
    columns = k.to(dtype)[..., None].unbind(1)
    values = v.to(dtype)[..., None, :].unbind(1)
    queries = q.to(dtype)[..., None, :].unbind(1)
    out = []
    scale = m.detach()  # the m of C and n, a constant
    C, n = _rescaled(C, n, m - scale)
    for t, (write, keep) in enumerate(zip(i_.unbind(1), f_.unbind(1), strict=True)):
        if fresh is not None and t:
            same = fresh[t - 1][:, None]
            C, n = C * same[..., None, None], n * same[..., None]
            m, scale = m * same, scale * same
        m = torch.maximum(keep + m, write)
        before, scale = scale, m.detach()
        keep, write = (keep + before - scale).exp()[..., None], (write - scale).exp()[..., None]
        C = keep[..., None] * C + (write[..., None] * columns[t]) * values[t]
        n = keep * n + write * columns[t][..., 0]
        size = (queries[t] @ n[..., None]).abs()
        out.append(queries[t] @ C / torch.maximum(size, _least(scale)[..., None, None]))
    stacked = torch.cat(out, -2).transpose(1, 2)
    if padding is not None:
        stacked = stacked.masked_fill(~padding[..., None, None], 0.0)
    return stacked.to(v.dtype), (*_rescaled(C, n, scale - m), m)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    state: State | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, State]:
    """The same in chunks of `chunk` tokens: products inside a chunk, one step per chunk between them.

    With b the cumulated f of a chunk, D_ts = b_t - b_s + i_s for s <= t, and M the stabiliser of the incoming C, n:
        m_t = max(b_t + M, max_s D_ts)
        num_t = e^(b_t + M - m_t) C^T q_t + sum_s e^(D_ts - m_t) (q_t . k_s) v_s      and so the denominator with n.
    Arguments and results as `recurrent`. The backward keeps the states between chunks and computes the rest again.
    """
    batch, _, heads, _ = k.shape
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        C, n, m = _initial(state, k, v, dtype)
        i_, f_ = _masked(i, f, padding, dtype)
        real = real_segments(segments, padding)
        last = _last_maximum(i_, f_, m, real)
        scale = m.detach()
        C, n = _rescaled(C, n, m - scale)
        marks = (None,) * 4 if real is None else tuple(borders(real, chunk, dtype))
        out, C, n, scale = _MatrixMemory.apply(  # pyright: ignore[reportGeneralTypeIssues]
            q, k, v, i_, f_, C.flatten(0, 1), n.flatten(0, 1), scale.flatten(), chunk, *marks
        )
        C, n = _rescaled(C.unflatten(0, (batch, heads)), n.unflatten(0, (batch, heads)), scale.view_as(last) - last)
        if padding is not None:
            out = out.masked_fill(~padding[..., None, None], 0.0)
        return out.to(v.dtype), (C, n, last)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, f: torch.Tensor, state: State
) -> torch.Tensor:
    """One token, without gradients. Overwrites `state`, `i` and `f` and allocates nothing but its result.

    Args:
        q, k: (B, 1, H, dk). v: (B, 1, H, dv). i, f: (B, 1, H). As in `recurrent`.
        state: C (B, H, dk, dv), n (B, H, dk) and m (B, H), fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        C, n, m = (part.flatten(0, 1) for part in state)
        k_, q_ = (x.to(C.dtype).reshape(len(C), 1, -1) for x in (k, q))
        write, keep = (x.to(C.dtype).reshape(-1) for x in (i, f))
        out = torch.empty_like(v, dtype=C.dtype, memory_format=torch.contiguous_format)
        row = out.view(len(C), 1, -1)
        keep.add_(m)
        torch.maximum(keep, write, out=m)
        keep.sub_(m).exp_()
        write.sub_(m).exp_()
        torch.mul(v, write.view(*v.shape[:3], 1), out=out)
        C.mul_(keep[:, None, None]).addcmul_(k_.mT, row)
        n.mul_(keep[:, None]).addcmul_(k_[:, 0], write[:, None])
        torch.bmm(q_, C, out=row)
        torch.bmm(q_, n[..., None], out=write[:, None, None]).abs_()
        torch.neg(m, out=keep).exp_().clamp_(min=torch.finfo(m.dtype).tiny)
        row.div_(torch.maximum(write, keep, out=write)[:, None, None])
        return out.to(v.dtype)


class _Gates(NamedTuple):
    """The gates of every chunk; none of it large.

    Attributes:
        coarse, fine: (N, B * H, C), b = coarse + fine, the log-decay since the chunk's start.
        write: (N, B * H, C), i.
        inflow: (N, B * H, C), log of the weight with which the incoming state reaches a token.
        outflow: (N, B * H, C), weight with which a token reaches the outgoing state.
        carry: (N, B * H), weight with which the incoming state reaches the outgoing one.
        scale: (N + 1, B * H), stabiliser of the states between chunks.
    """

    coarse: torch.Tensor
    fine: torch.Tensor
    write: torch.Tensor
    inflow: torch.Tensor
    outflow: torch.Tensor
    carry: torch.Tensor
    scale: torch.Tensor


def _gates(i: torch.Tensor, f: torch.Tensor, first: torch.Tensor, chunk: int, border: Borders | None) -> _Gates:
    """Gates from (B, T, H) inputs; `first` is the stabiliser (B * H) of the incoming state."""
    view, nothing = (-1, len(first)), float("-inf")
    write = split(pad(i, (0, 0, 0, -i.shape[1] % chunk), value=nothing), chunk, i.dtype).unflatten(0, view)
    f_ = split(f, chunk, f.dtype).unflatten(0, view)
    sixteenths = (f_ * 16).round() / 16
    coarse, fine = sixteenths.cumsum(-1), (f_ - sixteenths).cumsum(-1)
    inflow = coarse + fine
    whole = inflow[..., -1]
    outflow = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine + write)
    if border is not None:
        batch_heads = (i.shape[0], -1)
        inflow, outflow, whole = (
            part.unflatten(1, batch_heads).masked_fill(mark == 0, nothing).flatten(1, 2)
            for part, mark in (
                (inflow, border.sees[..., 0]),
                (outflow, border.leaves[..., 0]),
                (whole, border.carries[..., 0, 0]),
            )
        )
    scales = [first]
    for decay, new in zip(whole.unbind(), outflow.amax(-1).unbind(), strict=True):
        scales.append(torch.maximum(scales[-1] + decay, new))
    scale = torch.stack(scales)
    carry = (whole + scale[:-1] - scale[1:]).exp()
    outflow = (outflow - scale[1:, :, None]).exp()
    return _Gates(coarse, fine, write, inflow + scale[:-1, :, None], outflow, carry, scale)


class _MatrixMemory(torch.autograd.Function):
    """Outputs (B, T, H, dv) and final C, n with their stabiliser, for a stabiliser that counts as a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        i: torch.Tensor,
        f: torch.Tensor,
        C: torch.Tensor,
        n: torch.Tensor,
        first: torch.Tensor,
        chunk: int,
        pairs: torch.Tensor | None,
        sees: torch.Tensor | None,
        leaves: torch.Tensor | None,
        carries: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        batch, length, heads, _ = k.shape
        border = None if pairs is None else Borders(pairs, sees, leaves, carries)  # pyright: ignore[reportArgumentType]
        gates = _gates(i, f, first, chunk, border)
        count = len(gates.carry)
        memory, norms = C.new_empty(count + 1, *C.shape), n.new_empty(count + 1, *n.shape)
        memory[0], norms[0] = C, n
        top, size = torch.empty_like(gates.write), torch.empty_like(gates.write)
        out = torch.empty(v.shape, dtype=C.dtype, device=v.device)
        for here in _segments(count, chunk):
            tokens = slice(here.start * chunk, min(here.stop * chunk, length))
            q_, k_, v_ = (split(x[:, tokens], chunk, C.dtype) for x in (q, k, v))
            part = _Gates(*(x[here] for x in gates))
            weights, top[here] = _weights(part, pairs, here, None)
            sent = k_ * part.outflow.flatten(0, 1)[..., None]
            torch.bmm(sent.mT, v_, out=memory[here.start + 1 : here.stop + 1].flatten(0, 1))
            torch.sum(sent.unflatten(0, part.carry.shape), 2, out=norms[here.start + 1 : here.stop + 1])
            for chunk_n, carry in zip(range(here.start, here.stop), part.carry.unbind(), strict=True):
                memory[chunk_n + 1].addcmul_(memory[chunk_n], carry[:, None, None])
                norms[chunk_n + 1].addcmul_(norms[chunk_n], carry[:, None])
            scores = torch.bmm(q_, k_.mT).mul_(weights)
            q_ = q_ * (part.inflow - top[here]).exp_().flatten(0, 1)[..., None]
            result = torch.bmm(scores, v_).baddbmm_(q_, memory[here].flatten(0, 1))
            sizes = torch.bmm(q_, norms[here].flatten(0, 1)[..., None])[..., 0].add_(scores.sum(-1))
            size[here] = sizes.view(part.write.shape)
            result.div_(torch.maximum(size[here].abs(), _least(top[here])).flatten(0, 1)[..., None])
            out[:, tokens] = join(result, batch, tokens.stop - tokens.start, heads)
        scale = gates.scale[-1].clone()
        ctx.save_for_backward(q, k, v, *gates, memory, norms, top, size, out, pairs)
        ctx.mark_non_differentiable(scale)
        return out, memory[-1].clone(), norms[-1].clone(), scale

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *some, memory, norms, top, size, out, pairs = ctx.saved_tensors
        gates, (grad_out, grad_C, grad_n, _) = _Gates(*some), grads
        batch, length, heads, _ = k.shape
        count, _, chunk = gates.write.shape
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_i, grad_f = torch.empty_like(top), torch.empty_like(top)
        with torch.autocast(v.device.type, enabled=False):
            for here in reversed(_segments(count, chunk)):
                tokens = slice(here.start * chunk, min(here.stop * chunk, length))
                q_, k_, v_, go, o = (split(x[:, tokens], chunk, out.dtype) for x in (q, k, v, grad_out, out))
                part = _Gates(*(x[here] for x in gates))
                weights, _ = _weights(part, pairs, here, top[here])
                reach = (part.inflow - top[here]).exp_().flatten(0, 1)[..., None]
                least = _least(top[here])
                sizes = size[here]
                bottom = torch.maximum(sizes.abs(), least).flatten(0, 1)[..., None]
                go = go / bottom
                active = sizes.sign().mul_(sizes.abs() > least).flatten(0, 1)[..., None]
                gs = -(go * o).sum(-1, keepdim=True) * active
                # What reaches the states from outputs, then through time.
                reads = q_ * reach
                into_C = torch.bmm(reads.mT, go).unflatten(0, part.carry.shape)
                into_n = (reads * gs).sum(1).unflatten(0, part.carry.shape)
                flows, flows_n = torch.empty_like(into_C), torch.empty_like(into_n)
                for j in range(len(into_C) - 1, -1, -1):
                    flows[j], flows_n[j] = grad_C, grad_n
                    grad_C = torch.addcmul(into_C[j], grad_C, part.carry[j][:, None, None])
                    grad_n = torch.addcmul(into_n[j], grad_n, part.carry[j][:, None])
                after = slice(here.start + 1, here.stop + 1)
                ends = (flows * memory[after]).sum((-2, -1)) + (flows_n * norms[after]).sum(-1)
                flows, flows_n = flows.flatten(0, 1), flows_n.flatten(0, 1)
                sent = k_ * part.outflow.flatten(0, 1)[..., None]
                scores = torch.bmm(q_, k_.mT).mul_(weights)
                gv = torch.bmm(scores.mT, go).baddbmm_(sent, flows)
                gw = torch.bmm(go, v_.mT).add_(gs).mul_(weights)
                gq = torch.bmm(go, memory[here].flatten(0, 1).mT).addcmul_(gs, norms[here].flatten(0, 1)[:, None])
                gq.mul_(reach).baddbmm_(gw, k_)
                gk = torch.bmm(v_, flows.mT).add_(flows_n[:, None])
                gk.mul_(part.outflow.flatten(0, 1)[..., None]).baddbmm_(gw.mT, q_)
                # d e^(b_t - b_s + i_s): what a key gains is owed to i and taken from b, what a query gains is b's.
                gi = (k_ * gk).sum(-1).view(part.write.shape)
                gb = (q_ * gq).sum(-1).view(part.write.shape) - gi
                gb[..., -1] += ends
                grad_i[here], grad_f[here] = gi, gb.flip(-1).cumsum(-1).flip(-1)
                for whole, x in ((grad_q, gq), (grad_k, gk), (grad_v, gv)):
                    whole[:, tokens] = join(x, batch, tokens.stop - tokens.start, heads)
        gi, gf = (join(x.view(-1, chunk, 1), batch, length, heads)[..., 0] for x in (grad_i, grad_f))
        return grad_q, grad_k, grad_v, gi, gf, grad_C, grad_n, *(None,) * 6


def _least(m: torch.Tensor) -> torch.Tensor:
    """e^-m, the least denominator; never 0, since q and with it n^T q may be."""
    return (-m).exp().clamp(min=torch.finfo(m.dtype).tiny)


def _segments(count: int, chunk: int) -> list[slice]:
    """The chunks that are computed at a time."""
    some = max(1, SEGMENT // chunk)
    return [slice(start, min(start + some, count)) for start in range(0, count, some)]


def _weights(
    gates: _Gates, pairs: torch.Tensor | None, here: slice, top: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """e^(D - m), (n * B * H, C, C), of the chunks `here`, and m (n, B * H, C) unless given."""
    chunk = gates.write.shape[-1]
    hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=gates.write.device).triu(1)
    weights = gates.coarse[..., :, None] - gates.coarse[..., None, :]
    weights.add_(gates.fine[..., :, None]).add_((gates.write - gates.fine)[..., None, :])
    if pairs is not None:
        batch = pairs.shape[1]
        hidden = (hidden | ~pairs[here]).expand(-1, -1, weights.shape[1] // batch, -1, -1).flatten(1, 2)
    weights.masked_fill_(hidden, float("-inf"))
    if top is None:
        top = torch.maximum(weights.amax(-1), gates.inflow)
    return weights.sub_(top[..., None]).exp_().flatten(0, 1), top


def _last_maximum(i: torch.Tensor, f: torch.Tensor, m: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """The m (B, H) of the last token: the largest i_s + sum of the f after s, or the initial m + sum of all f."""
    if segments is not None:
        present = (segments == segments[:, -1:])[..., None]
        i, f = i.masked_fill(~present, float("-inf")), f.masked_fill(~present, 0.0)
        m = m * present[:, 0]
    sums = f.flip(1).cumsum(1).flip(1)
    since = torch.cat([sums[:, 1:], torch.zeros_like(sums[:, :1])], 1)
    return torch.maximum((i + since).amax(1), m + sums[:, 0])


def _initial(
    state: State | None, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The incoming C, n and m, zeros where there are none.

    Raises:
        ValueError: one of those given has another shape.
    """
    batch, _, heads, dk = k.shape
    C = initial_state(None if state is None else state[0], batch, heads, dk, v.shape[-1], v, dtype)
    if state is None:
        return C, C.new_zeros(batch, heads, dk), C.new_zeros(batch, heads)
    for name, part, shape in (("n", state[1], (batch, heads, dk)), ("m", state[2], (batch, heads))):
        if part.shape != shape:
            raise ValueError(f"state {name} has shape {tuple(part.shape)}, expected {shape}")
    return C, state[1].to(dtype), state[2].to(dtype)


def _rescaled(C: torch.Tensor, n: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C and n times e^exponent, (B, H): from one stabiliser to another."""
    factor = exponent.exp()
    return C * factor[..., None, None], n * factor[..., None]


def _masked(
    i: torch.Tensor, f: torch.Tensor, padding: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates in the dtype of the computation; at padding nothing is written and nothing forgotten."""
    i, f = i.to(dtype), f.to(dtype)
    if padding is None:
        return i, f
    absent = ~padding[..., None]
    return i.masked_fill(absent, float("-inf")), f.masked_fill(absent, 0.0)


OP = Op("mlstm", recurrent, chunked, step)
