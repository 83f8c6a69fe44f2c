"""Causal softmax attention over a sliding window, with attention sinks and a state of constant size.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s

over the last `window` tokens s <= t of the same document, t itself among them, and that document's first `sinks`
tokens (StreamingLLM, arXiv 2309.17453). Query head h reads key/value head h // (H / K). A softcap c turns the logits x
into c tanh(x / c) (Gemma 2).

State. Keys (B, K, S, d), values (B, K, S, dv) and a count (B, 1), with S = sinks + window places. The first `sinks`
tokens of the document keep their places; those after them take turns in the rest. The count is that of the document's
tokens; past 2 window + sinks it goes on from window + sinks, so that it stays exact and says where the next token
goes. All of it is a function of the document's tokens alone, however they were cut into calls; empty places are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from .chunks import compute_dtype, continues, without_padding
from .op import Op

BLOCK = 128
"""Most queries per block. Each block meets the keys of its own and of as many blocks before it as the window needs."""

WindowState = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    softcap: float | None = None,
    sinks: int = 0,
    state: WindowState | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, WindowState]:
    """Token by token: the truth that the other forms are held against.

    Args:
        q: (B, T, H, d). k: (B, T, K, d). v: (B, T, K, dv). K divides H.
        window: tokens that a token sees, itself included.
        scale: factor on the logits.
        softcap: bound on the logits after `scale`, or None.
        sinks: first tokens of a document that every later token of it sees as well.
        state: (keys, values, count) from the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Other steps leave the state, take no place and give 0.
        segments: (B, T) document numbers, non-decreasing; nothing is seen across a change.

    Returns:
        (B, T, H, dv) in the dtype of v, and the state in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the state given has other shapes.
    """
    length = k.shape[1]
    dtype = compute_dtype(v.dtype)
    keys, values, count = initial(state, k, v, window, sinks)
    places = torch.arange(sinks + window, device=k.device)
    going_on = continues(segments, padding)
    out = []
    for t in range(length):
        if going_on is not None:
            same = going_on[:, t, None]
            keys, values, count = keys * same[..., None, None], values * same[..., None, None], count * same
        exists = None if padding is None else padding[:, t, None]
        here = places == next_place(count, window, sinks)  # (B, S)
        if exists is not None:
            here = here & exists
        new_k, new_v = k[:, t, :, None].to(dtype), v[:, t, :, None].to(dtype)
        keys = torch.where(here[:, None, :, None], new_k, keys)
        values = torch.where(here[:, None, :, None], new_v, values)
        after = advance(count, window, sinks)
        count = after if exists is None else torch.where(exists, after, count)
        grouped = q[:, t].to(dtype).unflatten(1, (k.shape[2], -1))  # (B, K, H / K, d)
        logits = cap(scale * grouped @ keys.mT, softcap)
        # Place 0 is filled wherever the result counts; kept open so that no row is without an end.
        hidden = (places >= count) & (places > 0)
        weights = logits.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
        o = (weights @ values).flatten(1, 2)
        out.append(o if exists is None else o.masked_fill(~exists[..., None], 0.0))
    return torch.stack(out, 1).to(v.dtype), (keys, values, count)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    softcap: float | None = None,
    sinks: int = 0,
    state: WindowState | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, WindowState]:
    """The same in blocks of `chunk` queries (by default half the window, 32 at least and 128 at most).

    Arguments and results as `recurrent`. Memory is linear in T.
    """
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        carried = initial(state, k, v, window, sinks)
        row = Row(k, state, padding, segments)
        q_, k_, v_ = (row.compact(x.to(dtype)) for x in (q, k, v))
        blocks = Blocks(row, window, sinks, chunk)
        weights = blocks.logits(q_, k_, carried[0], scale, softcap).softmax(-1)
        o = blocks.read(weights, v_, carried[1])
        (keys, values), count = row.remember((k_, v_), carried[:2], window, sinks)
        return row.restore(o).to(v.dtype), (keys, values, count)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    softcap: float | None,
    sinks: int,
    state: WindowState,
) -> torch.Tensor:
    """One token, T = 1, without gradients; it takes its place in `state`. Returns (B, 1, H, dv)."""
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        keys, values, count = state
        batch, heads, size, dk = keys.shape
        place = next_place(count, window, sinks).long()[:, None, :, None]
        keys.scatter_(2, place.expand(-1, heads, -1, dk), k.transpose(1, 2).to(keys.dtype))
        values.scatter_(2, place.expand(-1, heads, -1, values.shape[-1]), v.transpose(1, 2).to(values.dtype))
        count.copy_(advance(count, window, sinks))
        grouped = q.to(keys.dtype).reshape(batch * heads, -1, dk)
        logits = cap(torch.bmm(grouped, keys.flatten(0, 1).mT).mul_(scale), softcap).view(batch, -1, size)
        logits.masked_fill_((torch.arange(size, device=keys.device) >= count)[:, None], float("-inf"))
        weights = logits.softmax(-1).view(batch * heads, -1, size)
        return torch.bmm(weights, values.flatten(0, 1)).view(batch, 1, -1, values.shape[-1]).to(v.dtype)


OP = Op("window", recurrent, chunked, step)


def initial(
    state: WindowState | None, k: torch.Tensor, v: torch.Tensor, window: int, sinks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The incoming state, empty where there is none.

    Raises:
        ValueError: `window` below 1, `sinks` below 0, or the state given has other shapes.
    """
    if window < 1 or sinks < 0:
        raise ValueError(f"window={window}, sinks={sinks}: expected a window of 1 or more and 0 or more sinks")
    batch, _, heads, dk = k.shape
    shapes = (batch, heads, sinks + window, dk), (batch, heads, sinks + window, v.shape[-1]), (batch, 1)
    dtype = compute_dtype(v.dtype)
    if state is None:
        keys, values, count = (torch.zeros(shape, device=k.device, dtype=dtype) for shape in shapes)
        return keys, values, count
    found = tuple(tuple(part.shape) for part in state)
    if found != shapes:
        raise ValueError(f"state has shapes {found}, expected keys, values and count of {shapes}")
    keys, values, count = (part.to(dtype) for part in state)
    return keys, values, count.detach()  # no gradient: it says where tokens stand


def next_place(count: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """The place that the next token takes, from the count of the document's tokens so far."""
    return torch.where(count >= sinks + window, count - window, count)


def advance(count: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """The count after one more token."""
    return torch.where(count >= sinks + 2 * window - 1, count + 1 - window, count + 1)


def cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits within +-softcap, smoothly; as they are without one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _like(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, n) positions along dimension 1 as a gather index of x (B, T, ...)."""
    return index.view(*index.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])


class Row:
    """How the tokens of a call stand: the real ones moved together, where documents start, what came before.

    Attributes:
        length: tokens T.
        real: (R,) tokens that exist; `compact` puts them first. R is the batch size, or 1 where all rows are alike.
        start: (R, T) place in this call at which the token's document began, 0 for the incoming document as well.
        before: (R,) count of the incoming state.
        fresh: no state came in.
        whole: rows are single documents and no state came in.
    """

    def __init__(
        self,
        k: torch.Tensor,
        state: WindowState | None,
        padding: torch.Tensor | None,
        segments: torch.Tensor | None,
    ) -> None:
        batch, self.length, device = k.shape[0], k.shape[1], k.device
        self.fresh = state is None
        self.whole = self.fresh and segments is None
        rows = 1 if self.whole and padding is None else batch
        self.padding = padding
        self.order = None if padding is None else padding.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        self.real = torch.full((rows,), self.length, device=device) if padding is None else padding.sum(1)
        self.start = torch.zeros(rows, self.length, dtype=torch.long, device=device)
        if segments is not None:
            numbers, place = self.compact(segments), torch.arange(1, self.length, device=device)
            changed = (numbers[:, 1:] != numbers[:, :-1]) & (place < self.real[:, None])
            self.start[:, 1:] = (changed * place).cummax(1).values
        self.before = torch.zeros(rows, dtype=torch.long, device=device) if state is None else state[2][:, 0].long()

    def compact(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) with the real tokens first, in their order."""
        return x if self.order is None else x.gather(1, _like(self.order, x))

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `compact`; padding gives 0."""
        if self.order is None or self.padding is None:
            return x
        x = x.gather(1, _like(self.order.argsort(1), x))
        return without_padding(x, self.padding)

    def in_turn(self, ring: torch.Tensor, number: int, window: int, sinks: int) -> torch.Tensor:
        """The last `number` tokens before this call from the state's places: (B, K, S, d) -> (B, K, number, d)."""
        turns = self.before[:, None] - sinks + torch.arange(-number, 0, device=ring.device)
        index = (sinks + turns % window)[:, None, :, None]
        return ring.gather(2, index.expand(-1, ring.shape[1], -1, ring.shape[3]))

    def remember(
        self, tokens: Sequence[torch.Tensor], carried: Sequence[torch.Tensor], window: int, sinks: int
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The places and the count after the call, from compacted tokens (B, T, K, d) and the places before it."""
        batch, size = len(carried[0]), sinks + window
        last = self.start.gather(1, (self.real - 1).clamp(min=0)[:, None])[:, 0]
        total = self.real + torch.where(last == 0, self.before, -last)  # tokens of the last document
        places = torch.arange(size, device=last.device)
        newest = total[:, None] - 1
        turn = newest - (newest - places) % window  # the newest token whose turn it was at each place
        held = torch.where(places < sinks, places, turn)
        source = held - (total - self.real)[:, None]  # its place in this call; negative: it is in the state
        arrived = ((held >= places) & (held <= newest) & (source >= 0))[:, None, :, None]
        ended = (last > 0)[:, None, None, None]  # the incoming document did
        index = source.clamp(0, self.length - 1).expand(batch, -1)
        kept = []
        for x, old in zip(tokens, carried, strict=True):
            found = x.gather(1, _like(index, x)).transpose(1, 2)
            kept.append(torch.where(arrived, found, old.masked_fill(ended, 0.0)).contiguous())
        count = torch.where(total >= size, size + (total - size) % window, total)
        return tuple(kept), count.to(carried[0].dtype)[:, None].expand(batch, 1).clone()


class Blocks:
    """A call cut into blocks of queries; each meets the far sinks, the keys of the blocks before it and its own.

    Logits are laid out (B, K, N, G, C, L): K key/value heads, N blocks, G = H / K query heads, C queries, L keys.
    """

    def __init__(self, row: Row, window: int, sinks: int, chunk: int | None) -> None:
        self.row, self.window, self.sinks = row, window, sinks
        self.size = min(chunk or min(max(window // 2, 32), BLOCK), row.length)
        self.number = -(-row.length // self.size)
        self.back = -(-(window - 1) // self.size)
        if row.fresh:
            self.back = min(self.back, self.number - 1)
        self.past = self.back * self.size
        self.far = sinks > 0 and (not row.fresh or self.number - 1 > self.back)
        device = row.start.device
        first = torch.arange(self.number, device=device) * self.size
        self.reach = (first - self.past).clamp(min=0)  # the first place in this call that a block sees as a key
        self.visible = self._visible(first)
        if self.far:
            owner = torch.where(self.reach > 0, row.start[:, (self.reach - 1).clamp(min=0)], 0)  # (R, N)
            at = torch.where(owner == 0, -row.before[:, None], owner)
            self.far_place = at[..., None] + torch.arange(sinks, device=device)  # (R, N, sinks); negative: in the state
            seen = (self._starts() == owner[..., None, None]) & (self.far_place < self.reach[:, None])[:, :, None]
            self.visible = torch.cat([seen.expand(len(self.visible), -1, -1, -1), self.visible], -1)

    def _starts(self) -> torch.Tensor:
        """(R, N, C, 1): where each query's document began."""
        padded = torch.arange(self.number * self.size, device=self.row.start.device).clamp(max=self.row.length - 1)
        return self.row.start[:, padded].view(-1, self.number, self.size, 1)

    def _visible(self, first: torch.Tensor) -> torch.Tensor:
        """(R, N, C, past + C) bool: the keys near it that each query sees."""
        key = torch.arange(-self.past, self.size, device=first.device)
        gap = torch.arange(self.size, device=first.device)[:, None] - key
        near = (gap >= 0) & (gap < self.window)
        place = (first[:, None] + key)[:, None]  # (N, 1, past + C) in this call; negative: in the state
        if self.row.whole and not self.sinks:
            return (near & (place >= 0))[None]
        start = self._starts()
        before = self.row.before[:, None, None, None]
        incoming = start == 0
        seen = near & (place >= torch.where(incoming, (self.sinks - before).clamp(max=0), start))
        if self.sinks:
            index = place - torch.where(incoming, -before, start)
            seen = seen | ((gap >= 0) & (place >= start) & (index < self.sinks))
        return seen

    def keys(self, x: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        """The keys or values of every block, (B, K, N, L, d), from compacted ones and the state."""
        batch, length, heads, dim = x.shape
        row = self.row
        line = pad(x.transpose(1, 2), (0, 0, 0, self.number * self.size - length))
        if self.past and row.fresh:
            line = pad(line, (0, 0, self.past, 0))
        elif self.past:
            line = torch.cat([row.in_turn(carried, self.past, self.window, self.sinks), line], 2)
        line = line.view(batch, heads, -1, self.size, dim)
        parts = [line[:, :, i : i + self.number] for i in range(self.back + 1)]
        if self.far:
            index = self.far_place.clamp(0, length - 1).flatten(1).expand(batch, -1)
            far = x.gather(1, _like(index, x)).transpose(1, 2).unflatten(2, (self.number, self.sinks))
            inside = (self.far_place >= 0)[:, None, ..., None]
            parts.insert(0, torch.where(inside, far, carried[:, :, None, : self.sinks]))
        return torch.cat(parts, 3) if len(parts) > 1 else parts[0]

    def logits(
        self, q: torch.Tensor, k: torch.Tensor, carried: torch.Tensor, scale: float, softcap: float | None
    ) -> torch.Tensor:
        """(B, K, N, G, C, L), -inf where a key is not seen; every query sees at least itself."""
        keys = self.keys(k, carried)
        batch, heads = keys.shape[:2]
        q = pad(q * scale, (0, 0, 0, 0, 0, self.number * self.size - self.row.length))
        q = q.view(batch, self.number, self.size, heads, -1, q.shape[-1]).permute(0, 3, 1, 4, 2, 5)
        logits = cap(torch.bmm(q.flatten(3, 4).flatten(0, 2), keys.flatten(0, 2).mT), softcap)
        logits = logits.view(batch, heads, self.number, -1, self.size, logits.shape[-1])
        return logits.masked_fill_(~self.visible[:, None, :, None], float("-inf"))

    def read(self, weights: torch.Tensor, v: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        """(B, T, H, dv): the values under `weights`, laid out as the logits are."""
        o = torch.bmm(weights.flatten(3, 4).flatten(0, 2), self.keys(v, carried).flatten(0, 2))
        return self.rows(o.view(*weights.shape[:-1], -1))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """(B, K, N, G, C, n) -> (B, T, H, n)."""
        batch, heads, number, group, size, dim = x.shape
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, number * size, heads * group, dim)
        return x[:, : self.row.length]
