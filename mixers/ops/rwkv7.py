"""RWKV-7's generalised delta rule: decay per channel, removal and write keys of their own (arXiv 2503.14456).

    S_t = (diag(e^{w_t}) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T        o_t = S_t^T r_t

with S (dk, dv), so the transpose of the paper's: the removal acts on the state before the decay. The caller normalises
kappa to unit length and scales r.

Stability. The recurrence contracts for |kappa| <= 1 and a in [0, 1]. The chunked form takes decays relative to the
middle of a chunk, so its largest intermediate is about e^(|w| C): with w >= -0.6065 (RWKV-7's own bound, e^{-1/2}) a
chunk of 64 stays below e^39 = 1e17 in fp32. Chunks beyond 64 are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .chunks import Borders, compute_dtype, continues, initial_state, masked, real_segments
from .decays import ChannelDecays, channel_decays
from .op import Op
from .segmented import Kernel, Parts, Tensors, segmented
from .steps import in_dtype, read_state

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
    r_, w_, k_, v_, kappa_, a_ = masked(padding, dtype, r, w, k, v, kappa, a)
    same = continues(segments, padding)
    decay = w_.exp()[..., None].unbind(1)
    removal = kappa_[..., None, :].unbind(1)
    removed = (kappa_ * a_)[..., None].unbind(1)
    write = k_[..., None].unbind(1)
    values = v_[..., None, :].unbind(1)
    reads = r_[..., None, :].unbind(1)
    out = []
    for t in range(length):
        if same is not None:
            S = S * same[:, t, None, None, None]
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
        (I + A_b) Y = (kappa e^E) S + A_k V,    A_b = kappa_i . (a kappa)_j e^(E_i - G_j), A_k with k_j, j < i
    and then O = P_k V - P_b Y + (r e^G) S with P as A but for r e^G in the place of kappa e^E, and j <= i;
    S' = e^(G_C) S + (k e^(G_C - G))^T V - (a kappa e^(G_C - G))^T Y. Arguments and results as `recurrent`.

    Raises:
        ValueError: `chunk` above 64.
    """
    if chunk > MAX_CHUNK:
        raise ValueError(f"chunk={chunk}: the chunked form of RWKV-7 is safe in fp32 up to {MAX_CHUNK}")
    batch, _, heads, dk = k.shape
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        S = initial_state(state, batch, heads, dk, v.shape[-1], v, dtype)
        if padding is not None:
            r, w, k, v, kappa, a = masked(padding, dtype, r, w, k, v, kappa, a)
        out, (S,) = segmented(_KERNEL, (r, w, k, v, kappa, a), (S,), chunk, real_segments(segments, padding))
        return out.to(v.dtype), S


class _Work(NamedTuple):
    """What both directions need of M chunks.

    Attributes:
        decays: per channel.
        shifted: (M, C, dk), `decays.left` of the token before: what kappa reads has not met its own token's decay.
        left: (M, 2C, dk) kappa above r, what reads. right: (M, 2C, dk) a kappa above k, what is written.
        mask: (2C, 2C) or (M, 2C, 2C), 1 where a row of `left` sees one of `right`.
        scores: (M, 2C, 2C) their products.
    """

    decays: ChannelDecays
    shifted: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    mask: torch.Tensor
    scores: torch.Tensor


def _prepare(parts: Parts, border: Borders | None) -> _Work:
    r, w, k, _, kappa, a = parts
    chunk = k.shape[1]
    decays = channel_decays(w, border)
    shifted = torch.cat([decays.left[:, :1] * (-w[:, :1]).exp(), decays.left[:, :-1]], 1)
    left = torch.cat([kappa * shifted, r * decays.left], 1)
    right = torch.cat([kappa * a * decays.right, k * decays.right], 1)
    lower = torch.ones(chunk, chunk, device=k.device, dtype=k.dtype).tril()
    mask = torch.cat([lower.tril(-1), lower]).repeat(1, 2)
    if border is not None:
        mask = mask * border.pairs.repeat(1, 2, 2)
    return _Work(decays, shifted, left, right, mask, torch.bmm(left, right.mT).mul_(mask))


def _twice(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """(M, 2C, d) times a decay (M, 1 or C, d)."""
    return (x.unflatten(1, (2, -1)) * decay.unsqueeze(1)).flatten(1, 2)


def _forward(parts: Parts, states: Tensors, border: Borders | None) -> tuple[torch.Tensor, Tensors, Tensors]:
    _, _, k, v, _, _ = parts
    (S,) = states
    chunk, heads = k.shape[1], len(S)
    work = _prepare(parts, border)
    A, P = work.scores.split(chunk, 1)
    eye = torch.eye(chunk, device=k.device, dtype=k.dtype).expand(len(k), -1, -1)
    # The solver reads A strictly below the diagonal and takes ones on it.
    inverse = torch.linalg.solve_triangular(A[:, :, :chunk], eye, upper=False, unitriangular=True).neg_()
    reads, sent = _twice(work.left, work.decays.inflow), _twice(work.right, work.decays.outflow)
    direct, added = torch.bmm(A[:, :, chunk:], v), torch.bmm(sent[:, chunk:].mT, v)
    removed, before = [], []
    for n in range(0, len(k), heads):
        here = slice(n, n + heads)
        before.append(S)
        removed.append(torch.bmm(inverse[here], direct[here].baddbmm_(reads[here, :chunk], S)))
        S = torch.addcmul(added[here], S, work.decays.carry[here]).baddbmm_(sent[here, :chunk].mT, removed[-1])
    minus_Y, past = torch.cat(removed), torch.cat(before)
    out = torch.bmm(P, torch.cat([minus_Y, v], 1)).baddbmm_(reads[:, chunk:], past)
    return out, (S,), (inverse, minus_Y, past)


def _backward(
    parts: Parts, kept: Tensors, border: Borders | None, grad: torch.Tensor, flows: Tensors, needs: tuple[bool, ...]
) -> tuple[Parts, Tensors]:
    _, _, k, v, kappa, a = parts
    inverse, minus_Y, before = kept
    (flow,) = flows
    chunk, heads = k.shape[1], len(flow)
    work = _prepare(parts, border)
    decays, left, right = work.decays, work.left, work.right
    A, P = work.scores.split(chunk, 1)
    reads, sent = _twice(left, decays.inflow), _twice(right, decays.outflow)
    pulled, asked = torch.bmm(P.mT, grad), torch.bmm(reads[:, chunk:].mT, grad)
    removals, after = [], []
    for n in range(len(k) - heads, -1, -heads):
        here = slice(n, n + heads)
        after.append(flow)
        removals.append(torch.bmm(inverse[here].mT, torch.baddbmm(pulled[here, :chunk], sent[here, :chunk], flow)))
        flow = torch.addcmul(asked[here], flow, decays.carry[here]).baddbmm_(reads[here, :chunk].mT, removals[-1])
    dX, after = torch.cat(removals[::-1]), torch.cat(after[::-1])
    both, values = torch.cat([dX, grad], 1), torch.cat([minus_Y, v], 1)
    dv = torch.baddbmm(pulled[:, chunk:], sent[:, chunk:], after).baddbmm_(A[:, :, chunk:].mT, dX)
    shares = torch.bmm(both, values.mT).mul_(work.mask)
    dleft = _twice(torch.bmm(both, before.mT), decays.inflow).baddbmm_(shares, right)
    dright = _twice(torch.bmm(values, after.mT), decays.outflow)
    # A decay's gradient is the sum, over all products that it enters, of value times gradient.
    held = (before * after).sum(-1) * decays.carry[..., 0] + (dright * right).sum(1)
    dright.baddbmm_(shares.mT, left)
    gains, losses = (left * dleft).split(chunk, 1), (right * dright).split(chunk, 1)
    dG = gains[1] - losses[0] - losses[1]
    dG[:, :-1] += gains[0][:, 1:]
    dG[:, -1] += held
    dkappa, dr = dleft.split(chunk, 1)
    db, dk = _twice(dright, decays.right).split(chunk, 1)
    dkappa = torch.addcmul(dkappa * work.shifted, db, a)
    return (dr * decays.left, dG.flip(1).cumsum(1).flip(1), dk, dv, dkappa, db * kappa), (flow,)


_KERNEL = Kernel(_forward, _backward)


def step(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """One token, called without gradients. Overwrites `state`, `w` and `a` and allocates nothing but its result.

    Args:
        r, w, k, kappa, a: (B, 1, H, dk). v: (B, 1, H, dv). As in `recurrent`.
        state: (B, H, dk, dv) fp32 or fp64, contiguous.

    Returns:
        (B, 1, H, dv) in the dtype of v.
    """
    r, w, k, values, kappa, a = in_dtype(state.dtype, r, w, k, v, kappa, a)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    read_state(kappa, state, out)
    state.mul_(w.exp_().permute(0, 2, 3, 1))
    state.addcmul_(a.mul_(kappa).permute(0, 2, 3, 1), out.transpose(1, 2), value=-1)
    state.addcmul_(k.permute(0, 2, 3, 1), values.transpose(1, 2))
    return read_state(r, state, out).to(v.dtype)


OP = Op("rwkv7", recurrent, chunked, step)
