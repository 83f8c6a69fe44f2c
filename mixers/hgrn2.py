"""HGRN-2 (arXiv 2404.07904) in the place of attention, on the attention's own queries, keys and values."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from .heads import wide
from .linear import ChannelAttention
from .specs.base import Geometry, TensorSpec
from .specs.hgrn2 import HGRN2Options, HGRN2Spec


class HGRN2(ChannelAttention):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) k v^T, o_t = q_scale S_t^T q, with unit k and q.

    f = b + (1 - b) sigmoid(x f_proj + f_bias) per channel, with the lower bound b. Exact equations and initial values:
    docs/reference/mixers/hgrn2.md.
    """

    spec = HGRN2Spec
    options: HGRN2Options

    def __init__(self, geometry: Geometry, options: HGRN2Options, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        self.f_proj = nn.Linear(geometry.hidden_size, geometry.inner_size, bias=False)
        self.f_bias = nn.Parameter(torch.empty(geometry.inner_size))
        self.bound = layer_idx / num_layers if options.lower_bound == "depth" else 0.0
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class."""
        if row.name == "f_bias":
            return self._bias(self.first_rates())
        return super().initial(row, generator)

    def _bias(self, rates: torch.Tensor) -> torch.Tensor:
        """Rates that the lower bound does not allow are as fast as it does."""
        forgotten = (-torch.expm1(-rates) / (1 - self.bound)).clamp(max=0.9)
        return torch.logit(1 - forgotten)

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class."""
        self.f_bias.copy_(self._bias(rates).flatten())

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """See the base class: (B, T, H, d)."""
        gate = wide(self.f_proj(x)) + self.f_bias
        if not self.bound:
            return self.per_head(logsigmoid(gate))
        return self.per_head(torch.log1p(-(1 - self.bound) * (-gate).sigmoid()))
