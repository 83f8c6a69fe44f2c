"""Token ids to rows, and rows to a `Batch`.

Packed: documents stand one after the other without gaps and are cut into rows of seq_len; what a row holds of one
document is a piece, and every piece is a segment of its own. Not packed: one piece per row, padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .batch import Batch


@dataclass(frozen=True)
class Rows:
    """n rows of up to T tokens, before they become tensors.

    Attributes:
        ids: (n, T) int32, zero after the row's end.
        first: (n, T) bool, True at the first token of a piece.
        scored: (n, T) bool, as in `Tokens`.
        lengths: (n,) int64 tokens in each row.
    """

    ids: np.ndarray
    first: np.ndarray
    scored: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        """Rows."""
        return len(self.lengths)


def packed_rows(ids: np.ndarray, first: np.ndarray, scored: np.ndarray, seq_len: int) -> Rows:
    """Rows without padding from flat arrays of n * seq_len tokens; `first` marks the documents' starts."""
    first = first.reshape(-1, seq_len).copy()
    first[:, 0] = True
    lengths = np.full(len(first), seq_len, np.int64)
    return Rows(ids.reshape(-1, seq_len), first, scored.reshape(-1, seq_len), lengths)


def padded_rows(pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rows:
    """One row per (ids, scored), as wide as the longest."""
    lengths = np.fromiter((len(ids) for ids, _ in pieces), np.int64, len(pieces))
    shape = len(pieces), int(lengths.max(initial=0))
    ids, scored = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (piece, marks) in enumerate(pieces):
        ids[row, : len(piece)], scored[row, : len(piece)] = piece, marks
    first = np.zeros(shape, bool)
    first[:, :1] = True
    return Rows(ids, first, scored, lengths)


def place_rows(parts: Sequence[tuple[np.ndarray, Rows]]) -> Rows:
    """Rows of several parts at the indices given with each: together 0, 1, …, n - 1."""
    count, width = sum(len(rows) for _, rows in parts), max(rows.ids.shape[1] for _, rows in parts)
    ids = np.zeros((count, width), np.int32)
    first, scored = np.zeros((count, width), bool), np.zeros((count, width), bool)
    lengths = np.zeros(count, np.int64)
    for index, rows in parts:
        columns = slice(0, rows.ids.shape[1])
        ids[index, columns], first[index, columns], scored[index, columns] = rows.ids, rows.first, rows.scored
        lengths[index] = rows.lengths
    return Rows(ids, first, scored, lengths)


def make_batch(rows: Rows) -> Batch:
    """The rows as tensors, with positions, segments and targets as `Batch` defines them."""
    width = rows.ids.shape[1]
    column = np.arange(width)
    real = column < rows.lengths[:, None]
    first = rows.first | ~real  # every padding position is a piece of its own
    starts = np.maximum.accumulate(np.where(first, column, 0), axis=1)
    return Batch(
        input_ids=torch.from_numpy(rows.ids.astype(np.int64)),
        position_ids=torch.from_numpy(column - starts),
        segments=torch.from_numpy(np.cumsum(first, axis=1, dtype=np.int64) - 1),
        real=torch.from_numpy(real),
        targets=torch.from_numpy(rows.scored & real & ~first),
    )
