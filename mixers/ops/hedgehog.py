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

Stability. The near denominator is at least 1, so the whole one is at least gamma; features must be nonnegative.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .chunks import compute_dtype, real_segments
from .op import Op
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
    real = real_segments(segments, padding)
    weight = gamma.to(dtype).view(k.shape[2], -1, 1)
    out = []
    for t in range(k.shape[1]):
        if real is not None and t:
            same = (real[:, t] == real[:, t - 1]).to(dtype)[:, None]
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
        near = (logits - logits.amax(-1, keepdim=True)).exp() @ _with_one(values)
        o = _combine(near, phi @ sums, weight).flatten(1, 2)
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
        logits = blocks.logits(q_, k_, keys, scale, softcap)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        near = blocks.read(weights, _with_one(v_), _with_one(values))
        left, seen = _leaving(row, fed, features, window), _leaving(row, v_, values, window)
        far, sums = _linear(row, phi, left * _left(row, window), _with_one(seen), sums, blocks.size)
        o = _combine(near, far, gamma.to(dtype)[:, None])
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
        gone = features.gather(2, index[2]).flatten(0, 1).mT, _with_one(values.gather(2, index[1])).flatten(0, 1)
        sums.view(batch * heads, *sums.shape[2:]).baddbmm_(*gone)
        for old, where, new in zip((keys, values, features), index, (k, v, phi_k), strict=True):
            old.scatter_(2, where, new.transpose(1, 2).to(old.dtype))
        count.copy_(advance(count, window, 0))
        grouped, phi = (x.to(keys.dtype).reshape(batch * heads, -1, x.shape[-1]) for x in (q, phi_q))
        logits = cap(torch.bmm(grouped, keys.flatten(0, 1).mT).mul_(scale), softcap).view(batch, -1, size)
        logits.masked_fill_((torch.arange(size, device=keys.device) >= count)[:, None], float("-inf"))
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_().view(batch * heads, -1, size)
        near = torch.bmm(weights, values.flatten(0, 1)), weights.sum(-1, keepdim=True)
        far = torch.bmm(phi, sums.flatten(0, 1))
        weight = gamma.to(keys.dtype).view(1, heads, -1, 1).expand(batch, -1, -1, -1).flatten(0, 1)
        o = _combine(torch.cat(near, -1), far, weight)
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


def _combine(near: torch.Tensor, far: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """(gamma near + far) of the values over that of the weights, each (..., dv + 1) with the weights' sum last.

    Taken as the window's own average and what the far tokens shift it by, so that little of a small share's gradient
    is lost to rounding.
    """
    average = near[..., :-1] / near[..., -1:]
    shift = far[..., :-1] - far[..., -1:] * average
    return average + shift / (gamma * near[..., -1:] + far[..., -1:])


def _leaving(row: Row, x: torch.Tensor, ring: torch.Tensor, window: int) -> torch.Tensor:
    """What leaves the window at each token: x (B, T, K, d), `window` tokens late, as (B, K, T, d)."""
    line = x.transpose(1, 2)
    if row.fresh:
        return pad(line, (0, 0, window, 0))[:, :, : row.length]
    return torch.cat([row.in_turn(ring, window, window, 0), line], 2)[:, :, : row.length]


def _left(row: Row, window: int) -> torch.Tensor:
    """(R, 1, T, 1) bool: what leaves the window at these tokens is of the same document (or an empty place: zero)."""
    place = torch.arange(row.length, device=row.start.device)
    lowest = row.start.masked_fill(row.start == 0, -window)
    return ((place - window >= lowest) & (place < row.real[:, None]))[:, None, :, None]


def _linear(
    row: Row, phi: torch.Tensor, features: torch.Tensor, values: torch.Tensor, sums: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """o_t = phi_t^T sum_s features_s values_s^T over s <= t of the same document, in chunks of `size` tokens.

    Args:
        row: where documents start.
        phi: (B, T, H, f). features: (B, K, T, f). values: (B, K, T, n).
        sums: (B, K, f, n), of the incoming document.
        size: tokens per chunk.

    Returns:
        (B, T, H, n) and the sums after the last token.
    """
    batch, length, all_heads, width = phi.shape
    heads, extra = features.shape[1], -length % size
    f, x = (pad(part, (0, 0, 0, extra)).unflatten(2, (-1, size)) for part in (features, values))  # (B, K, N, C, .)
    p = pad(phi, (0, 0, 0, 0, 0, extra)).view(batch, -1, size, heads, all_heads // heads, width)
    p = p.permute(0, 3, 1, 4, 2, 5)  # (B, K, N, G, C, f)
    seen = torch.ones(size, size, dtype=torch.bool, device=phi.device).tril()
    written, inflow, carries = f, p, None
    if not row.whole:
        start = row.start[:, torch.arange(length + extra, device=phi.device).clamp(max=length - 1)]
        start = start.unflatten(1, (-1, size))  # (R, N, C)
        last = start[..., -1]
        before = pad(last, (1, -1))  # the incoming document starts at 0
        seen = (seen & (start[..., :, None] == start[..., None, :]))[:, None, :, None]
        written = f * (start == last[..., None])[:, None, ..., None]
        inflow = p * (start == before[..., None])[:, None, :, None, :, None]
        carries = (last == before).to(phi.dtype)[:, None, :, None, None].unbind(2)
    states = []
    for n, new in enumerate((written.mT @ x).unbind(2)):
        states.append(sums)
        sums = (sums if carries is None else sums * carries[n]) + new
    scores = (p.flatten(3, 4) @ f.mT).unflatten(3, (-1, size)).masked_fill(~seen, 0.0)
    o = scores.flatten(3, 4) @ x + inflow.flatten(3, 4) @ torch.stack(states, 2)
    o = o.unflatten(3, (-1, size)).permute(0, 2, 4, 1, 3, 5)
    return o.reshape(batch, length + extra, all_heads, -1)[:, :length], sums.contiguous()
