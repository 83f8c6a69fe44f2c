"""Linear attention with one decay per head: of each token (Mamba-2's SSD, arXiv 2405.21060; simple GLA) or fixed
(RetNet, arXiv 2307.08621; lightning attention, arXiv 2401.04658).

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

with S (dk, dv). The caller scales q.

Stability. Decays occur only as exp(G_i - G_j) with j <= i, cut at 0 before exp: no log-decay g <= 0 can overflow at any
chunk length. The cumulated G is kept in fp64, so that a small difference of two large sums is right too.
"""

from __future__ import annotations

import torch

from .chunks import Borders, compute_dtype, continues, initial_state, masked, real_segments
from .decays import flows_after, scalar_decay_gradient, scalar_decays, states_before
from .op import Op
from .segmented import Kernel, Parts, Tensors, segmented
from .steps import decay_state, in_dtype, read_state

CHUNK = 32


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: the truth that the other forms are held against.

    Args:
        q, k: (B, T, H, dk). v: (B, T, H, dv).
        g: log-decay, <= 0: (B, T, H), or (H,) where it is the same at every token.
        state: (B, H, dk, dv) from the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; the state is zeroed where the number changes.

    Returns:
        (B, T, H, dv) in the dtype of v, and the (B, H, dk, dv) fp32 state (fp64 for fp64 inputs).
    """
    batch, length, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
    q_, k_, v_, g_ = masked(padding, dtype, q, k, v, _per_token(g, k))
    same = continues(segments, padding)
    decay = g_.exp()[..., None, None].unbind(1)
    columns = k_[..., None].unbind(1)
    rows = v_[..., None, :].unbind(1)
    queries = q_[..., None, :].unbind(1)
    out = []
    for t in range(length):
        if same is not None:
            S = S * same[:, t, None, None, None]
        S = S * decay[t] + columns[t] * rows[t]
        out.append(queries[t] @ S)
    return torch.cat(out, -2).transpose(1, 2).to(v.dtype), S


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks of `chunk` tokens: with G the cumulated log-decay of a chunk and S its incoming state,
        O = ((Q K^T) * e^(G_i - G_j), j <= i) V + e^G Q S,    S' = e^(G_C) S + (e^(G_C - G) K)^T V.

    Arguments and results as `recurrent`.
    """
    batch, _, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
        if padding is not None:
            q, k, v, g = masked(padding, dtype, q, k, v, _per_token(g, k))
        out, (S,) = segmented(_KERNEL, (q, k, v, g), (S,), chunk, real_segments(segments, padding))
        return out.to(v.dtype), S


def _forward(parts: Parts, states: Tensors, border: Borders | None) -> tuple[torch.Tensor, Tensors, Tensors]:
    q, k, v, g = parts
    (first,) = states
    decays = scalar_decays(g, k, border)
    before, last = states_before(torch.bmm((k * decays.outflow).mT, v), decays.carry, first)
    out = torch.bmm(torch.bmm(q, k.mT).mul_(decays.pairs), v).baddbmm_(q * decays.inflow, before)
    return out, (last,), (before,)


def _backward(
    parts: Parts, kept: Tensors, border: Borders | None, grad: torch.Tensor, flows: Tensors, needs: tuple[bool, ...]
) -> tuple[Parts, Tensors]:
    q, k, v, g = parts
    (before,) = kept
    decays = scalar_decays(g, k, border)
    after, flow = flows_after(torch.bmm((q * decays.inflow).mT, grad), decays.carry, flows[0])
    scores = torch.bmm(q, k.mT).mul_(decays.pairs)
    pull = torch.bmm(grad, v.mT)
    dv = torch.bmm(k * decays.outflow, after).baddbmm_(scores.mT, grad)
    dq = torch.bmm(grad, before.mT).mul_(decays.inflow)
    dk = torch.bmm(v, after.mT).mul_(decays.outflow)
    dg = None
    if needs[3]:
        read, sent = (q * dq).sum(-1), (k * dk).sum(-1)
        held = (before * after).sum((1, 2)) * decays.carry.flatten()
        dg = scalar_decay_gradient(scores.mul_(pull), read, sent, held)
        if g.dim() == 1:
            dg = dg.sum(1).view(-1, len(g)).sum(0)
    pull.mul_(decays.pairs)
    return (dq.baddbmm_(pull, k), dk.baddbmm_(pull.mT, q), dv, dg), (flow,)


_KERNEL = Kernel(_forward, _backward)


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """One token, called without gradients. Overwrites `state` and allocates nothing but its result.

    Args:
        q, k: (B, 1, H, dk). v: (B, 1, H, dv). g: (B, 1, H) or (H,). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    q, k, values = in_dtype(state.dtype, q, k, v)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    decay_state(state, g, out)
    state.addcmul_(k.permute(0, 2, 3, 1), values.transpose(1, 2))
    return read_state(q, state, out).to(v.dtype)


def _per_token(g: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Log-decays (B, T, H), fixed ones too."""
    return g.expand(*k.shape[:2], -1) if g.dim() == 1 else g


OP = Op("simple_gla", recurrent, chunked, step)
