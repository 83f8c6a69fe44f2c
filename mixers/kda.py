"""Kimi delta attention (Kimi Linear, arXiv 2510.26692) in the place of attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.init import orthogonal_

from .deltanet import DeltaRule
from .ops.kda import OP
from .rates import bounded_decay, inverse_softplus, spread_rates
from .specs.base import Geometry, TensorSpec
from .specs.kda import KDAOptions, KDASpec


class KDA(DeltaRule):
    """S_t = (I - beta_t k k^T) diag(e^{g_t}) S_{t-1} + beta_t k v^T, o_t = scale_h S_t^T q, with unit k and q.

    g = -exp(A_log_h) softplus(W2 W1 x + dt_bias) per channel and beta = sigmoid(x b_proj) per head. Exact equations and
    initial values: docs/reference/mixers/kda.md.
    """

    spec = KDASpec
    decays = "channel"
    options: KDAOptions
    op = OP

    def __init__(self, geometry: Geometry, options: KDAOptions, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        rank = options.decay_rank or geometry.head_dim
        self.f_a_proj = nn.Linear(geometry.hidden_size, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, geometry.inner_size, bias=False)
        self.A_log = nn.Parameter(torch.empty(geometry.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(geometry.inner_size))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class. Channels are told apart by their half-lives, from head to head and within each."""
        if row.name == "f_a_proj.weight":
            return orthogonal_(torch.empty(row.shape), generator=generator)
        if row.name == "dt_bias":
            rates = spread_rates(row.shape[0], self.options.half_life_min, self.options.half_life_max)
            return inverse_softplus(rates)
        return super().initial(row, generator)

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class."""
        self.A_log.zero_()
        self.dt_bias.copy_(inverse_softplus(rates).flatten())

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the base class: log-decay (B, T, H, d) and write strength (B, T, H)."""
        split = (self.geometry.num_heads, self.geometry.head_dim)
        change = self.f_b_proj(self.f_a_proj(x)).unflatten(-1, split)
        return bounded_decay(self.A_log[:, None], change, self.dt_bias.view(split)), self.strength(x)
