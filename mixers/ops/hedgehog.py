"""Softmax attention over a sliding window and linear attention before it, under one denominator (LoLCATs,
arXiv 2410.10254, eq. 6, on Hedgehog's nonnegative features, arXiv 2402.04347).

    o_t = [gamma sum_near e^(scale q_t . k_s - c_t) v_s + sum_far (phi(q_t) . phi(k_s)) v_s] / [the same without v_s]

near: the last `window` tokens s <= t of the document, t itself among them; far: those before them; c_t: the largest
near logit. As the far sum is not scaled by e^(-c_t), c_t is a part of the function and has a gradient. gamma > 0 is one
number per query head. Query head h reads key/value head h // (H / K).

The window slides: a token enters the linear state when it leaves the window. The paper trains with terraced windows,
which widen from `window` to 2 `window` tokens within each block to suit its GPU kernel, and slides in decoding. Here
training, prefill and decoding are one function.

State. Keys (B, K, W, d), values (B, K, W, dv) and features (B, K, W, f) of the window's W tokens, sums over the far
tokens (B, K, f, dv + 1), of phi(k) v^T and in the last column of phi(k), and the count (B, 1). Places and count are
those of mixers/ops/window.py without sinks.

Stability. The near sum lies between 1 and the window's length, so the denominator is at least gamma; features must be
nonnegative.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .chunks import Borders, compute_dtype, continues
from .decays import flows_after, states_before
from .op import Op
from .segmented import Kernel, Parts, Tensors, segmented
from .window import Blocks, Row, advance, cap, next_place
from .window import initial as initial_window

HedgehogState = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    gamma: torch.Tensor,
    window: int,
    scale: float,
    softcap: float | None = None,
    state: HedgehogState | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, HedgehogState]:
    """Token by token: the truth that the other forms are held against.

    Args:
        q: (B, T, H, d). k: (B, T, K, d). v: (B, T, K, dv). K divides H.
        phi_q: (B, T, H, f) and phi_k: (B, T, K, f), features, nonnegative.
        gamma: (H,) weight of the window, positive.
        window: tokens that softmax attention sees, the token itself included.
        scale: factor on the logits.
        softcap: bound on the logits after `scale`, or None.
        state: (keys, values, features, sums, count) from the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; nothing is seen across a change.

    Returns:
        (B, T, H, dv) in the dtype of v, and the state in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the state given has other shapes.
    """
    dtype = compute_dtype(v.dtype)
    keys, values, features, sums, count = initial(state, k, v, phi_k, window)
    places = torch.arange(window, device=k.device)
    going_on = continues(segments, padding)
    weight = gamma.to(dtype).view(k.shape[2], -1, 1)
    out = []
    for t in range(k.shape[1]):
        if going_on is not None:
            same = going_on[:, t, None]
            wide = same[..., None, None]
            keys, values, features, sums, count = keys * wide, values * wide, features * wide, sums * wide, count * same
        exists = None if padding is None else padding[:, t, None]
        here = places == next_place(count, window, 0)
        here = (here if exists is None else here & exists)[:, None, :, None]
        # A place that was still empty holds zero features.
        gone = (features * here).sum(2)[..., None], _with_one((values * here).sum(2))[..., None, :]
        sums = sums + gone[0] * gone[1]
        keys, values, features = (
            torch.where(here, x[:, t, :, None].to(dtype), old) for x, old in ((k, keys), (v, values), (phi_k, features))
        )
        after = advance(count, window, 0)
        count = after if exists is None else torch.where(exists, after, count)
        grouped, phi = (x[:, t].to(dtype).unflatten(1, (k.shape[2], -1)) for x in (q, phi_q))  # (B, K, H / K, .)
        logits = cap(scale * grouped @ keys.mT, softcap)
        # Place 0 is filled wherever the result counts; kept open so that no row is without an end.
        logits = logits.masked_fill(((places >= count) & (places > 0))[:, None, None], float("-inf"))
        shares = logits.softmax(-1)
        o = _combine(shares @ values, shares.amax(-1, keepdim=True), phi @ sums, weight).flatten(1, 2)
        out.append(o if exists is None else o.masked_fill(~exists[..., None], 0.0))
    return torch.stack(out, 1).to(v.dtype), (keys, values, features, sums, count)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    gamma: torch.Tensor,
    window: int,
    scale: float,
    softcap: float | None = None,
    state: HedgehogState | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, HedgehogState]:
    """The same in blocks of `chunk` queries (by default half the window, 32 at least and 128 at most).

    Arguments and results as `recurrent`. Memory is linear in T.
    """
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        keys, values, features, sums, count = initial(state, k, v, phi_k, window)
        row = Row(k, None if state is None else (keys, values, count), padding, segments)
        q_, k_, v_, phi, fed = (row.compact(x.to(dtype)) for x in (q, k, v, phi_q, phi_k))
        blocks = Blocks(row, window, 0, chunk)
        shares = blocks.logits(q_, k_, keys, scale, softcap).softmax(-1)
        average, top = blocks.read(shares, v_, values), blocks.rows(shares.amax(-1, keepdim=True))
        left = _leaving(row, fed, features, window) * _left(row, window)
        parts = left, phi.unflatten(2, (k.shape[2], -1)).flatten(3), _with_one(_leaving(row, v_, values, window))
        numbers = None if row.whole else row.start.expand(len(k), -1)
        far, (sums,) = segmented(_FAR, parts, (sums,), blocks.size, numbers)
        far = far.unflatten(3, (-1, v.shape[3] + 1)).flatten(2, 3)
        o = _combine(average, top, far, gamma.to(dtype)[:, None])
        (keys, values, features), count = row.remember((k_, v_, fed), (keys, values, features), window, 0)
        return row.restore(o).to(v.dtype), (keys, values, features, sums, count)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    gamma: torch.Tensor,
    window: int,
    scale: float,
    softcap: float | None,
    state: HedgehogState,
) -> torch.Tensor:
    """One token, T = 1, without gradients; `state` is overwritten. Returns (B, 1, H, dv)."""
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        keys, values, features, sums, count = state
        batch, heads, size, _ = keys.shape
        place = next_place(count, window, 0).long()[:, None, :, None].expand(-1, heads, -1, -1)
        index = [place.expand(-1, -1, -1, x.shape[-1]) for x in (keys, values, features)]
        gone = features.gather(2, index[2])[:, :, 0, :, None], _with_one(values.gather(2, index[1]))
        sums.addcmul_(*gone)
        for old, where, new in zip((keys, values, features), index, (k, v, phi_k), strict=True):
            old.scatter_(2, where, new.transpose(1, 2).to(old.dtype))
        count.copy_(advance(count, window, 0))
        grouped, phi = (x.to(keys.dtype).reshape(batch * heads, -1, x.shape[-1]) for x in (q, phi_q))
        logits = cap(torch.bmm(grouped, keys.flatten(0, 1).mT).mul_(scale), softcap).view(batch, -1, size)
        logits.masked_fill_((torch.arange(size, device=keys.device) >= count)[:, None], float("-inf"))
        shares = logits.softmax(-1).view(batch * heads, -1, size)
        average, far = torch.bmm(shares, values.flatten(0, 1)), torch.bmm(phi, sums.flatten(0, 1))
        weight = gamma.to(keys.dtype).view(heads, -1, 1).repeat(batch, 1, 1)
        o = _combine(average, shares.amax(-1, keepdim=True), far, weight)
        return o.view(batch, 1, -1, o.shape[-1]).to(v.dtype)


OP = Op("hedgehog", recurrent, chunked, step)


def initial(
    state: HedgehogState | None, k: torch.Tensor, v: torch.Tensor, phi_k: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The incoming state, empty where there is none.

    Raises:
        ValueError: `window` below 1, or the state given has other shapes.
    """
    ring = None if state is None else (state[0], state[1], state[4])
    keys, values, count = initial_window(ring, k, v, window, 0)
    batch, heads, _, dv = values.shape
    shapes = (batch, heads, window, phi_k.shape[-1]), (batch, heads, phi_k.shape[-1], dv + 1)
    if state is None:
        features, sums = (torch.zeros(shape, device=k.device, dtype=keys.dtype) for shape in shapes)
    else:
        found = tuple(state[2].shape), tuple(state[3].shape)
        if found != shapes:
            raise ValueError(f"state has shapes {found}, expected features and sums of {shapes}")
        features, sums = (part.to(keys.dtype) for part in state[2:4])
    return keys, values, features, sums, count


def _with_one(x: torch.Tensor) -> torch.Tensor:
    """(..., d) -> (..., d + 1), a one in the last channel: what sums it weighs sums the weights as well."""
    return pad(x, (0, 1), value=1.0)


def _combine(average: torch.Tensor, top: torch.Tensor, far: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The layer's output, from the window's own: what the far tokens shift it by, each a small difference as it stands.

    Args:
        average: (..., dv), softmax attention over the window.
        top: (..., 1), its largest weight: that of the logit c, so the near sum is 1 / top.
        far: (..., dv + 1), sums over the far tokens.
        gamma: (..., 1).
    """
    return average + (far[..., :-1] - far[..., -1:] * average) / (gamma / top + far[..., -1:])


def _leaving(row: Row, x: torch.Tensor, ring: torch.Tensor, window: int) -> torch.Tensor:
    """What leaves the window at each token: x (B, T, K, d), `window` tokens late."""
    if row.fresh:
        return pad(x, (0, 0, 0, 0, window, 0))[:, : row.length]
    return torch.cat([row.in_turn(ring, window, window, 0).transpose(1, 2), x], 1)[:, : row.length]


def _left(row: Row, window: int) -> torch.Tensor:
    """(R, T, 1, 1) bool: what leaves the window at these tokens is of the same document (or an empty place: zero)."""
    place = torch.arange(row.length, device=row.start.device)
    lowest = row.start.masked_fill(row.start == 0, -window)
    return ((place - window >= lowest) & (place < row.real[:, None]))[..., None, None]


def _far_forward(parts: Parts, states: Tensors, border: Borders | None) -> tuple[torch.Tensor, Tensors, Tensors]:
    """o_i = q_i S_i, S_i = sum of f_j^T x_j over j <= i. f (M, C, F), q (M, C, G F) of G query heads, x (M, C, n)."""
    f, q, x = parts
    (first,) = states
    q = q.reshape(len(f), -1, f.shape[-1])  # (M, C G, F)
    sees, leaves, carry = _edges(border, x)
    before, last = states_before(torch.bmm(_if(f, leaves).mT, x), carry, first)
    scores = _seen(torch.bmm(q, f.mT), border)
    out = torch.bmm(scores, x).baddbmm_(_if(q, sees), before)
    return out.view(len(f), f.shape[1], -1), (last,), (before,)


def _far_backward(
    parts: Parts, kept: Tensors, border: Borders | None, grad: torch.Tensor, flows: Tensors, needs: tuple[bool, ...]
) -> tuple[Parts, Tensors]:
    f, q, x = parts
    (before,) = kept
    shape, q, grad = q.shape, q.reshape(len(f), -1, f.shape[-1]), grad.reshape(len(f), -1, x.shape[-1])
    sees, leaves, carry = _edges(border, x)
    after, flow = flows_after(torch.bmm(_if(q, sees).mT, grad), carry, flows[0])
    scores, pull = _seen(torch.bmm(q, f.mT), border), _seen(torch.bmm(grad, x.mT), border)
    dq = _if(torch.bmm(grad, before.mT), sees).baddbmm_(pull, f)
    df = _if(torch.bmm(x, after.mT), leaves).baddbmm_(pull.mT, q)
    dx = torch.bmm(_if(f, leaves), after).baddbmm_(scores.mT, grad)
    return (df, dq.view(shape), dx), (flow,)


def _edges(border: Borders | None, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Tokens that see the incoming state, tokens that enter the outgoing one (None: all do), and what it keeps."""
    if border is None:
        return None, None, x.new_ones(len(x), 1, 1)
    return border.sees, border.leaves, border.carries


def _if(x: torch.Tensor, which: torch.Tensor | None) -> torch.Tensor:
    """(M, C, n) or (M, C G, n), of the tokens (M, C, 1) that `which` says."""
    if which is None:
        return x
    return (x.view(*which.shape[:2], -1) * which).view_as(x)


def _seen(pairs: torch.Tensor, border: Borders | None) -> torch.Tensor:
    """(M, C G, C), zeroed in place where a token stands later than its query or in another document."""
    size = pairs.shape[-1]
    mask = torch.ones(size, size, dtype=pairs.dtype, device=pairs.device).tril_()[None]
    mask = mask if border is None else mask * border.pairs
    return pairs.view(len(pairs), size, -1, size).mul_(mask[:, :, None]).view_as(pairs)


_FAR = Kernel(_far_forward, _far_backward)
