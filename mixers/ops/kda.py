"""Kimi delta attention: the gated delta rule with a decay per channel (Kimi Linear, arXiv 2510.26692, eq. 1).

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

with S (dk, dv). The removal acts on the decayed state. The caller normalises k to unit length and scales q.

Stability. With |k| <= 1 and beta in [0, 1] the state is contracted at every step. A decay per channel must be split
between the two sides of a product, so one of them grows: with g >= -5 and decays relative to the middle of a chunk,
up to e^80 = 5e34 in chunks of 32. Longer chunks are refused.
"""

from __future__ import annotations

import torch

from .chunks import Borders, compute_dtype, continues, initial_state, masked, real_segments
from .decays import ChannelDecays, channel_decays, seen
from .delta import Factors, delta_backward, delta_forward
from .op import Op
from .segmented import Kernel, Parts, Tensors, segmented
from .steps import folded

CHUNK = 32
MAX_CHUNK = 32


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: the truth that the other forms are held against.

    Args:
        q, k: (B, T, H, dk). v: (B, T, H, dv).
        g: (B, T, H, dk) log-decay in [-5, 0]. beta: (B, T, H) write strength in [0, 1].
        state: (B, H, dk, dv) from the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; the state is zeroed where the number changes.

    Returns:
        (B, T, H, dv) in the dtype of v, and the (B, H, dk, dv) fp32 state (fp64 for fp64 inputs).
    """
    batch, length, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
    q_, k_, v_, g_, beta_ = masked(padding, dtype, q, k, v, g, beta)
    same = continues(segments, padding)
    decay = g_.exp()[..., None].unbind(1)
    columns = k_[..., None].unbind(1)
    rows = k_[..., None, :].unbind(1)
    queries = q_[..., None, :].unbind(1)
    writes = (v_ * beta_[..., None])[..., None, :].unbind(1)
    strengths = beta_[..., None, None].unbind(1)
    out = []
    for t in range(length):
        if same is not None:
            S = S * same[:, t, None, None, None]
        S = S * decay[t]
        S = S + columns[t] * (writes[t] - strengths[t] * (rows[t] @ S))
        out.append(queries[t] @ S)
    return torch.cat(out, -2).transpose(1, 2).to(v.dtype), S


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks of `chunk` tokens: products inside a chunk, one step per chunk between them.

    With G the cumulated log-decay of a chunk and S its incoming state, what is written, u = beta y, solves
        Y = V - (K e^G) S - A (beta Y),    A_ij = (K e^G)_i . (K e^-G)_j, j < i
    and then O = (Q e^G) S + P (beta Y), with P as A but for Q in the place of the first K, and j <= i;
    S' = e^(G_C) S + (K e^(G_C - G))^T (beta Y). Arguments and results as `recurrent`.

    Raises:
        ValueError: `chunk` above 32.
    """
    if chunk > MAX_CHUNK:
        raise ValueError(f"chunk={chunk}: the chunked form of KDA is safe in fp32 up to {MAX_CHUNK}")
    batch, _, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
        if padding is not None:
            q, k, v, g, beta = masked(padding, dtype, q, k, v, g, beta)
        out, (S,) = segmented(_KERNEL, (q, k, g, beta, v), (S,), chunk, real_segments(segments, padding))
        return out.to(v.dtype), S


def _factors(parts: Parts, border: Borders | None) -> tuple[Factors, torch.Tensor, torch.Tensor, ChannelDecays]:
    """Factors of the delta rule; k and q (M, 2C, dk) with decays on their left, k on its right, and the decays."""
    q, k, g, beta, v = parts
    decays = channel_decays(g, border)
    left, right = torch.cat([k * decays.left, q * decays.left], 1), k * decays.right
    a, P = torch.bmm(left, right.mT).chunk(2, 1)
    Kin, Qin = (x * decays.inflow for x in left.chunk(2, 1))
    a, P = seen(a.tril(-1), border), seen(P.tril(), border)
    return Factors(a, beta[..., None], P, v, Kin, Qin, right * decays.outflow, decays.carry), left, right, decays


def _forward(parts: Parts, states: Tensors, border: Borders | None) -> tuple[torch.Tensor, Tensors, Tensors]:
    out, last, *kept = delta_forward(_factors(parts, border)[0], states[0])
    return out, (last,), tuple(kept)


def _backward(
    parts: Parts, kept: Tensors, border: Borders | None, grad: torch.Tensor, flows: Tensors, needs: tuple[bool, ...]
) -> tuple[Parts, Tensors]:
    q, k, *_ = parts
    T, before = kept
    factors, left, right, decays = _factors(parts, border)
    found, flow, _ = delta_backward(factors, T, before, grad, flows[0])
    pull = torch.cat([seen(found.a.tril_(-1), border), seen(found.P.tril_(), border)], 1)
    own = pull[:, k.shape[1] :].diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
    pull[:, k.shape[1] :].tril_(-1)
    dleft = torch.cat([found.Kin.mul_(decays.inflow), found.Qin.mul_(decays.inflow)], 1).baddbmm_(pull, right)
    dright = found.Kout.mul_(decays.outflow)
    # As in gla: what has no decay, a token's product with itself and what the last one hands on, stays out of dg.
    held = (before * found.carry).sum(-1) * decays.carry[..., 0] + (dright * right)[:, :-1].sum(1)
    dright.baddbmm_(pull.mT, left)
    shares = (left * dleft).unflatten(1, (2, -1)).sum(1)
    shares[:, :-1].addcmul_(right[:, :-1], dright[:, :-1], value=-1)
    shares[:, -1] += held
    dk, dq = dleft.chunk(2, 1)
    dq = (dq * decays.left).addcmul_(own, k)
    dk = (dk * decays.left).addcmul_(dright, decays.right).addcmul_(own, q)
    return (dq, dk, shares.flip(1).cumsum(1).flip(1), found.beta[..., 0], found.V), (flow,)


_KERNEL = Kernel(_forward, _backward)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token, called without gradients. Overwrites `state` and `g` and allocates nothing but its result.

    Args:
        q, k, g: (B, 1, H, dk). v: (B, 1, H, dv). beta: (B, 1, H). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    S = state.flatten(0, 1)
    q, k, values, g, beta = folded(len(S), S.dtype, q, k, v, g, beta)
    S.mul_(g.exp_().mT)
    out = values.clone().baddbmm_(k, S, alpha=-1).mul_(beta)
    S.addcmul_(k.mT, out)
    return torch.bmm(q, S, out=out).view(v.shape).to(v.dtype)


OP = Op("kda", recurrent, chunked, step)
