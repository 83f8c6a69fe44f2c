"""What calibrate knows of an attention, and decays made of it (Taylor-Calibrate, arXiv 2606.16429, and beyond)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

SLOWEST, FASTEST = 1e-5, 4.0
"""Bounds of rates of decay per token: some 70,000 tokens of half-life, and forgotten at once."""

REACH = (1.0, 0.06, 0.12, 0.25, 0.5, 2.0, 4.0, 8.0)
"""Half-lives tried, over what the distances say."""
SPREAD = (1.0, 0.0, 0.5)
"""Of a head's channels: 1 takes their half-lives from the distribution's quantiles, 0 gives all the same."""
STRENGTH = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""Write strengths tried; 0 stands for what the entropy says."""


class AttentionStats(NamedTuple):
    """What a layer's attention looks at, head by head: fp64 on the CPU.

    Attributes:
        distance: (H,) mean number of tokens between a query and what it reads.
        histogram: (H, N) share of the weight by distance; rows sum to 1.
        edges: (N + 1,) distances at which the bins begin; bin i holds edges[i] <= distance < edges[i + 1].
        entropy: (H,) mean entropy of the weights over that of equal ones, from 0 to 1.
        near: (H,) share of the weight within `window` tokens, the token itself included.
        window: tokens.
    """

    distance: torch.Tensor
    histogram: torch.Tensor
    edges: torch.Tensor
    entropy: torch.Tensor
    near: torch.Tensor
    window: int

    def quantiles(self, count: int) -> torch.Tensor:
        """(H, count) rising distances below which (i + 1/2) / count of the weight lies, linear within a bin."""
        summed = self.histogram.cumsum(-1)
        before = summed - self.histogram
        wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        bins = torch.searchsorted(summed, wanted.expand(len(summed), -1).contiguous())
        bins = bins.clamp(max=self.histogram.shape[1] - 1)
        share = (wanted - before.gather(1, bins)) / self.histogram.gather(1, bins).clamp(min=1e-12)
        low, high = self.edges[bins], self.edges[bins + 1]
        return low + share.clamp(0, 1) * (high - low)


def head_rates(stats: AttentionStats, reach: torch.Tensor) -> torch.Tensor:
    """Rates of decay per token, (H,): half-lives are the mean distances (Taylor-Calibrate, i) times `reach`."""
    return _rates(stats.distance * reach)


def channel_rates(
    stats: AttentionStats, reach: torch.Tensor, spread: torch.Tensor, count: int, copies: int
) -> torch.Tensor:
    """Rates of decay per token, (H, copies * count), fastest first, as often over again as `copies` says.

    Args:
        stats: of the attention.
        reach: (H,) factor of all half-lives.
        spread: (H,) 1 for the quantiles of the distances, 0 for their mean in every channel, between them geometric.
        count: channels that may differ.
        copies: 2 where channels i and i + count turn together and so must decay together.
    """
    middle = stats.distance[:, None].clamp(min=0.5)
    lives = middle * (stats.quantiles(count).clamp(min=0.5) / middle) ** spread[:, None]
    return _rates(lives * reach[:, None]).repeat(1, copies)


def entropy_strength(stats: AttentionStats) -> torch.Tensor:
    """Write strengths, (H,): 0.3 for the widest attention to 0.7 for the narrowest (Taylor-Calibrate, ii)."""
    low, high = stats.entropy.min(), stats.entropy.max()
    return 0.7 - 0.4 * (stats.entropy - low) / (high - low).clamp(min=1e-9)


def _rates(half_lives: torch.Tensor) -> torch.Tensor:
    return (math.log(2.0) / half_lives.clamp(min=1e-3)).clamp(SLOWEST, FASTEST)
