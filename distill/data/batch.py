"""One batch, as every stage and every measurement sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """Token ids of B rows of T positions, with their documents.

    Attributes:
        input_ids: (B, T) int64; padding holds any valid id.
        position_ids: (B, T) int64; restarts at 0 where a document (or a piece of a long one) starts. At padding it is
            0, so that each padding position is a document of its own and is attended to by nothing.
        segments: (B, T) int64 document numbers within the row, non-decreasing, padding included as further numbers.
        real: (B, T) bool; False at padding.
        targets: (B, T) bool; True where input_ids[:, t] is to be predicted from position t - 1 and counts: real, not a
            BOS, not the first position of its segment, and inside a completion where the data are chat messages.
        index: (B,) int64 numbers of the rows in their stage, from its first batch on; always on the CPU. None where
            nobody counts.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    real: torch.Tensor
    targets: torch.Tensor
    index: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Non-padding input tokens."""
        return int(self.real.sum())

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return self.each(lambda value: value.to(device), self.index)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start..stop of the batch."""
        index = None if self.index is None else self.index[start:stop]
        return self.each(lambda value: value[start:stop], index)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor], index: torch.Tensor | None = None) -> Batch:
        """A batch of every (B, T) tensor of this one, changed.

        Args:
            change: (B, T) -> (B', T').
            index: of the new batch.
        """
        return Batch(**{name: change(value) for name, value in vars(self).items() if name != "index"}, index=index)
