"""Gated linear attention: one decay per channel of the key (GLA, arXiv 2312.06635; RWKV-6, HGRN-2, Liger).

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

with S (dk, dv). The caller scales q.

Stability. The chunked form takes decays relative to the middle of a chunk, so its largest factor is e^(|g| C / 2): with
g >= -5 a chunk of 32 stays below e^80 = 6e34 in fp32. Longer chunks are refused.
"""

from __future__ import annotations

import torch

from .chunks import borders, compute_dtype, initial_state, join, real_segments, scan, split
from .op import Op

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
    q_, k_, v_, g_ = _masked(q, k, v, g, padding, dtype)
    segments = real_segments(segments, padding)
    fresh = None if segments is None or length == 1 else (segments[:, 1:] == segments[:, :-1]).to(dtype).unbind(1)
    decay = g_.exp()[..., None].unbind(1)
    columns = k_[..., None].unbind(1)
    rows = v_[..., None, :].unbind(1)
    queries = q_[..., None, :].unbind(1)
    out = []
    for t in range(length):
        if fresh is not None and t:
            S = S * fresh[t - 1][:, None, None, None]
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
    batch, length, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
        q_, k_, v_, g_ = (split(x, chunk, dtype) for x in _masked(q, k, v, g, padding, dtype))
        G = g_.cumsum(1)
        middle = G[:, chunk // 2, None]
        left, right = q_ * (G - middle).exp(), k_ * (middle - G).exp()
        inflow, outflow = left * middle.exp(), right * (G[:, -1:] - middle).exp()
        carry = G[:, -1].exp()
        hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).triu(1)
        scores = torch.bmm(left, right.mT)
        real = real_segments(segments, padding)
        if real is None:
            scores = scores.masked_fill(hidden, 0.0)
        else:
            border = borders(real, chunk, dtype)
            view = (-1, batch, heads)
            scores = scores.unflatten(0, view).masked_fill(hidden | ~border.pairs, 0.0).flatten(0, 2)
            inflow = (inflow.unflatten(0, view) * border.sees).flatten(0, 2)
            outflow = (outflow.unflatten(0, view) * border.leaves).flatten(0, 2)
            carry = (carry.unflatten(0, view) * border.carries[..., 0]).flatten(0, 2)
        before, S = scan(
            torch.diag_embed(carry).unflatten(0, (-1, batch * heads)),
            torch.bmm(outflow.mT, v_).unflatten(0, (-1, batch * heads)),
            S.flatten(0, 1),
        )
        out = torch.baddbmm(torch.bmm(scores, v_), inflow, before)
        return join(out, batch, length, heads).to(v.dtype), S.unflatten(0, (batch, heads))


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """One token, without gradients. Overwrites `state` and `g` and allocates nothing but its result.

    Args:
        q, k, g: (B, 1, H, dk). v: (B, 1, H, dv). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        q, k, values, g = (x.to(state.dtype) for x in (q, k, v, g))
        out = torch.empty_like(values, memory_format=torch.contiguous_format)
        S = state.flatten(0, 1)
        state.mul_(g.exp_().transpose(1, 2).mT)
        S.baddbmm_(k.reshape(len(S), -1, 1), values.reshape(len(S), 1, -1))
        torch.bmm(q.reshape(len(S), 1, -1), S, out=out.view(len(S), 1, -1))
        return out.to(v.dtype)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, padding: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Inputs in the dtype of the computation; at padding all zero: nothing read, nothing written, no decay."""
    inputs = tuple(x.to(dtype) for x in (q, k, v, g))
    if padding is None:
        return inputs
    absent = ~padding[..., None, None]
    return tuple(x.masked_fill(absent, 0.0) for x in inputs)


OP = Op("gla", recurrent, chunked, step)
