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

from typing import NamedTuple

import torch

from .chunks import Borders, compute_dtype, continues, initial_state, real_segments, without_padding
from .decays import bounded_exp, seen
from .delta import Factors, delta_backward, delta_forward
from .op import Op
from .segmented import Kernel, Parts, Tensors, segmented
from .steps import folded

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
    dtype = compute_dtype(v.dtype)
    M, S = _initial(state, k, v, dtype)
    q_, k_, v_, theta_, eta_, alpha_ = (x.to(dtype) for x in (q, k, v, theta, eta, alpha))
    real = torch.ones(v.shape[:2], dtype=torch.bool, device=v.device) if padding is None else padding
    same = continues(segments, padding)
    columns, rows = k_[..., None].unbind(1), k_[..., None, :].unbind(1)
    values, queries = v_[..., None, :].unbind(1), q_[..., None, :].unbind(1)
    gates = (x[..., None, None].unbind(1) for x in (theta_, eta_, 1 - alpha_))
    out = []
    for t, (rate, momentum, keep) in enumerate(zip(*gates, strict=True)):
        if same is not None:
            M, S = M * same[:, t, None, None, None], S * same[:, t, None, None, None]
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
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        both = torch.cat(_initial(state, k, v, dtype), 2)
        here = None if padding is None else padding[..., None].expand(theta.shape).to(dtype)
        inputs = (q, k, theta, eta, alpha, here, v)
        out, (last,) = segmented(_KERNEL, inputs, (both,), chunk, real_segments(segments, padding))
        out = without_padding(out, padding)
        M, S = (part.contiguous() for part in last.chunk(2, 2))
        return out.to(v.dtype), (M, S)


class _Weights(NamedTuple):
    """With what weight everything in M chunks reaches everything else.

    Attributes:
        here: (M, C), 1 at real tokens; None where all are.
        A, E: (M, C, C) products of 1 - alpha and of eta over the tokens after s up to t.
        A0, E0: (M, C) the same from the start of the chunk, 0 where the incoming state is another document's.
        c: (M, C, C), from a write to M. e: (M, C), from the incoming S to M.
    """

    here: torch.Tensor | None
    A: torch.Tensor
    E: torch.Tensor
    A0: torch.Tensor
    E0: torch.Tensor
    c: torch.Tensor
    e: torch.Tensor


def _weights(eta: torch.Tensor, alpha: torch.Tensor, here: torch.Tensor | None, border: Borders | None) -> _Weights:
    forget, momentum = torch.log1p(-_bounded(alpha)), _bounded(eta).log_()
    if here is not None:
        forget, momentum = forget * here, momentum * here
    A, E = (seen(bounded_exp(_gaps(x)).tril_(), border) for x in (forget, momentum))
    A0, E0 = (bounded_exp(x.cumsum(-1)) for x in (forget, momentum))
    if border is not None:
        A0, E0 = (x.mul_(border.sees[..., 0]) for x in (A0, E0))
    A_ = A if here is None else A * here[:, None]
    return _Weights(here, A, E, A0, E0, torch.bmm(A_, E), torch.bmm(A_, E0[..., None])[..., 0])


def _factors(parts: Parts, w: _Weights, border: Borders | None) -> tuple[Factors, Tensors]:
    """Factors of the delta rule for the states M above S; and what the backward needs of how they came about."""
    q, k, theta, _, _, _, v = parts
    kk, qk = torch.bmm(torch.cat([k, q], 1), k.mT).chunk(2, 1)
    before, found, found_S = (_earlier(x) for x in (w.c, w.A0, w.e))
    found[:, 0] = 1.0
    if border is not None:
        before, found, found_S = before * border.pairs, found * border.sees[..., 0], found_S * border.sees[..., 0]
    rate = theta if w.here is None else theta * w.here
    whole = torch.stack([w.A0[:, -1], w.e[:, -1], torch.zeros_like(w.e[:, -1]), w.E0[:, -1]], -1)
    factors = Factors(
        a=before * kk,
        beta=rate[..., None],
        P=w.c * qk,
        V=v,
        Kin=torch.cat([k * found[..., None], k * found_S[..., None]], -1),
        Qin=torch.cat([q * w.A0[..., None], q * w.e[..., None]], -1),
        Kout=torch.cat([k * w.c[:, -1, :, None], k * w.E[:, -1, :, None]], -1),
        carry=whole.unflatten(-1, (2, 2)),
    )
    return factors, (kk, qk, before, found, found_S)


def _forward(parts: Parts, states: Tensors, border: Borders | None) -> tuple[torch.Tensor, Tensors, Tensors]:
    _, _, _, eta, alpha, here, _ = parts
    factors, _ = _factors(parts, _weights(eta, alpha, here, border), border)
    out, last, *kept = delta_forward(factors, states[0])
    return out, (last,), tuple(kept)


def _backward(
    parts: Parts, kept: Tensors, border: Borders | None, grad: torch.Tensor, flows: Tensors, needs: tuple[bool, ...]
) -> tuple[Parts, Tensors]:
    q, k, _, eta, alpha, here, _ = parts
    T, before = kept
    w = _weights(eta, alpha, here, border)
    factors, (kk, qk, earlier, found, found_S) = _factors(parts, w, border)
    g, flow, _ = delta_backward(factors, T, before, grad, flows[0])
    (Kin, Kin_S), (Qin, Qin_S), (Kout, Kout_S) = (x.chunk(2, -1) for x in (g.Kin, g.Qin, g.Kout))
    # Of the weights: where they stand in a and P, in what reads the incoming state, in what is handed on.
    dc = (g.P * qk).tril_()
    da = (g.a * kk).tril_(-1) if border is None else (g.a * kk).tril_(-1).mul_(border.pairs)
    dc[:, :-1] += da[:, 1:]
    dc[:, -1] += (k * Kout).sum(-1)
    of_found, of_found_S = (k * Kin).sum(-1), (k * Kin_S).sum(-1)
    if border is not None:
        of_found, of_found_S = of_found * border.sees[..., 0], of_found_S * border.sees[..., 0]
    dA0, de = (q * Qin).sum(-1), (q * Qin_S).sum(-1)
    dA0[:, :-1] += of_found[:, 1:]
    de[:, :-1] += of_found_S[:, 1:]
    (M, S), (dM, dS) = (x.unflatten(1, (2, -1)).unbind(1) for x in (before, g.carry))
    dA0[:, -1] += (M * dM).sum((1, 2))
    de[:, -1] += (S * dM).sum((1, 2))
    dE0_last, dE_last = (S * dS).sum((1, 2)), (k * Kout_S).sum(-1)
    d_eta, d_alpha = _gate_gradients(w, dc, dA0, de, dE0_last, dE_last, border)
    d_kk, d_qk = g.a.mul_(earlier), g.P.mul_(w.c)
    dq = torch.bmm(d_qk, k).addcmul_(Qin, w.A0[..., None]).addcmul_(Qin_S, w.e[..., None])
    dk = torch.bmm(d_kk + d_kk.mT, k).baddbmm_(d_qk.mT, q)
    for part, weight in ((Kin, found), (Kin_S, found_S), (Kout, w.c[:, -1]), (Kout_S, w.E[:, -1])):
        dk.addcmul_(part, weight[..., None])
    rate = g.beta[..., 0] if here is None else g.beta[..., 0] * here
    d_eta, d_alpha = d_eta / _bounded(eta), -d_alpha / (1 - _bounded(alpha))
    return (dq, dk, rate, d_eta, d_alpha, None, g.V), (flow,)


def _gate_gradients(
    w: _Weights,
    dc: torch.Tensor,
    dA0: torch.Tensor,
    de: torch.Tensor,
    dE0_last: torch.Tensor,
    dE_last: torch.Tensor,
    border: Borders | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of log eta and log (1 - alpha), (M, C), from those of c, A0, e and of the last rows of E0 and E."""
    dA = torch.bmm(dc, w.E.mT).baddbmm_(de[..., None], w.E0[:, None])
    A = w.A if w.here is None else w.A * w.here[:, None]
    dA.mul_(A)
    dE = torch.bmm(A.mT, dc)
    dE[:, -1] += dE_last
    dE0 = torch.bmm(A.mT, de[..., None])[..., 0]
    dE0[:, -1] += dE0_last
    dA0, dE0, dE = dA0.mul_(w.A0), dE0.mul_(w.E0), dE.mul_(w.E)
    found = []
    for pairs, start in ((dE, dE0), (dA, dA0)):
        ones = torch.ones_like(pairs[0])
        # A token's gate is in every product that spans it.
        spans = torch.matmul(pairs, ones.triu(1)).tril_().sum(1)
        found.append(spans + torch.matmul(start, ones.tril()))
    d_eta, d_alpha = found
    return (d_eta, d_alpha) if w.here is None else (d_eta * w.here, d_alpha * w.here)


def _bounded(gate: torch.Tensor) -> torch.Tensor:
    """A copy without exact 0 and 1, where a sigmoid has saturated: moved by less than fp32 resolves beside 1."""
    limits = torch.finfo(gate.dtype)
    return gate.clamp(limits.tiny, 1 - limits.eps / 2)


def _earlier(x: torch.Tensor) -> torch.Tensor:
    """(M, C, ...) one token later, with 0 at the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


_KERNEL = Kernel(_forward, _backward)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor,
    alpha: torch.Tensor,
    state: State,
) -> torch.Tensor:
    """One token, called without gradients. Overwrites `state` and allocates nothing but its result.

    Args:
        q, k: (B, 1, H, dk). v: (B, 1, H, dv). theta, eta, alpha: (B, 1, H). As in `recurrent`.
        state: M and S, each (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    M, S = (part.flatten(0, 1) for part in state)
    q, k, values, theta, eta, alpha = folded(len(M), M.dtype, q, k, v, theta, eta, alpha)
    out = values.clone().baddbmm_(k, M, alpha=-1).mul_(theta)
    S.mul_(eta).addcmul_(k.mT, out)
    M.addcmul_(alpha, M, value=-1).add_(S)
    return torch.bmm(q, M, out=out).view(v.shape).to(v.dtype)


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
