"""Gated DeltaNet (arXiv 2412.06464) in the place of attention, on the attention's own queries, keys and values."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import softplus

from .base import MixerInputs, State
from .heads import AttentionMixer, HeadNorm, unit, wide
from .kernels import run
from .specs.base import Geometry, TensorSpec, chunk_length
from .specs.gated_deltanet import GatedDeltaNetOptions, GatedDeltaNetSpec

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
        heads, inner, hidden = geometry.num_heads, geometry.inner_size, geometry.hidden_size
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.b_proj = nn.Linear(hidden, heads)
        if options.gate:
            self.g_proj = nn.Linear(hidden, inner, bias=False)
        if options.out_norm == "rms":
            self.out_norm = HeadNorm(geometry.head_dim, geometry.norm_eps)
        else:
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
        if row.name in ("q_scale", "out_norm.weight"):
            return torch.ones(row.shape)
        value = torch.zeros(row.shape)
        if row.name == "conv":
            value[:, -1] = 1.0
        return value

    def mix(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: the recurrence's (B, H, d, d), then the convolution's last inputs."""
        options = self.options
        q, k, v, buffers = self.project(x, inputs, state)
        q, k, v = self.heads(q, k, v, rotary)
        q = unit(q) if options.unit_q else q * self.geometry.head_dim**-0.5
        if options.out_norm == "none":
            q = q * self.q_scale[:, None]
        k, v = self.repeat(unit(k)), self.repeat(v)
        rate = softplus(wide(self.a_proj(x)) + self.dt_bias)
        g = (-self.A_log.exp() * rate).clamp(min=LOG_DECAY_FLOOR)
        beta = wide(self.b_proj(x)).sigmoid()
        o, S = run(
            "gated_delta",
            options.form,
            chunk_length(self.geometry.head_dim, options.chunk),
            *(q, k, v, g, beta),
            state=state[0] if state else None,
            padding=inputs.padding,
            segments=inputs.segments,
        )
        if options.out_norm == "rms":
            o = self.out_norm(o)
        o = o.flatten(2).to(x.dtype)
        if options.gate:
            o = o * (2 * self.g_proj(x).sigmoid())
        return self.o_proj(o), (S, *buffers)
