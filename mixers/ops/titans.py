"""Titans' neural memory, linear: gradient descent with momentum and forgetting (arXiv 2501.00663, sec. 3.1).

    u_t = theta_t (v_t - M_{t-1}^T k_t)                     minus theta times the gradient of |M^T k - v|^2 / 2
    S_t = eta_t S_{t-1} + k_t u_t^T                         momentum
    M_t = (1 - alpha_t) M_{t-1} + S_t        o_t = M_t^T q_t

with M, S (dk, dv), so the transpose of the paper's. The caller normalises k to unit length and scales q.

How it differs from the paper. There the memory may be an MLP; here it is a matrix. There, to compute a chunk at once,
sec. 3.2 takes all gradients of a chunk at the memory with which the chunk began; here every token's gradient is taken
at the memory that the token finds, as sec. 3.1 defines it, so the result depends on no chunk size. What makes that
possible in parallel is that the memory is linear: the u of a chunk solve a triangular system. The factor 2 of the
gradient is in theta.

Stability. With |k| <= 1 and constant gates in (0, 1) the pair of M and S contracts: the polynomial
x^2 - (1 - alpha + eta - theta) x + (1 - alpha) eta has its roots within the unit circle for
theta < (2 - alpha) (1 + eta).
"""

from __future__ import annotations

import torch

from .chunks import borders, compute_dtype, initial_state, join, real_segments, scan, split
from .op import Op

CHUNK = 32

State = tuple[torch.Tensor, torch.Tensor]


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor,
    alpha: torch.Tensor,
    state: State | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """Token by token: the truth that the other forms are held against.

    Args:
        q, k: (B, T, H, dk). v: (B, T, H, dv).
        theta, eta, alpha: (B, T, H) step size, momentum and forgetting, each in (0, 1).
        state: M and S, each (B, H, dk, dv), from the previous call; of the first token's document.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; the state is zeroed where the number changes.

    Returns:
        (B, T, H, dv) in the dtype of v, and M and S in fp32 (fp64 for fp64 inputs).
    """
    length = v.shape[1]
    dtype = compute_dtype(v.dtype)
    M, S = _initial(state, k, v, dtype)
    q_, k_, v_, theta_, eta_, alpha_ = (x.to(dtype) for x in (q, k, v, theta, eta, alpha))
    real = torch.ones(v.shape[:2], dtype=torch.bool, device=v.device) if padding is None else padding
    segments = real_segments(segments, padding)
    fresh = None if segments is None or length == 1 else (segments[:, 1:] == segments[:, :-1]).to(dtype).unbind(1)
    columns, rows = k_[..., None].unbind(1), k_[..., None, :].unbind(1)
    values, queries = v_[..., None, :].unbind(1), q_[..., None, :].unbind(1)
    gates = (x[..., None, None].unbind(1) for x in (theta_, eta_, 1 - alpha_))
    out = []
    for t, (rate, momentum, keep) in enumerate(zip(*gates, strict=True)):
        if fresh is not None and t:
            same = fresh[t - 1][:, None, None, None]
            M, S = M * same, S * same
        here = real[:, t, None, None, None]
        S = torch.where(here, momentum * S + columns[t] * (rate * (values[t] - rows[t] @ M)), S)
        M = torch.where(here, keep * M + S, M)
        out.append(torch.where(here, queries[t] @ M, 0.0))
    return torch.cat(out, -2).transpose(1, 2).to(v.dtype), (M, S)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor,
    alpha: torch.Tensor,
    state: State | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, State]:
    """The same in chunks of `chunk` tokens: products inside a chunk, one step per chunk between them.

    With A(t, r) the product of 1 - alpha and E(t, r) that of eta over the tokens after r up to t, what token s writes
    reaches M_t with the weight c(t, s) = sum_r A(t, r) E(r, s), a product of two matrices; the incoming M and S reach
    it with A(t, 0) and e(t) = sum_r A(t, r) E(r, 0). The u of a chunk solve
        (I + L) U = theta (V - A(t-1, 0) K M - e(t-1) K S),    L_ts = theta_t c(t-1, s) (k_t . k_s), s < t
    and are linear in M and S. Arguments and results as `recurrent`.
    """
    batch, length, heads, dk = k.shape
    dv = v.shape[-1]
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        M, S = _initial(state, k, v, dtype)
        q_, k_, v_ = (split(x, chunk, dtype) for x in (q, k, v))
        weights = _weights(theta, eta, alpha, padding, segments, chunk, dtype)
        rate, before, found_M, found_S, within, inflow_M, inflow_S, last, whole = weights
        scores = torch.bmm(torch.cat([k_, q_], 1), k_.mT).unflatten(1, (2, chunk))
        # The solver reads below the diagonal and takes ones on it.
        rhs = torch.cat([v_, k_ * found_M, k_ * found_S], -1) * rate
        U = torch.linalg.solve_triangular(scores[:, 0] * before * rate, rhs, upper=False, unitriangular=True)
        sent = (k_[:, :, None] * last).flatten(2)  # (X, C, 2 dk)
        written, removed = torch.bmm(sent.mT, U).split([dv, 2 * dk], -1)
        eye = torch.eye(dk, dtype=dtype, device=v.device)
        kept = (whole[:, :, None, :, None] * eye[:, None]).flatten(3).flatten(1, 2)
        states, final = scan(
            (kept - removed).unflatten(0, (-1, batch * heads)),
            written.unflatten(0, (-1, batch * heads)),
            torch.cat([M, S], 2).flatten(0, 1),
        )
        direct, corrected = torch.bmm(scores[:, 1] * within, U).split([dv, 2 * dk], -1)
        out = torch.baddbmm(direct, torch.cat([q_ * inflow_M, q_ * inflow_S], -1) - corrected, states)
        out = join(out, batch, length, heads)
        if padding is not None:
            out = out.masked_fill(~padding[..., None, None], 0.0)
        M, S = final.unflatten(0, (batch, heads)).split(dk, 2)
        return out.to(v.dtype), (M, S)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor,
    alpha: torch.Tensor,
    state: State,
) -> torch.Tensor:
    """One token, without gradients. Overwrites `state` and `alpha` and allocates nothing but its result.

    Args:
        q, k: (B, 1, H, dk). v: (B, 1, H, dv). theta, eta, alpha: (B, 1, H). As in `recurrent`.
        state: M and S, each (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        M, S = (part.flatten(0, 1) for part in state)
        q_, k_ = (x.to(M.dtype).reshape(len(M), 1, -1) for x in (q, k))
        rate, momentum, forget = (x.to(M.dtype).reshape(-1, 1, 1) for x in (theta, eta, alpha))
        out = torch.empty_like(v, dtype=M.dtype, memory_format=torch.contiguous_format)
        row = out.view(len(M), 1, -1)
        torch.bmm(k_, M, out=row)
        torch.sub(v, out, out=out)
        S.mul_(momentum).addcmul_(k_.mT, row.mul_(rate))
        M.mul_(forget.neg_().add_(1)).add_(S)
        torch.bmm(q_, M, out=row)
        return out.to(v.dtype)


def _weights(
    theta: torch.Tensor,
    eta: torch.Tensor,
    alpha: torch.Tensor,
    padding: torch.Tensor | None,
    segments: torch.Tensor | None,
    chunk: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """With what weight everything in a chunk reaches everything else.

    Returns:
        theta (X, C, 1); c(t-1, s) (X, C, C); what a token finds of the incoming M and S, (X, C, 1) each; c(t, s)
        (X, C, C); with what M and S reach its output, (X, C, 1) each; with what a token reaches the outgoing M and S,
        (X, C, 2, 1); and with what the incoming (M, S) reach the outgoing (M, S), (X, 2, 2).
    """
    heads = theta.shape[2]
    here = torch.ones_like(theta, dtype=dtype) if padding is None else padding[..., None].expand_as(theta).to(dtype)
    # Gates of exactly 0 or 1, where a sigmoid has saturated, are moved by less than fp32 resolves beside 1.
    forget = torch.log1p(-alpha.to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)) * here
    momentum = eta.to(dtype).clamp(min=torch.finfo(dtype).tiny).log() * here
    rate, forget, momentum, here = (split(x, chunk, dtype) for x in (theta.to(dtype) * here, forget, momentum, here))
    hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=theta.device).triu(1)
    real = real_segments(segments, padding)
    sees = torch.ones_like(rate)
    if real is not None:
        border = borders(real, chunk, dtype)
        hidden = (hidden | ~border.pairs).expand(-1, -1, heads, -1, -1).flatten(0, 2)
        sees = border.sees[..., 0].expand(-1, -1, heads, -1).flatten(0, 2)
    A, E = (_gaps(x).masked_fill(hidden, float("-inf")).exp() for x in (forget, momentum))
    A0, E0 = (x.cumsum(-1).exp() * sees for x in (forget, momentum))
    A_ = A * here[:, None]
    within, inflow_S = torch.bmm(A_, torch.cat([E, E0[..., None]], -1)).split([chunk, 1], -1)
    # One token earlier: nothing of the chunk is written yet, M is as it came in.
    before = torch.cat([torch.zeros_like(within[:, :1]), within[:, :-1]], 1).masked_fill(hidden, 0.0)
    found_M = torch.cat([torch.ones_like(A0[:, :1]), A0[:, :-1]], 1) * sees
    found_S = torch.cat([torch.zeros_like(A0[:, :1]), inflow_S[:, :-1, 0]], 1) * sees
    last = torch.stack([within[:, -1], E[:, -1]], -1)[..., None]
    none = torch.zeros_like(A0[:, -1])
    whole = torch.stack([A0[:, -1], inflow_S[:, -1, 0], none, E0[:, -1]], -1).unflatten(-1, (2, 2))
    columns = (x[..., None] for x in (found_M, found_S))
    return rate[..., None], before, *columns, within, A0[..., None], inflow_S, last, whole


def _gaps(x: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (..., C, C): sums of x over the tokens after j up to i.

    Every sum is made of its own terms: differences of running sums would be blurred by a term far from zero, and so
    would their gradients.
    """
    until = x.new_ones(x.shape[-1], x.shape[-1]).tril()
    return torch.matmul(x[..., None, :] * until, until.tril(-1))


def _initial(state: State | None, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> State:
    """The incoming M and S, zeros where there are none.

    Raises:
        ValueError: one of those given has another shape.
    """
    batch, _, heads, dk = k.shape
    M, S = (None, None) if state is None else state
    first, second = (initial_state(part, batch, heads, dk, v.shape[-1], v, dtype) for part in (M, S))
    return first, second


OP = Op("titans", recurrent, chunked, step)
