"""Gated DeltaNet (arXiv 2412.06464) in the place of attention, on the attention's own queries, keys and values."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import softplus

from .base import MixerInputs, State
from .heads import AttentionMixer, unit, wide
from .kernels import run
from .ops.gated_delta import OP
from .specs.base import Geometry, TensorSpec
from .specs.gated_deltanet import GatedDeltaNetOptions, GatedDeltaNetSpec
from .specs.heads import chunk_length

LOG_DECAY_FLOOR = -5.0
"""One step keeps at least 0.7 % of the state: safe for every chunked kernel, and as good as forgetting."""


class GatedDeltaNet(AttentionMixer):
    """S_t = e^{g_t} (I - beta_t k k^T) S_{t-1} + beta_t k v^T, o_t = scale_h S_t^T q, with unit k and q.

    g = -exp(A_log) softplus(x a_proj + dt_bias) and beta = sigmoid(x b_proj) per head. Exact equations and initial
    values: docs/reference/mixers/gated_deltanet.md.
    """

    spec = GatedDeltaNetSpec
    options: GatedDeltaNetOptions

    def __init__(
        self, geometry: Geometry, options: GatedDeltaNetOptions, layer_idx: int, num_layers: int, first: bool
    ) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        heads, hidden = geometry.num_heads, geometry.hidden_size
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.b_proj = nn.Linear(hidden, heads)
        if options.out_norm == "none":
            self.q_scale = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class. Nothing here is random: heads are told apart by their half-lives."""
        if row.name == "dt_bias":
            low, high = math.log(self.options.half_life_min), math.log(self.options.half_life_max)
            rate = math.log(2.0) / torch.linspace(low, high, row.shape[0]).exp()
            return torch.log(torch.expm1(rate))  # softplus of this is the rate
        if row.name == "b_proj.bias":
            return torch.full(row.shape, math.log(self.options.beta / (1 - self.options.beta)))
        if row.name == "q_scale":
            return torch.ones(row.shape)
        return super().initial(row, generator)

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
        options = self.options
        q = unit(q) if options.unit_q else wide(q) * self.geometry.query_scale
        if options.out_norm == "none":
            q = q * self.q_scale[:, None]
        rate = softplus(wide(self.a_proj(x)) + self.dt_bias)
        g = (-self.A_log.exp() * rate).clamp(min=LOG_DECAY_FLOOR)
        beta = wide(self.b_proj(x)).sigmoid()
        chunk = chunk_length(self.geometry.head_dim, options.chunk)
        heads = (q, self.repeat(unit(k)), self.repeat(v), g, beta)
        return run(OP, options.form, chunk, *heads, where=inputs, state=state)
