"""The gated delta rule with one decay per head and token (Gated DeltaNet, arXiv 2412.06464, eq. 10).

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

with S (dk, dv), so the transpose of the paper's. The caller normalises k to unit length and scales q.

Stability. With |k| <= 1 and beta in [0, 1] the state is contracted at every step. The chunked form uses decays only as
exp(G_i - G_j) with j <= i, masked before exp, so no log-decay g <= 0 can overflow at any chunk length and none needs a
floor here. (`mixers/gated_deltanet.py` bounds g all the same, for kernels that are less careful.)
"""

from __future__ import annotations

import torch

from .chunks import borders, compute_dtype, initial_state, join, real_segments, scan, split
from .op import Op

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
    q_, k_, v_, beta_, g_ = _masked(q, k, v, beta, g, padding, dtype)
    segments = real_segments(segments, padding)
    fresh = None if segments is None or length == 1 else (segments[:, 1:] == segments[:, :-1]).to(dtype).unbind(1)
    decay = None if g_ is None else g_.exp()[..., None, None].unbind(1)
    columns = k_[..., None].unbind(1)
    rows = k_[..., None, :].unbind(1)
    queries = q_[..., None, :].unbind(1)
    writes = (v_ * beta_[..., None])[..., None, :].unbind(1)
    strengths = beta_[..., None, None].unbind(1)
    out = []
    for t in range(length):
        if fresh is not None and t:
            S = S * fresh[t - 1][:, None, None, None]
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
    and U = U0 - W S is linear in S, hence so are the outputs and the outgoing state: what does not depend on S is
    computed for all chunks at once. Arguments and results as `recurrent`.
    """
    batch, length, heads, dk = k.shape
    dv = v.shape[-1]
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, dv, v, dtype)
        *masked, g = _masked(q, k, v, beta, g, padding, dtype)
        q_, k_, v_, beta_ = (split(x, chunk, dtype) for x in masked)
        G = torch.zeros_like(beta_) if g is None else split(g, chunk, dtype).cumsum(-1)
        hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).triu(1)
        inflow = G.exp()[..., None]
        outflow = (G[:, -1:] - G).exp()[..., None]
        carry = inflow[:, -1:]
        gaps = G[:, :, None] - G[:, None, :]
        real = real_segments(segments, padding)
        if real is None:
            gaps = gaps.masked_fill(hidden, float("-inf"))
        else:
            border = borders(real, chunk, dtype)
            view = (-1, batch, heads)
            gaps = gaps.unflatten(0, view).masked_fill(hidden | ~border.pairs, float("-inf")).flatten(0, 2)
            inflow = (inflow.unflatten(0, view) * border.sees).flatten(0, 2)
            outflow = (outflow.unflatten(0, view) * border.leaves).flatten(0, 2)
            carry = (carry.unflatten(0, view) * border.carries).flatten(0, 2)
        beta_ = beta_[..., None]
        kb = k_ * beta_
        scores = torch.bmm(torch.cat([kb, q_], 1), k_.mT).unflatten(1, (2, chunk)) * gaps.exp()[:, None]
        A, P = scores.unbind(1)
        # The solver reads A strictly below the diagonal and takes ones on it.
        rhs = torch.cat([v_ * beta_, kb * inflow], -1)
        U = torch.linalg.solve_triangular(A, rhs, upper=False, unitriangular=True)
        written, removed = torch.bmm((k_ * outflow).mT, U).split([dv, dk], -1)
        transition = carry * torch.eye(dk, dtype=dtype, device=v.device) - removed
        before, S = scan(
            transition.unflatten(0, (-1, batch * heads)),
            written.unflatten(0, (-1, batch * heads)),
            S.flatten(0, 1),
        )
        direct, corrected = torch.bmm(P, U).split([dv, dk], -1)
        out = torch.baddbmm(direct, q_ * inflow - corrected, before)
        return join(out, batch, length, heads).to(v.dtype), S.unflatten(0, (batch, heads))


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token, without gradients. Overwrites `state` and allocates nothing but its result.

    Args:
        q, k: (B, 1, H, dk). v: (B, 1, H, dv). g: (B, 1, H) or None. beta: (B, 1, H). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        q, k, values, beta = (x.to(state.dtype) for x in (q, k, v, beta))
        out = torch.empty_like(values, memory_format=torch.contiguous_format)
        S = state.flatten(0, 1)
        if g is not None:
            # The result's own memory holds the decays meanwhile.
            state.mul_(torch.exp(g.to(state.dtype), out=out[..., 0]).squeeze(1)[..., None, None])
        rows = out.view(len(S), 1, -1)
        torch.bmm(k.reshape(len(S), 1, -1), S, out=rows)
        torch.sub(values, out, out=out).mul_(beta[..., None])
        S.baddbmm_(k.reshape(len(S), -1, 1), rows)
        torch.bmm(q.reshape(len(S), 1, -1), S, out=rows)
        return out.to(v.dtype)


def _masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    padding: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Inputs in the dtype of the computation; at padding all zero: nothing read, nothing written, no decay."""

    def real(x: torch.Tensor) -> torch.Tensor:
        x = x.to(dtype)
        return x if padding is None else x.masked_fill(~padding.view(*padding.shape, *(1,) * (x.dim() - 2)), 0.0)

    return real(q), real(k), real(v), real(beta), None if g is None else real(g)


OP = Op("gated_delta", recurrent, chunked, step)
