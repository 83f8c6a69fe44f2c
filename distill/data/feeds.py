"""Feeds: endless rows of one source, and a state from which the same rows follow.

Both kinds go through all documents once per epoch, in an order shuffled anew for each, and neither pads or drops at
the end of an epoch: the next one follows in the same row.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from ..errors import UserError
from .packing import Rows, packed_rows, padded_rows
from .split import in_share
from .streams import RecordStream
from .tokenise import Tokens, tokenise

_READ = 64  # records tokenised at once when a stream's buffer is refilled


class Feed(Protocol):
    """Rows of one source, one after the other."""

    row_tokens: float | None
    """Mean tokens per row; None where not known beforehand."""

    def take(self, count: int) -> Rows:
        """The next rows."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the feed stands: numbers, strings, lists and tensors only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...


class LocalFeed:
    """Rows of documents in memory. Row r is a pure function of (tokens, seq_len, pack, seed, r).

    Packed, the documents of epoch 0, 1, … form one endless sequence of tokens and row r is its tokens r * seq_len to
    (r + 1) * seq_len - 1. Otherwise every document is split into windows of seq_len tokens (windows of a single token
    are left out) and row r is one window.

    Args:
        tokens: the documents.
        seq_len: tokens per row, at most where not packed.
        pack: whether rows are filled with several documents.
        seed: order of the documents, with the epoch; a tuple of numbers.
        place: what to call the source in messages.

    Raises:
        UserError: no documents, or fewer tokens than one row.
    """

    def __init__(self, tokens: Tokens, seq_len: int, pack: bool, seed: tuple[int, ...], place: str) -> None:
        total = int(tokens.offsets[-1])
        self.tokens, self.seq_len, self.pack, self.seed = tokens, seq_len, pack, seed
        self.row = 0
        self._held: tuple[int, np.ndarray, np.ndarray] | None = None
        # What is shuffled: documents, or the windows that they are split into.
        self._starts, self._lengths = (tokens.offsets[:-1], tokens.lengths) if pack else _windows(tokens, seq_len)
        if pack and total < seq_len:
            raise _too_short(place, total, seq_len)
        if not len(self._starts):
            raise _too_short(place, total, 2)
        self.row_tokens: float | None = float(seq_len) if pack else float(self._lengths.mean())

    def take(self, count: int) -> Rows:
        """The next rows."""
        rows = self._packed(count) if self.pack else self._padded(count)
        self.row += count
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The number of the next row."""
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with that row."""
        self.row = int(state["row"])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The n items of an epoch in their order, and the (n + 1,) positions in the epoch at which they begin."""
        if self._held is None or self._held[0] != epoch:
            order = np.random.default_rng((*self.seed, epoch)).permutation(len(self._starts))
            begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._lengths[order])])
            self._held = epoch, order, begins
        return self._held[1:]

    def _packed(self, count: int) -> Rows:
        total = int(self.tokens.offsets[-1])
        at, stop = self.row * self.seq_len, (self.row + count) * self.seq_len
        index, first = [], []
        while at < stop:
            epoch, begin = divmod(at, total)
            end = min(total, begin + stop - at)
            order, begins = self._epoch(epoch)
            position = np.arange(begin, end)
            rank = np.searchsorted(begins, position, side="right") - 1
            index.append(self._starts[order[rank]] + position - begins[rank])
            first.append(position == begins[rank])
            at += end - begin
        chosen = np.concatenate(index)
        return packed_rows(self.tokens.ids[chosen], np.concatenate(first), self.tokens.scored[chosen], self.seq_len)

    def _padded(self, count: int) -> Rows:
        windows = len(self._starts)
        pieces = []
        for row in range(self.row, self.row + count):
            epoch, rank = divmod(row, windows)
            window = self._epoch(epoch)[0][rank]
            piece = slice(self._starts[window], self._starts[window] + self._lengths[window])
            pieces.append((self.tokens.ids[piece], self.tokens.scored[piece]))
        return padded_rows(pieces)


class StreamFeed:
    """Rows of a streamed dataset: records → tokens → shuffle buffer of documents → rows.

    Every draw from the buffer is a pure function of (seed, draws so far); what the buffer and the last, half-used
    document hold is part of the state, because `datasets` forgets the contents of its own shuffle buffers.

    Args:
        stream: the records.
        tokenizer: the teacher's.
        seq_len: tokens per row, at most where not packed.
        pack: whether rows are filled with several documents.
        seed: of the shuffling; a tuple of numbers.
        buffer: documents held for shuffling.
        held_out: (fraction, seed) of the documents to leave out, as `in_share` tells; None leaves out none.
    """

    def __init__(
        self,
        stream: RecordStream,
        tokenizer: Any,
        seq_len: int,
        pack: bool,
        seed: tuple[int, ...],
        buffer: int = 2048,
        held_out: tuple[float, int] | None = None,
    ) -> None:
        self.stream, self.tokenizer, self.seq_len, self.pack, self.seed = stream, tokenizer, seq_len, pack, seed
        self.size, self.held_out = buffer, held_out
        self.row_tokens: float | None = float(seq_len) if pack else None
        self.draws = 0
        self.epoch_tokens = 0  # read since the epoch began
        self.buffer: list[Tokens] = []
        self.rest = _nothing()

    def take(self, count: int) -> Rows:
        """The next rows."""
        if not self.pack:
            return padded_rows([self._window() for _ in range(count)])
        needed = count * self.seq_len
        pieces, first, have = [self.rest], [np.zeros(len(self.rest.ids), bool)], len(self.rest.ids)
        while have < needed:
            document = self._draw()
            pieces.append(document)
            first.append(np.arange(len(document.ids)) == 0)
            have += len(document.ids)
        ids = np.concatenate([piece.ids for piece in pieces])
        scored = np.concatenate([piece.scored for piece in pieces])
        self.rest = _one(ids[needed:], scored[needed:])
        return packed_rows(ids[:needed], np.concatenate(first)[:needed], scored[:needed], self.seq_len)

    def state_dict(self) -> dict[str, Any]:
        """The stream's place, the draws, the buffer's documents and the rest of the last one."""
        held = Tokens.join([self.rest, *self.buffer])
        return {
            "stream": self.stream.state_dict(),
            "draws": self.draws,
            "epoch_tokens": self.epoch_tokens,
            "rest": len(self.rest.ids),
            "ids": torch.from_numpy(held.ids.copy()),
            "scored": torch.from_numpy(held.scored.copy()),
            "lengths": torch.from_numpy(np.fromiter((len(d.ids) for d in self.buffer), np.int64, len(self.buffer))),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.stream.load_state_dict(state["stream"])
        self.draws, self.epoch_tokens = int(state["draws"]), int(state["epoch_tokens"])
        ids, scored = state["ids"].numpy().copy(), state["scored"].numpy().copy()
        cuts = int(state["rest"]) + np.concatenate([np.zeros(1, np.int64), np.cumsum(state["lengths"].numpy())])
        self.rest = _one(ids[: cuts[0]], scored[: cuts[0]])
        spans = zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
        self.buffer = [_one(ids[start:stop], scored[start:stop]) for start, stop in spans]

    def _window(self) -> tuple[np.ndarray, np.ndarray]:
        while len(self.rest.ids) < 2:  # a single token has no target
            self.rest = self._draw()
        ids, scored = self.rest.ids, self.rest.scored
        self.rest = _one(ids[self.seq_len :], scored[self.seq_len :])
        return ids[: self.seq_len], scored[: self.seq_len]

    def _draw(self) -> Tokens:
        """A random document of the buffer, after filling it. An epoch's last documents are drawn before the next's."""
        while len(self.buffer) < self.size and not self.stream.exhausted:
            self._fill()
        if not self.buffer:
            if self.epoch_tokens < (self.seq_len if self.pack else 2):
                raise _too_short(self.stream.source, self.epoch_tokens, self.seq_len)
            self.stream.rewind()
            self.epoch_tokens = 0
            return self._draw()
        index = int(np.random.default_rng((*self.seed, self.draws)).integers(len(self.buffer)))
        self.draws += 1
        self.buffer[index], self.buffer[-1] = self.buffer[-1], self.buffer[index]
        return self.buffer.pop()

    def _fill(self) -> None:
        read = tokenise(self.stream.read(_READ), self.tokenizer)
        for number in range(len(read)):
            document = _one(*(a[read.offsets[number] : read.offsets[number + 1]] for a in (read.ids, read.scored)))
            if self.held_out is not None and in_share(document.ids, *self.held_out):
                continue
            if self.pack or len(document.ids) > 1:
                self.buffer.append(document)
                self.epoch_tokens += len(document.ids)


def _windows(tokens: Tokens, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of all windows of more than one token."""
    counts = -(-tokens.lengths // seq_len)
    document = np.repeat(np.arange(len(tokens)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = tokens.offsets[:-1][document] + number * seq_len
    lengths = np.minimum(tokens.offsets[1:][document] - starts, seq_len)
    return starts[lengths > 1], lengths[lengths > 1]


def _one(ids: np.ndarray, scored: np.ndarray) -> Tokens:
    return Tokens(ids, np.array([0, len(ids)]), scored)


def _nothing() -> Tokens:
    return _one(np.zeros(0, np.int32), np.zeros(0, bool))


def _too_short(place: str, found: int, needed: int) -> UserError:
    return UserError(
        f"{place}: {found} tokens to train on, fewer than one sequence of {needed}; give more text or set a smaller "
        f"data.seq_len, e.g. data.seq_len={max(found // 4, 2)}"
    )
