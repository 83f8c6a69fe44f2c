"""One batch, as every stage and every measurement sees it."""

from __future__ import annotations

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
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    real: torch.Tensor
    targets: torch.Tensor

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
        return Batch(**{name: value.to(device) for name, value in self.__dict__.items()})

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start..stop of the batch."""
        return Batch(**{name: value[start:stop] for name, value in self.__dict__.items()})
