"""Batches for training: feeds mixed by their share of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import UserError
from .batch import Batch
from .feeds import Feed
from .packing import Rows, make_batch, place_rows

_BLOCK = 64  # rows over which a mixture's shares are kept


class Source(Protocol):
    """Endless training batches that can be resumed."""

    def next_batch(self) -> Batch:
        """The next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch: numbers, strings, lists, dicts and tensors only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if the batches before that place had just been taken."""
        ...


class MixedSource:
    """Batches of rows drawn from one or more feeds; with weights, which are shares of the tokens.

    Rows are numbered over the whole run, and which feed gives row r is a pure function of (weights, seed, r): in every
    block of 64 rows each feed has its share, rounded, in a random order. Where rows differ in length (not packed), a
    feed's rows are chosen as much less often as they are longer. Where that length is not known (a stream that is not
    packed), the next row comes from the feed that is furthest behind its share of the tokens so far.

    The batch is the whole one, of all ranks and micro-batches: each takes its part with `Batch.rows`, so the order does
    not depend on their number.

    Args:
        feeds: the sources.
        weights: one positive number per feed.
        batch: rows per batch.
        seed: of the choice; a tuple of numbers.
        identity: what the order depends on besides the feeds' states; a resumed run must have the same.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        weights: Sequence[float],
        batch: int,
        seed: tuple[int, ...],
        identity: dict[str, Any],
    ) -> None:
        self.feeds, self.batch, self.seed, self.identity = list(feeds), batch, seed, identity
        self.shares = np.asarray(weights, np.float64) / sum(weights)
        lengths = [feed.row_tokens for feed in feeds]
        self._odds: np.ndarray | None = None
        if None not in lengths:
            odds = self.shares / np.asarray(lengths, np.float64)
            self._odds = np.cumsum(odds) / odds.sum()
        self.row = 0
        self.given = np.zeros(len(self.feeds), np.int64)  # tokens of each feed so far

    def next_batch(self) -> Batch:
        """The next `batch` rows."""
        if len(self.feeds) == 1:
            rows = self.feeds[0].take(self.batch)
        elif self._odds is not None:
            chosen = self._choose(self.row, self.batch)
            parts = [(np.flatnonzero(chosen == number), feed) for number, feed in enumerate(self.feeds)]
            rows = place_rows([(index, feed.take(len(index))) for index, feed in parts if len(index)])
        else:
            rows = place_rows([(np.array([index]), self._furthest_behind()) for index in range(self.batch)])
        batch = make_batch(rows)
        batch.index = torch.arange(self.row, self.row + self.batch)
        self.row += self.batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The number of the next row, the feeds' states, and what they belong to."""
        return {
            "identity": self.identity,
            "row": self.row,
            "given": self.given.tolist(),
            "feeds": [feed.state_dict() for feed in self.feeds],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            UserError: the state is of other data or other settings.
        """
        for key, value in self.identity.items():
            found = state["identity"].get(key)
            if found != value:
                raise UserError(
                    f"data: the checkpoint was made with {key} {found}, now it is {value}; the order would differ: "
                    "restore the data and settings of the run, or start a new one in another save.dir"
                )
        self.row, self.given = int(state["row"]), np.asarray(state["given"], np.int64)
        for feed, held in zip(self.feeds, state["feeds"], strict=True):
            feed.load_state_dict(held)

    def _choose(self, start: int, count: int) -> np.ndarray:
        """(count,) which feed gives rows start, start + 1, …"""
        assert self._odds is not None
        blocks = []
        for block in range(start // _BLOCK, (start + count - 1) // _BLOCK + 1):
            generator = np.random.default_rng((*self.seed, block))
            strata = (generator.permutation(_BLOCK) + generator.random(_BLOCK)) / _BLOCK
            blocks.append(np.searchsorted(self._odds, strata, side="right"))
        offset = start % _BLOCK
        return np.minimum(np.concatenate(blocks)[offset : offset + count], len(self.feeds) - 1)

    def _furthest_behind(self) -> Rows:
        owed = self.shares * (self.given.sum() + 1) - self.given
        number = int(np.argmax(owed))
        rows = self.feeds[number].take(1)
        self.given[number] += rows.lengths.sum()
        return rows
