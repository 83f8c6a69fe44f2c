"""What every format does to projections: heads of their own, factors folded in, maps filled up with zeros."""

from __future__ import annotations

from collections.abc import Callable

import torch

Take = Callable[[str], torch.Tensor]
"""A tensor of a layer's mixer by its name there, in fp64."""


def repeat_rows(x: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """Rows of grouped key/value heads, (K d, ...), once for every query head: (H d, ...)."""
    grouped = x.unflatten(0, (-1, head_dim))
    return grouped.repeat_interleave(heads // grouped.shape[0], 0).flatten(0, 1)


def scale_heads(x: torch.Tensor, factors: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (H d, ...) of each head times its own factor, (H,)."""
    return (x.unflatten(0, (-1, head_dim)) * factors.view(-1, *[1] * x.dim())).flatten(0, 1)


def pad(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Zeros behind, along one dimension, up to a size."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)
