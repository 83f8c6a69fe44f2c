"""Rates of decay: where they start, and how far they may go."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import softplus

from .heads import wide

LOG_DECAY_FLOOR = -5.0
"""One step keeps at least 0.7 % of the state: safe for every chunked kernel, and as good as forgetting."""


def spread_rates(count: int, shortest: float, longest: float) -> torch.Tensor:
    """Rates of decay per token, (count,), whose half-lives are log-uniform between two ends, in tokens."""
    return math.log(2.0) / torch.linspace(math.log(shortest), math.log(longest), count).exp()


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    """What softplus makes x of."""
    return x + torch.log(-torch.expm1(-x))


def bounded_decay(log_rate: torch.Tensor, change: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """-exp(log_rate) softplus(change + bias), in fp32 and not below `LOG_DECAY_FLOOR`."""
    return (-log_rate.exp() * softplus(wide(change) + bias)).clamp(min=LOG_DECAY_FLOOR)
