"""RWKV-7's generalised delta rule: decay per channel, removal and write keys of their own (arXiv 2503.14456).

    S_t = (diag(e^{w_t}) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T        o_t = S_t^T r_t

with S (dk, dv), so the transpose of the paper's: the removal acts on the state before the decay. The caller normalises
kappa to unit length and scales r.

Stability. The recurrence contracts for |kappa| <= 1 and a in [0, 1]. The chunked form takes decays relative to the
middle of a chunk, so its largest intermediate is about e^(|w| C): with w >= -0.6065 (RWKV-7's own bound, e^{-1/2}) a
chunk of 64 stays below e^39 = 1e17 in fp32. Chunks beyond 64 are refused.
"""

from __future__ import annotations

import torch

from .chunks import borders, compute_dtype, initial_state, join, real_segments, scan, split
from .op import Op

CHUNK = 32
MAX_CHUNK = 64


def recurrent(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: the truth that the other forms are held against.

    Args:
        r: (B, T, H, dk) what is read. w: (B, T, H, dk) log-decay in [-0.6065, 0].
        k: (B, T, H, dk) write key. v: (B, T, H, dv).
        kappa: (B, T, H, dk) removal key of unit length. a: (B, T, H, dk) removal strength in [0, 1].
        state: (B, H, dk, dv) from the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; the state is zeroed where the number changes.

    Returns:
        (B, T, H, dv) in the dtype of v, and the (B, H, dk, dv) fp32 state (fp64 for fp64 inputs).
    """
    batch, length, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
    r_, w_, k_, v_, kappa_, a_ = _masked(r, w, k, v, kappa, a, padding, dtype)
    segments = real_segments(segments, padding)
    fresh = None if segments is None or length == 1 else (segments[:, 1:] == segments[:, :-1]).to(dtype).unbind(1)
    decay = w_.exp()[..., None].unbind(1)
    removal = kappa_[..., None, :].unbind(1)
    removed = (kappa_ * a_)[..., None].unbind(1)
    write = k_[..., None].unbind(1)
    values = v_[..., None, :].unbind(1)
    reads = r_[..., None, :].unbind(1)
    out = []
    for t in range(length):
        if fresh is not None and t:
            S = S * fresh[t - 1][:, None, None, None]
        S = S * decay[t] - removed[t] * (removal[t] @ S) + write[t] * values[t]
        out.append(reads[t] @ S)
    return torch.cat(out, -2).transpose(1, 2).to(v.dtype), S


def chunked(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks of `chunk` tokens: products inside a chunk, one step per chunk between them.

    With G the cumulated log-decay of a chunk (inclusive), E = G - w (exclusive) and S the incoming state, the removed
    values y_t = kappa_t^T S_{t-1} solve
        (I + A_kb) Y = (kappa e^E) S + A_kk V,    A_kb = kappa_i . (a kappa)_j e^(E_i - G_j), A_kk with k, j < i
    and Y = Y0 + W S is linear in S, hence so are the outputs and the outgoing state: what does not depend on S is
    computed for all chunks at once. Arguments and results as `recurrent`.

    Raises:
        ValueError: `chunk` above 64.
    """
    if chunk > MAX_CHUNK:
        raise ValueError(f"chunk={chunk}: the chunked form of RWKV-7 is safe in fp32 up to {MAX_CHUNK}")
    batch, length, heads, dk = k.shape
    dv = v.shape[-1]
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, dv, v, dtype)
        masked = _masked(r, w, k, v, kappa, a, padding, dtype)
        r_, w_, k_, v_, kappa_, a_ = (split(x, chunk, dtype) for x in masked)
        G = w_.cumsum(1)
        middle = G[:, chunk // 2, None]
        left = torch.cat([kappa_ * (G - w_ - middle).exp(), r_ * (G - middle).exp()], 1)
        right = torch.cat([kappa_ * a_, k_], 1) * (middle - G).exp().repeat(1, 2, 1)
        scores = torch.bmm(left, right.mT)
        inflow = left * middle.exp()
        outflow = right * (G[:, -1:] - middle).exp()
        carry = G[:, -1].exp()
        # kappa sees what came before its token, r sees its own token too.
        ones = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device)
        hidden = torch.cat([ones.triu(0), ones.triu(1)]).repeat(1, 2)
        real = real_segments(segments, padding)
        if real is None:
            scores = scores.masked_fill(hidden, 0.0)
        else:
            border = borders(real, chunk, dtype)
            view = (-1, batch, heads)
            pairs = border.pairs.repeat(1, 1, 1, 2, 2)
            scores = scores.unflatten(0, view).masked_fill(hidden | ~pairs, 0.0).flatten(0, 2)
            inflow = (inflow.unflatten(0, view) * border.sees.repeat(1, 1, 1, 2, 1)).flatten(0, 2)
            outflow = (outflow.unflatten(0, view) * border.leaves.repeat(1, 1, 1, 2, 1)).flatten(0, 2)
            carry = (carry.unflatten(0, view) * border.carries[..., 0]).flatten(0, 2)
        A_k, A_r = scores.split(chunk, 1)
        rhs = torch.cat([torch.bmm(A_k[:, :, chunk:], v_), inflow[:, :chunk]], -1)
        Y = torch.linalg.solve_triangular(A_k[:, :, :chunk], rhs, upper=False, unitriangular=True)
        removed, forgotten = torch.bmm(outflow[:, :chunk].mT, Y).split([dv, dk], -1)
        written = torch.baddbmm(-removed, outflow[:, chunk:].mT, v_)
        before, S = scan(
            (torch.diag_embed(carry) - forgotten).unflatten(0, (-1, batch * heads)),
            written.unflatten(0, (-1, batch * heads)),
            S.flatten(0, 1),
        )
        direct, corrected = torch.bmm(A_r[:, :, :chunk], Y).split([dv, dk], -1)
        out = torch.baddbmm(-direct, A_r[:, :, chunk:], v_)
        out = torch.baddbmm(out, inflow[:, chunk:] - corrected, before)
        return join(out, batch, length, heads).to(v.dtype), S.unflatten(0, (batch, heads))


def step(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """One token, without gradients. Overwrites `state`, `w` and `a` and allocates nothing but its result.

    Args:
        r, w, k, kappa, a: (B, 1, H, dk). v: (B, 1, H, dv). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        r, w, k, values, kappa, a = (x.to(state.dtype) for x in (r, w, k, v, kappa, a))
        out = torch.empty_like(values, memory_format=torch.contiguous_format)
        S = state.flatten(0, 1)
        rows = out.view(len(S), 1, -1)
        torch.bmm(kappa.reshape(len(S), 1, -1), S, out=rows)
        state.mul_(w.exp_().transpose(1, 2).mT)
        S.baddbmm_(a.mul_(kappa).reshape(len(S), -1, 1), rows, alpha=-1)
        S.baddbmm_(k.reshape(len(S), -1, 1), values.reshape(len(S), 1, -1))
        torch.bmm(r.reshape(len(S), 1, -1), S, out=rows)
        return out.to(v.dtype)


def _masked(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    padding: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Inputs in the dtype of the computation; at padding all zero: nothing read, nothing written, no decay."""
    inputs = tuple(x.to(dtype) for x in (r, w, k, v, kappa, a))
    if padding is None:
        return inputs
    absent = ~padding[..., None, None]
    return tuple(x.masked_fill(absent, 0.0) for x in inputs)


OP = Op("rwkv7", recurrent, chunked, step)
