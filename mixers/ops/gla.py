"""Gated linear attention: one decay per channel of the key (GLA, arXiv 2312.06635; RWKV-6, HGRN-2, Liger).

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

with S (dk, dv). The caller scales q.

Stability. The chunked form takes decays relative to the middle of a chunk, so its largest factor is e^(|g| C / 2): with
g >= -5 a chunk of 32 stays below e^80 = 6e34 in fp32. Longer chunks are refused.
"""

from __future__ import annotations

import torch

from .chunks import Borders, compute_dtype, continues, initial_state, masked, real_segments
from .decays import channel_decays, flows_after, seen, states_before
from .op import Op
from .segmented import Kernel, Parts, Tensors, segmented
from .steps import in_dtype, read_state

CHUNK = 32
MAX_CHUNK = 32


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
        g: (B, T, H, dk) log-decay in [-5, 0].
        state: (B, H, dk, dv) from the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; the state is zeroed where the number changes.

    Returns:
        (B, T, H, dv) in the dtype of v, and the (B, H, dk, dv) fp32 state (fp64 for fp64 inputs).
    """
    batch, length, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
    q_, k_, v_, g_ = masked(padding, dtype, q, k, v, g)
    same = continues(segments, padding)
    decay = g_.exp()[..., None].unbind(1)
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
        O = ((Q e^G) (K e^-G)^T, j <= i) V + (Q e^G) S,    S' = e^(G_C) S + (K e^(G_C - G))^T V.

    Arguments and results as `recurrent`.

    Raises:
        ValueError: `chunk` above 32.
    """
    if chunk > MAX_CHUNK:
        raise ValueError(f"chunk={chunk}: the chunked form of GLA is safe in fp32 up to {MAX_CHUNK}")
    batch, _, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
        if padding is not None:
            q, k, v, g = masked(padding, dtype, q, k, v, g)
        out, (S,) = segmented(_KERNEL, (q, k, v, g), (S,), chunk, real_segments(segments, padding))
        return out.to(v.dtype), S


def _forward(parts: Parts, states: Tensors, border: Borders | None) -> tuple[torch.Tensor, Tensors, Tensors]:
    q, k, v, g = parts
    (first,) = states
    decays = channel_decays(g, border)
    left, right = q * decays.left, k * decays.right
    before, last = states_before(torch.bmm((right * decays.outflow).mT, v), decays.carry, first)
    scores = seen(torch.bmm(left, right.mT).tril_(), border)
    return torch.bmm(scores, v).baddbmm_(left * decays.inflow, before), (last,), (before,)


def _backward(
    parts: Parts, kept: Tensors, border: Borders | None, grad: torch.Tensor, flows: Tensors, needs: tuple[bool, ...]
) -> tuple[Parts, Tensors]:
    q, k, v, g = parts
    (before,) = kept
    decays = channel_decays(g, border)
    left, right = q * decays.left, k * decays.right
    after, flow = flows_after(torch.bmm((left * decays.inflow).mT, grad), decays.carry, flows[0])
    scores = seen(torch.bmm(left, right.mT).tril_(), border)
    pull = seen(torch.bmm(grad, v.mT).tril_(), border)
    own = pull.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
    pull.tril_(-1)
    dv = torch.bmm(right * decays.outflow, after).baddbmm_(scores.mT, grad)
    dleft = torch.bmm(grad, before.mT).mul_(decays.inflow).baddbmm_(pull, right)
    dright = torch.bmm(v, after.mT).mul_(decays.outflow)
    # A decay's gradient is the sum, over all products that it enters, of value times gradient. What has no decay, a
    # token's product with itself and what the last one hands on, stays out: it would only leave rounding errors.
    held = (before * after).sum(-1) * decays.carry[..., 0] + (dright * right)[:, :-1].sum(1)
    dright.baddbmm_(pull.mT, left)
    shares = left * dleft
    shares[:, :-1].addcmul_(right[:, :-1], dright[:, :-1], value=-1)
    shares[:, -1] += held
    dq, dk = dleft.mul_(decays.left).addcmul_(own, k), dright.mul_(decays.right).addcmul_(own, q)
    return (dq, dk, dv, shares.flip(1).cumsum(1).flip(1)), (flow,)


_KERNEL = Kernel(_forward, _backward)


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """One token, called without gradients. Overwrites `state` and `g` and allocates nothing but its result.

    Args:
        q, k, g: (B, 1, H, dk). v: (B, 1, H, dv). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    q, k, values, g = in_dtype(state.dtype, q, k, v, g)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    state.mul_(g.exp_().permute(0, 2, 3, 1)).addcmul_(k.permute(0, 2, 3, 1), values.transpose(1, 2))
    return read_state(q, state, out).to(v.dtype)


OP = Op("gla", recurrent, chunked, step)
