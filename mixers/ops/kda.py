"""Kimi delta attention: the gated delta rule with a decay per channel (Kimi Linear, arXiv 2510.26692, eq. 1).

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

with S (dk, dv). The removal acts on the decayed state. The caller normalises k to unit length and scales q.

Stability. With |k| <= 1 and beta in [0, 1] the state is contracted at every step. A decay per channel must be split
between the two sides of a product, so one of them grows: the chunked form takes decays relative to the middle of a
block of 16 tokens, and between blocks relative to the border, where both sides shrink. With g >= -5 the largest
intermediate is e^40 = 2e17 at any chunk length; g below -10 may overflow in fp32.
"""

from __future__ import annotations

import torch

from .chunks import borders, compute_dtype, initial_state, join, real_segments, scan, split
from .op import Op

CHUNK = 32
BLOCK = 16


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
    q_, k_, v_, g_, beta_ = _masked(q, k, v, g, beta, padding, dtype)
    segments = real_segments(segments, padding)
    fresh = None if segments is None or length == 1 else (segments[:, 1:] == segments[:, :-1]).to(dtype).unbind(1)
    decay = g_.exp()[..., None].unbind(1)
    columns = k_[..., None].unbind(1)
    rows = k_[..., None, :].unbind(1)
    queries = q_[..., None, :].unbind(1)
    writes = (v_ * beta_[..., None])[..., None, :].unbind(1)
    strengths = beta_[..., None, None].unbind(1)
    out = []
    for t in range(length):
        if fresh is not None and t:
            S = S * fresh[t - 1][:, None, None, None]
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

    With G the cumulated log-decay of a chunk and S its incoming state, the values u that are written solve
        (I + A) U = beta V - beta (K e^G) S,    A_ij = beta_i sum_c k_ic k_jc e^(G_ic - G_jc), j < i
    and U = U0 - W S is linear in S, hence so are the outputs and the outgoing state: what does not depend on S is
    computed for all chunks at once. Arguments and results as `recurrent`.

    Raises:
        ValueError: `chunk` above 16 and no multiple of it.
    """
    if chunk > BLOCK and chunk % BLOCK:
        raise ValueError(f"chunk={chunk}: expected at most {BLOCK}, or a multiple of it")
    batch, length, heads, dk = k.shape
    dv = v.shape[-1]
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, dv, v, dtype)
        masked = _masked(q, k, v, g, beta, padding, dtype)
        q_, k_, v_, g_, beta_ = (split(x, chunk, dtype) for x in masked)
        beta_ = beta_[..., None]
        scores, reads, outflow, carry = _decayed(q_, k_, g_)
        hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).triu(1)
        real = real_segments(segments, padding)
        if real is None:
            scores = scores.masked_fill(hidden, 0.0)
        else:
            border = borders(real, chunk, dtype)
            view = (-1, batch, heads)
            scores = scores.unflatten(0, view).masked_fill(hidden | ~border.pairs.unsqueeze(3), 0.0).flatten(0, 2)
            reads = (reads.unflatten(0, view) * border.sees.unsqueeze(3)).flatten(0, 2)
            outflow = (outflow.unflatten(0, view) * border.leaves).flatten(0, 2)
            carry = (carry.unflatten(0, view) * border.carries[..., 0]).flatten(0, 2)
        A, P = scores.unbind(1)
        # The solver reads A strictly below the diagonal and takes ones on it.
        rhs = torch.cat([v_, reads[:, 0]], -1) * beta_
        U = torch.linalg.solve_triangular(A * beta_, rhs, upper=False, unitriangular=True)
        written, removed = torch.bmm(outflow.mT, U).split([dv, dk], -1)
        before, S = scan(
            (torch.diag_embed(carry) - removed).unflatten(0, (-1, batch * heads)),
            written.unflatten(0, (-1, batch * heads)),
            S.flatten(0, 1),
        )
        direct, corrected = torch.bmm(P, U).split([dv, dk], -1)
        out = torch.baddbmm(direct, reads[:, 1] - corrected, before)
        return join(out, batch, length, heads).to(v.dtype), S.unflatten(0, (batch, heads))


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token, without gradients. Overwrites `state` and `g` and allocates nothing but its result.

    Args:
        q, k, g: (B, 1, H, dk). v: (B, 1, H, dv). beta: (B, 1, H). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        S = state.flatten(0, 1)
        k_, q_, g_ = (x.to(S.dtype).reshape(len(S), 1, -1) for x in (k, q, g))
        out = torch.empty_like(v, dtype=S.dtype, memory_format=torch.contiguous_format)
        row = out.view(len(S), 1, -1)
        S.mul_(g_.exp_().mT)
        torch.bmm(k_, S, out=row)
        torch.sub(v, out, out=out).mul_(beta[..., None])
        S.addcmul_(k_.mT, row)
        torch.bmm(q_, S, out=row)
        return out.to(v.dtype)


def _decayed(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and keys with their decays, of (X, C, dk) inputs.

    Returns:
        (X, 2, C, C) scores of k and of q on k, right on and below the diagonal; (X, 2, C, dk) k and q with the decay
        since the chunk's start; (X, C, dk) keys with the decay until its end; (X, dk) the decay over the whole chunk.
    """
    chunk = k.shape[1]
    block = min(BLOCK, chunk)
    G = g.unflatten(1, (-1, block)).cumsum(2)  # (X, blocks, block, dk): since the block's start
    middle = G[:, :, block // 2, None]
    both = torch.stack([k, q], 1).unflatten(2, (-1, block))  # (X, 2, blocks, block, dk)
    keys = k.unflatten(1, (-1, block))
    left = both * (G - middle).exp()[:, None]
    right = keys * (middle - G).exp()
    near = torch.matmul(left, right.mT[:, None])  # (X, 2, blocks, block, block)
    reads = left * middle.exp()[:, None]
    ends = right * (G[:, :, -1:] - middle).exp()
    whole = G[:, :, -1].exp().unbind(1)
    # Walk over the blocks: keys of all earlier blocks, decayed until the border; reads since the chunk's start.
    rows, since, before, outflow = [], [], None, None
    for n, (diagonal, read, end) in enumerate(zip(near.unbind(2), reads.unbind(2), ends.unbind(1), strict=True)):
        if outflow is None or before is None:
            outflow, before = end, whole[n]
            rows.append(torch.nn.functional.pad(diagonal, (0, chunk - block)))
            since.append(read)
        else:
            far = torch.matmul(read, outflow.mT[:, None])
            rows.append(torch.nn.functional.pad(torch.cat([far, diagonal], -1), (0, chunk - (n + 1) * block)))
            since.append(read * before[:, None, None])
            outflow = torch.cat([outflow * whole[n][:, None], end], 1)
            before = before * whole[n]
    assert outflow is not None and before is not None
    return torch.cat(rows, 2), torch.cat(since, 2), outflow, before


def _masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    padding: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Inputs in the dtype of the computation; at padding all zero: nothing read, nothing written, no decay."""
    inputs = tuple(x.to(dtype) for x in (q, k, v, g, beta))
    if padding is None:
        return inputs
    absent = ~padding[..., None]
    return tuple(x.masked_fill(absent[..., None] if x.dim() == 4 else absent, 0.0) for x in inputs)


OP = Op("kda", recurrent, chunked, step)
