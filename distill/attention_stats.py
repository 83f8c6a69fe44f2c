"""What an attention looks at, summed over tokens: distances, entropy, the window's share (`AttentionStats`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..mixers.calibration import AttentionStats
from .attention import AttentionHeads, visible
from .data.batch import Batch

BLOCK = 128
"""Queries whose weights are held at once."""
PER_OCTAVE = 4
"""Bins of the histogram of distances per factor of two, from eight tokens on; below it one for each distance."""


def distance_edges(longest: int) -> Tensor:
    """Edges of the bins of distances 0 to `longest` - 1: whole numbers, then four to an octave; fp64."""
    edges = list(range(9))
    while edges[-1] < longest:
        edges.append(max(edges[-1] + 1, round(8 * 2 ** ((len(edges) - 8) / PER_OCTAVE))))
    return torch.tensor(edges, dtype=torch.float64)


class StatsSum:
    """The sums of one layer's statistics.

    Args:
        heads: query heads.
        longest: tokens of the longest row.
        window: tokens of the window whose share is taken.
    """

    def __init__(self, heads: int, longest: int, window: int) -> None:
        self.edges = distance_edges(longest)
        self.window = window
        self.histogram = torch.zeros(heads, len(self.edges) - 1, dtype=torch.float64)
        self.distance, self.entropy, self.near = (torch.zeros(heads, dtype=torch.float64) for _ in range(3))
        self.queries = self.choosing = 0

    def add(self, heads: AttentionHeads, batch: Batch, contexts: bool = False) -> Tensor | None:
        """Take in a batch.

        Args:
            heads: of the layer, on this batch.
            batch: its documents and padding.
            contexts: also give what the weights make of the values: (B, T, H, d) in fp32, 0 at padding.
        """
        length = batch.shape[1]
        place = torch.arange(length, device=batch.real.device)
        edges = self.edges.to(place.device)
        values = heads.v.float().repeat_interleave(heads.q.shape[1] // heads.v.shape[1], 1)
        made = []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            weights = heads.weights(batch, start, stop)  # (B, H, t, T)
            back = (place[start:stop, None] - place).clamp(min=0)
            bins = torch.bucketize(back.double(), edges, right=True) - 1
            total = weights.sum(0, dtype=torch.float64).flatten(1)  # (H, t T)
            self.histogram += (
                torch.zeros_like(self.histogram, device=total.device).index_add_(1, bins.flatten(), total).cpu()
            )
            self.distance += (total * back.flatten()).sum(1).cpu()
            self.near += (total * (back.flatten() < self.window)).sum(1).cpu()
            seen = visible(batch, heads.window, start, stop).sum(-1)  # (B, t)
            real, choice = batch.real[:, start:stop], seen > 1
            spread = torch.special.entr(weights).sum(-1) / seen.clamp(min=2).log()[:, None]
            self.entropy += (spread * choice[:, None]).sum((0, 2), dtype=torch.float64).cpu()
            self.queries += int(real.sum())
            self.choosing += int(choice.sum())
            if contexts:
                made.append((weights @ values).transpose(1, 2))
        return torch.cat(made, 1) if contexts else None

    def result(self) -> AttentionStats:
        """The means.

        Raises:
            ValueError: no token was seen, or a sum is not finite.
        """
        if not self.queries or not math.isfinite(float(self.histogram.sum() + self.distance.sum())):
            raise ValueError("the attention's statistics are not finite" if self.queries else "no token was seen")
        shares = self.histogram / self.histogram.sum(1, keepdim=True)
        count = self.queries
        entropy = self.entropy / max(1, self.choosing)
        return AttentionStats(self.distance / count, shares, self.edges, entropy, self.near / count, self.window)
