"""Mamba-2 (arXiv 2405.21060) in the place of attention: The Mamba in the Llama's mapping, arXiv 2408.15237."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import softplus

from .base import MixerInputs, State
from .heads import wide
from .linear import LinearAttention
from .ops.simple_gla import OP
from .rates import LOG_DECAY_FLOOR, inverse_softplus, spread_rates
from .specs.base import Geometry, TensorSpec
from .specs.mamba2 import Mamba2Options, Mamba2Spec


class Mamba2(LinearAttention):
    """S_t = e^{-A dt_t} S_{t-1} + dt_t B x^T, y_t = S_t^T C + D x, with x = v, B = k, C = q; or, `discrete`,
    S_t = e^{-softplus(a_t)} S_{t-1} + B x^T.

    Exact equations and initial values: docs/reference/mixers/mamba2.md.
    """

    spec = Mamba2Spec
    op = OP
    decays = "head"
    options: Mamba2Options

    def __init__(
        self, geometry: Geometry, options: Mamba2Options, layer_idx: int, num_layers: int, first: bool
    ) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        heads, hidden = geometry.num_heads, geometry.hidden_size
        if options.discrete:
            self.a_proj = nn.Linear(hidden, heads, bias=False)
            self.a_bias = nn.Parameter(torch.empty(heads))
        else:
            self.dt_proj = nn.Linear(hidden, heads, bias=False)
            self.dt_bias = nn.Parameter(torch.empty(heads))
            self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class."""
        options, value = self.options, super().initial(row, generator)
        if row.name in ("dt_bias", "a_bias"):
            if options.start == "paper":
                low, high = math.log(1e-3), math.log(1e-1)
                return inverse_softplus(value.uniform_(low, high, generator=generator).exp())
            return inverse_softplus(self.first_rates())
        if row.name == "A_log" and options.start == "paper":
            return value.uniform_(1.0, 16.0, generator=generator).log()
        if row.name == "D":
            return value.fill_(options.skip)
        if row.name == "q_scale" and options.discrete:
            return value * -torch.expm1(-self.first_rates())
        return value

    def first_rates(self) -> torch.Tensor:
        """Rates of decay per token, (H,), at the start."""
        options = self.options
        return spread_rates(self.geometry.num_heads, options.half_life_min, options.half_life_max)

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class."""
        if self.options.discrete:
            self.a_bias.copy_(inverse_softplus(rates))
        else:
            self.A_log.zero_()
            self.dt_bias.copy_(inverse_softplus(rates))

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """See the base class: (B, T, H)."""
        if self.options.discrete:
            rate = softplus(wide(self.a_proj(x)) + self.a_bias)
        else:
            rate = self.A_log.exp() * softplus(wide(self.dt_proj(x)) + self.dt_bias)
        return (-rate).clamp(min=LOG_DECAY_FLOOR)

    def write(self, x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """See the base class: dt B, where dt is bounded as the log-decay is."""
        return k if self.options.discrete else k * (-g * (-self.A_log).exp())[..., None]

    def recurrence(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: (B, H, d, d)."""
        o, state = super().recurrence(x, q, k, v, inputs, state)
        return wide(o) + self.D[:, None] * self.repeat(v), state
