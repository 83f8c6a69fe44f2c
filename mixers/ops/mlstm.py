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

from typing import NamedTuple

import torch

from .chunks import Borders, compute_dtype, continues, initial_state, real_segments, without_padding
from .decays import bounded_exp, flows_after, scalar_decay_gradient, seen, states_before
from .op import Op
from .segmented import Kernel, Parts, Tensors, segmented
from .steps import folded

CHUNK = 32

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
    dtype = compute_dtype(v.dtype)
    C, n, m = _initial(state, k, v, dtype)
    i_, f_ = _masked(i, f, padding, dtype)
    same = continues(segments, padding)
    columns = k.to(dtype)[..., None].unbind(1)
    values = v.to(dtype)[..., None, :].unbind(1)
    queries = q.to(dtype)[..., None, :].unbind(1)
    out = []
    scale = m.detach()  # the m of C and n, a constant
    C, n = _rescaled(C, n, m - scale)
    for t, (write, keep) in enumerate(zip(i_.unbind(1), f_.unbind(1), strict=True)):
        if same is not None:
            here = same[:, t, None]
            C, n = C * here[..., None, None], n * here[..., None]
            m, scale = m * here, scale * here
        m = torch.maximum(keep + m, write)
        before, scale = scale, m.detach()
        keep, write = (keep + before - scale).exp()[..., None], (write - scale).exp()[..., None]
        C = keep[..., None] * C + (write[..., None] * columns[t]) * values[t]
        n = keep * n + write * columns[t][..., 0]
        size = (queries[t] @ n[..., None]).abs()
        out.append(queries[t] @ C / torch.maximum(size, _least(scale)[..., None, None]))
    stacked = without_padding(torch.cat(out, -2).transpose(1, 2), padding)
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
    Arguments and results as `recurrent`.
    """
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        C, n, m = _initial(state, k, v, dtype)
        i_, f_ = _masked(i, f, padding, dtype)
        real = real_segments(segments, padding)
        last = _last_maximum(i_, f_, m, real)
        scale = m.detach()
        C, n = _rescaled(C, n, m - scale)
        out, (C, n, scale) = segmented(_KERNEL, (q, k, i_, f_, v), (C, n, scale), chunk, real)
        C, n = _rescaled(C, n, scale.detach() - last)
        return without_padding(out, padding).to(v.dtype), (C, n, last)


class _Gates(NamedTuple):
    """The gates of M = N * B * H chunks; of pairs, log weights D_ts - m_t = (coarse_t - coarse_s) + row_t + column_s.

    Attributes:
        coarse, row, column: (M, C).
        inflow: (M, C, 1), weight of the incoming state at each token.
        outflow: (M, C, 1), weight of each token in the outgoing state.
        carry: (M, 1, 1), weight of the incoming state in the outgoing one.
        least: (M, C, 1), the least denominator.
    """

    coarse: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    inflow: torch.Tensor
    outflow: torch.Tensor
    carry: torch.Tensor
    least: torch.Tensor


def _gates(
    i: torch.Tensor, f: torch.Tensor, first: torch.Tensor, border: Borders | None
) -> tuple[_Gates, torch.Tensor, torch.Tensor]:
    """Gates from (M, C) logs and the stabiliser (B * H) of the incoming state; weights of pairs; the new stabiliser."""
    nothing = float("-inf")
    sixteenths = (f * 16).round_().mul_(1 / 16)
    coarse, fine = sixteenths.cumsum(-1), (f - sixteenths).cumsum(-1)
    column = i - fine
    inflow, outflow = coarse + fine, (coarse[:, -1:] - coarse).add_(fine[:, -1:]).add_(column)
    whole = inflow[:, -1].clone()
    D = _sums(coarse, fine, column)
    D += torch.full_like(D[0], nothing).triu_(1)
    if border is not None:
        D.masked_fill_(border.pairs == 0, nothing)
        inflow.masked_fill_(border.sees[..., 0] == 0, nothing)
        outflow.masked_fill_(border.leaves[..., 0] == 0, nothing)
        whole.masked_fill_(border.carries[:, 0, 0] == 0, nothing)
    scales = [first]
    for decay, new in zip(whole.split(len(first)), outflow.amax(-1).split(len(first)), strict=True):
        scales.append(torch.maximum(scales[-1] + decay, new))
    last = scales.pop()
    before, after = torch.cat(scales), torch.cat([*scales[1:], last])
    inflow += before[:, None]
    top = torch.maximum(D.amax(-1), inflow)
    gates = _Gates(
        coarse,
        fine - top,
        column,
        inflow=bounded_exp(inflow.sub_(top))[..., None],
        outflow=bounded_exp(outflow.sub_(after[:, None]))[..., None],
        carry=bounded_exp(whole.add_(before).sub_(after))[:, None, None],
        least=_least(top)[..., None],
    )
    if border is not None:
        for weight, mark in zip(gates[3:6], border[1:], strict=True):
            weight.mul_(mark)
    return gates, seen(bounded_exp(D.sub_(top[..., None])).tril_(), border), last


def _sums(coarse: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """(M, C, C) log weights of pairs, from (M, C)."""
    return (coarse[:, :, None] - coarse[:, None, :]).add_(row[:, :, None]).add_(column[:, None, :])


def _forward(parts: Parts, states: Tensors, border: Borders | None) -> tuple[torch.Tensor, Tensors, Tensors]:
    q, k, i, f, v = parts
    C, n, scale = states
    gates, weights, scale = _gates(i, f, scale, border)
    sent = k * gates.outflow
    before, C = states_before(torch.bmm(sent.mT, v), gates.carry, C)
    norms, n = states_before(sent.sum(1, keepdim=True), gates.carry, n.unsqueeze(1))
    scores, reads = torch.bmm(q, k.mT).mul_(weights), q * gates.inflow
    out = torch.bmm(scores, v).baddbmm_(reads, before).div_(_denominator(scores, reads, norms, gates.least)[0])
    return out, (C, n.squeeze(1), scale), (before, norms, *gates)


def _backward(
    parts: Parts, kept: Tensors, border: Borders | None, grad: torch.Tensor, flows: Tensors, needs: tuple[bool, ...]
) -> tuple[Parts, Tensors]:
    q, k, _, _, v = parts
    before, norms, *rest = kept
    gates = _Gates(*rest)
    weights = seen(bounded_exp(_sums(gates.coarse, gates.row, gates.column), 0.0).tril_(), border)
    scores, reads = torch.bmm(q, k.mT).mul_(weights), q * gates.inflow
    bottom, sign = _denominator(scores, reads, norms, gates.least)
    grad = grad / bottom
    pull, dq = torch.bmm(grad, v.mT), torch.bmm(grad, before.mT)
    # The gradient of n^T q: the numerator times its own gradient, without computing the numerator again.
    of_size = (scores * pull).sum(-1, keepdim=True).add_((reads * dq).sum(-1, keepdim=True)).div_(-bottom).mul_(sign)
    after, flow = flows_after(torch.bmm(reads.mT, grad), gates.carry, flows[0])
    after_n, flow_n = flows_after((reads * of_size).sum(1, keepdim=True), gates.carry, flows[1].unsqueeze(1))
    pull.add_(of_size)
    dv = torch.bmm(k * gates.outflow, after).baddbmm_(scores.mT, grad)
    dq.addcmul_(of_size, norms).mul_(gates.inflow)
    dk = torch.bmm(v, after.mT).add_(after_n).mul_(gates.outflow)
    shares, sent = scores.mul_(pull), (k * dk).sum(-1)
    di = shares.sum(1).add_(sent)
    held = (before * after).sum((1, 2)).add_((norms * after_n).sum((1, 2))).mul_(gates.carry.flatten())
    df = scalar_decay_gradient(shares, (q * dq).sum(-1), sent, held)
    pull.mul_(weights)
    # The stabiliser is a constant: zeros stand for its gradient.
    return (dq.baddbmm_(pull, k), dk.baddbmm_(pull.mT, q), di, df, dv), (flow, flow_n.squeeze(1), flows[2] * 0)


def _denominator(
    scores: torch.Tensor, reads: torch.Tensor, norms: torch.Tensor, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(|n^T q|, e^-m) (M, C, 1), and its derivative by n^T q."""
    size = (reads * norms).sum(-1, keepdim=True).add_(scores.sum(-1, keepdim=True))
    magnitude = size.abs()
    return torch.maximum(magnitude, least), size.sign_().mul_(magnitude > least)


def _least(m: torch.Tensor) -> torch.Tensor:
    """e^-m, the least denominator; never 0, since q and with it n^T q may be."""
    return (-m).exp().clamp(min=torch.finfo(m.dtype).tiny)


_KERNEL = Kernel(_forward, _backward)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, f: torch.Tensor, state: State
) -> torch.Tensor:
    """One token, called without gradients. Overwrites `state`, `i` and `f` and allocates nothing but its result.

    Args:
        q, k: (B, 1, H, dk). v: (B, 1, H, dv). i, f: (B, 1, H). As in `recurrent`.
        state: C (B, H, dk, dv), n (B, H, dk) and m (B, H), fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    C, n, m = (part.flatten(0, 1) for part in state)
    n, m = n.unsqueeze(-1), m.view(-1, 1, 1)
    q, k, values, write, keep = folded(len(C), C.dtype, q, k, v, i, f)
    k = k.mT
    torch.maximum(keep.add_(m), write, out=m)
    keep.sub_(m).exp_()
    write.sub_(m).exp_()
    out = values * write
    C.mul_(keep).addcmul_(k, out)
    n.mul_(keep).addcmul_(k, write)
    torch.bmm(q, C, out=out)
    size = torch.bmm(q, n, out=write).abs_()
    least = torch.neg(m, out=keep).exp_().clamp_(min=torch.finfo(m.dtype).tiny)
    return out.div_(torch.maximum(size, least, out=size)).view(v.shape).to(v.dtype)


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
