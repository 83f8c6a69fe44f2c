"""The gated delta rule with one decay per head and token (Gated DeltaNet, arXiv 2412.06464, eq. 10).

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

with S (dk, dv), so the transpose of the paper's. The caller normalises k to unit length and scales q.

Stability. With |k| <= 1 and beta in [0, 1] the state is contracted at every step. The chunked form uses decays only as
exp(G_i - G_j) with j <= i, cut at 0 before exp, so no log-decay g <= 0 can overflow at any chunk length and none needs
a floor here. (`mixers/gated_deltanet.py` bounds g all the same, for kernels that are less careful.)
"""

from __future__ import annotations

import torch

from .chunks import Borders, compute_dtype, continues, initial_state, masked, real_segments
from .decays import Decays, scalar_decays
from .op import Op
from .segmented import Kernel, Parts, Tensors, segmented
from .steps import decay_state, in_dtype, read_state

CHUNK = 32


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: the truth that the other forms are held against.

    Args:
        q, k: (B, T, H, dk). v: (B, T, H, dv).
        g: (B, T, H) log-decay, <= 0; None for none (DeltaNet). beta: (B, T, H) write strength in [0, 1].
        state: (B, H, dk, dv) from the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; the state is zeroed where the number changes.

    Returns:
        (B, T, H, dv) in the dtype of v, and the (B, H, dk, dv) fp32 state (fp64 for fp64 inputs).
    """
    batch, length, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
    q_, k_, v_, beta_, g_ = masked(padding, dtype, q, k, v, beta, g)
    same = continues(segments, padding)
    decay = None if g_ is None else g_.exp()[..., None, None].unbind(1)
    columns = k_[..., None].unbind(1)
    rows = k_[..., None, :].unbind(1)
    queries = q_[..., None, :].unbind(1)
    writes = (v_ * beta_[..., None])[..., None, :].unbind(1)
    strengths = beta_[..., None, None].unbind(1)
    out = []
    for t in range(length):
        if same is not None:
            S = S * same[:, t, None, None, None]
        if decay is not None:
            S = S * decay[t]
        S = S + columns[t] * (writes[t] - strengths[t] * (rows[t] @ S))
        out.append(queries[t] @ S)
    return torch.cat(out, -2).transpose(1, 2).to(v.dtype), S


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks of `chunk` tokens: products inside a chunk, one step per chunk between them.

    With G the cumulated log-decay of a chunk and S its incoming state, the values u that are written solve
        (I + A) U = beta V - beta e^G K S,    A_ij = beta_i (k_i . k_j) e^(G_i - G_j), j < i
    and then O = P U + e^G Q S with P as A but for q in the place of beta k, and j <= i; S' = e^(G_C) S +
    (e^(G_C - G) K)^T U. Arguments and results as `recurrent`.
    """
    batch, _, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
        if padding is not None:
            q, k, v, beta, g = masked(padding, dtype, q, k, v, beta, g)
        out, (S,) = segmented(_KERNEL, (q, k, v, g, beta), (S,), chunk, real_segments(segments, padding))
        return out.to(v.dtype), S


def _prepare(parts: Parts, border: Borders | None) -> tuple[torch.Tensor, torch.Tensor, Decays | None]:
    """Keys, times their strengths, above queries, (M, 2C, dk); the same with the decay of what they read in the
    incoming state; the decays, if any."""
    q, k, _, g, beta = parts
    rows = torch.cat([k * beta.unsqueeze(-1), q], 1)
    if g is None and border is None:
        return rows, rows, None
    decays = scalar_decays(torch.zeros_like(beta) if g is None else g, k, border)
    return rows, (rows.unflatten(1, (2, -1)) * decays.inflow.unsqueeze(1)).flatten(1, 2), decays


def _forward(parts: Parts, states: Tensors, border: Borders | None) -> tuple[torch.Tensor, Tensors, Tensors]:
    _, k, v, _, beta = parts
    (S,) = states
    chunk, heads = k.shape[1], len(S)
    rows, left, decays = _prepare(parts, border)
    scores = torch.bmm(rows, k.mT).unflatten(1, (2, chunk))
    A, P = (scores.tril_() if decays is None else scores.mul_(decays.pairs.unsqueeze(1))).unbind(1)
    eye = torch.eye(chunk, device=k.device, dtype=k.dtype).expand_as(A)
    # The solver reads A strictly below the diagonal and takes ones on it.
    inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    values = v * beta.unsqueeze(-1)
    sent = k if decays is None else k * decays.outflow
    written, before = [], []
    for n in range(0, len(k), heads):
        here = slice(n, n + heads)
        before.append(S)
        written.append(torch.bmm(inverse[here], torch.baddbmm(values[here], left[here, :chunk], S, alpha=-1)))
        S = torch.baddbmm(S if decays is None else S * decays.carry[here], sent[here].mT, written[-1])
    U, past = torch.cat(written), torch.cat(before)
    return torch.bmm(P, U).baddbmm_(left[:, chunk:], past), (S,), (inverse, U, past)


def _backward(
    parts: Parts, kept: Tensors, border: Borders | None, grad: torch.Tensor, flows: Tensors, needs: tuple[bool, ...]
) -> tuple[Parts, Tensors]:
    q, k, v, _, beta = parts
    inverse, U, before = kept
    (flow,) = flows
    chunk, heads = k.shape[1], len(flow)
    rows, left, decays = _prepare(parts, border)
    P = torch.bmm(q, k.mT)
    P = P.tril_() if decays is None else P.mul_(decays.pairs)
    sent = k if decays is None else k * decays.outflow
    # Gradients of the values written, and of what every row reads: with a minus for the keys, which take it away.
    asked, pulled = torch.bmm(left[:, chunk:].mT, grad), torch.bmm(P.mT, grad)
    reads, after = [], []
    for n in range(len(k) - heads, -1, -heads):
        here = slice(n, n + heads)
        after.append(flow)
        reads.append(torch.bmm(inverse[here].mT, pulled[here].baddbmm_(sent[here], flow)).neg_())
        flow = asked[here] if decays is None else torch.addcmul(asked[here], flow, decays.carry[here])
        flow = torch.baddbmm(flow + after[-1] if decays is None else flow, left[here, :chunk].mT, reads[-1])
    dR, after = torch.cat(reads[::-1]), torch.cat(after[::-1])
    both = torch.cat([dR, grad], 1)
    drows, dk = torch.bmm(both, before.mT), torch.bmm(U, after.mT)
    shares = torch.bmm(both, U.mT).unflatten(1, (2, chunk))
    own = shares[:, 1].diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
    shares.tril_(-1)
    held = None
    if decays is not None:
        shares.mul_(decays.pairs.unsqueeze(1))
        drows.unflatten(1, (2, chunk)).mul_(decays.inflow.unsqueeze(1))
        dk.mul_(decays.outflow)
        if needs[3]:
            held = (before * after).sum((1, 2)) * decays.carry.flatten() + (k * dk)[:, :-1].sum((1, 2))
    shares = shares.flatten(1, 2)
    drows.baddbmm_(shares, k)
    dk.baddbmm_(shares.mT, rows)
    dkey, dq = drows.split(chunk, 1)
    strength = (dkey * k).sum(-1)
    dg = None
    if held is not None:
        # A decay's gradient is the sum, over all products that it enters, of value times gradient. What has no decay,
        # a query with its own key and what the last token hands on, stays out: it would only leave rounding errors.
        dG = (dq * q).sum(-1).add_(strength * beta)
        dG[:, :-1] -= (dk * k)[:, :-1].sum(-1)
        dG[:, -1] += held
        dg = dG.flip(1).cumsum(1).flip(1)
    dbeta = strength.sub_((dR * v).sum(-1))
    beta = beta.unsqueeze(-1)
    dq, dk = torch.addcmul(dq, own, k), dk.addcmul_(own, q).addcmul_(dkey, beta)
    return (dq, dk, dR * -beta, dg, dbeta), (flow,)


_KERNEL = Kernel(_forward, _backward)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token, called without gradients. Overwrites `state` and allocates nothing but its result.

    Args:
        q, k: (B, 1, H, dk). v: (B, 1, H, dv). g: (B, 1, H) or None. beta: (B, 1, H). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    q, k, values, beta = in_dtype(state.dtype, q, k, v, beta)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    if g is not None:
        decay_state(state, g, out)
    torch.sub(values, read_state(k, state, out), out=out).mul_(beta.unsqueeze(-1))
    state.addcmul_(k.permute(0, 2, 3, 1), out.transpose(1, 2))
    return read_state(q, state, out).to(v.dtype)


OP = Op("gated_delta", recurrent, chunked, step)
