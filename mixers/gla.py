"""Gated linear attention (arXiv 2312.06635) in the place of attention, on the attention's own queries, keys, values."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from .heads import wide
from .linear import ChannelAttention
from .specs.base import Geometry, TensorSpec
from .specs.gla import GLAOptions, GLASpec


class GLA(ChannelAttention):
    """S_t = diag(e^{g_t}) S_{t-1} + (1 - e^{g_t}) k v^T, o_t = q_scale S_t^T q, with unit k and q.

    g = log sigmoid(x gk_down gk_up + gk_bias) / temperature per channel. Exact equations and initial values:
    docs/reference/mixers/gla.md.
    """

    spec = GLASpec
    options: GLAOptions

    def __init__(self, geometry: Geometry, options: GLAOptions, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        self.gk_down = nn.Linear(geometry.hidden_size, options.decay_rank, bias=False)
        self.gk_up = nn.Linear(options.decay_rank, geometry.inner_size, bias=False)
        self.gk_bias = nn.Parameter(torch.empty(geometry.inner_size))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class."""
        if row.name == "gk_down.weight":
            return torch.empty(row.shape).normal_(0.0, row.shape[1] ** -0.5, generator=generator)
        if row.name == "gk_bias":
            return self._bias(self.first_rates())
        return super().initial(row, generator)

    def _bias(self, rates: torch.Tensor) -> torch.Tensor:
        """The log sigmoid of -log(e^(τ rate) - 1) is -τ rate."""
        scaled = self.options.temperature * rates
        return -scaled - torch.log(-torch.expm1(-scaled))

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class."""
        self.gk_bias.copy_(self._bias(rates).flatten())

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """See the base class: (B, T, H, d)."""
        gate = logsigmoid(wide(self.gk_up(self.gk_down(x))) + self.gk_bias)
        return self.per_head(gate / self.options.temperature)

    def write(self, x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return super().write(x, k, g) if self.options.balance else k
