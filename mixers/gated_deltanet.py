"""Gated DeltaNet (arXiv 2412.06464) in the place of attention, on the attention's own queries, keys and values."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu

from .deltanet import DeltaRule
from .rates import bounded_decay, inverse_softplus, spread_rates
from .specs.base import Geometry, TensorSpec
from .specs.gated_deltanet import GatedDeltaNetOptions, GatedDeltaNetSpec


class GatedDeltaNet(DeltaRule):
    """S_t = e^{g_t} (I - beta_t k k^T) S_{t-1} + beta_t k v^T, o_t = scale_h S_t^T q, with unit k and q.

    g = -exp(A_log) softplus(x a_proj + dt_bias) and beta = sigmoid(x b_proj) per head. Exact equations and initial
    values: docs/reference/mixers/gated_deltanet.md.
    """

    spec = GatedDeltaNetSpec
    decays = "head"
    options: GatedDeltaNetOptions

    def __init__(
        self, geometry: Geometry, options: GatedDeltaNetOptions, layer_idx: int, num_layers: int, first: bool
    ) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        heads = geometry.num_heads
        self.a_proj = nn.Linear(geometry.hidden_size, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class. Nothing here is random: heads are told apart by their half-lives."""
        if row.name == "dt_bias":
            return inverse_softplus(spread_rates(row.shape[0], self.options.half_life_min, self.options.half_life_max))
        return super().initial(row, generator)

    def knobs(self) -> dict[str, tuple[float, ...]]:
        """See the base class: no write strength where nothing but the token decides it."""
        found = super().knobs()
        return (
            found if self.options.beta_bias else {name: values for name, values in found.items() if name != "strength"}
        )

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class."""
        self.A_log.zero_()
        self.dt_bias.copy_(inverse_softplus(rates))

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return silu(x) if self.options.activation == "silu" else x

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the base class: log-decay and write strength, both (B, T, H)."""
        return bounded_decay(self.A_log, self.a_proj(x), self.dt_bias), self.strength(x)
