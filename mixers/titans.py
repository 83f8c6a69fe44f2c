"""Titans' neural memory (arXiv 2501.00663), linear, in the place of attention."""

from __future__ import annotations

import torch
from torch import nn

from .deltanet import DeltaRule
from .heads import wide
from .ops.titans import OP
from .rates import spread_rates
from .specs.base import Geometry, TensorSpec
from .specs.titans import TitansOptions, TitansSpec


class Titans(DeltaRule):
    """S_t = eta S_{t-1} - theta k (k^T M_{t-1} - v)^T, M_t = (1 - alpha) M_{t-1} + S_t, o_t = scale_h M_t^T q.

    Per head and token theta = (1 - E) sigmoid(x b_proj), eta = E sigmoid(x e_proj + e_bias), E = `max_momentum`, and
    alpha = sigmoid(x a_proj + a_bias). Exact equations and initial values: docs/reference/mixers/titans.md.
    """

    spec = TitansSpec
    decays = "head"
    options: TitansOptions
    op = OP
    states = 2

    def __init__(
        self, geometry: Geometry, options: TitansOptions, layer_idx: int, num_layers: int, first: bool
    ) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        heads, hidden = geometry.num_heads, geometry.hidden_size
        self.e_proj = nn.Linear(hidden, heads, bias=False)
        self.e_bias = nn.Parameter(torch.empty(heads))
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.a_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class. Nothing here is random: heads are told apart by their half-lives."""
        if row.name == "a_bias":
            rates = spread_rates(row.shape[0], self.options.half_life_min, self.options.half_life_max)
            return torch.log(torch.expm1(rates))  # the sigmoid of this is 1 - e^-rate
        return super().initial(row, generator)

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class."""
        self.a_bias.copy_(torch.log(torch.expm1(rates)))

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the base class: step size, momentum and forgetting, each (B, T, H)."""
        bound = self.options.max_momentum
        momentum = bound * (wide(self.e_proj(x)) + self.e_bias).sigmoid()
        return (1 - bound) * self.strength(x), momentum, (wide(self.a_proj(x)) + self.a_bias).sigmoid()
