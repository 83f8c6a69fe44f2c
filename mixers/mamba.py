"""Mamba (arXiv 2312.00752) in the place of attention: The Mamba in the Llama's mapping, arXiv 2408.15237."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.nn.init import orthogonal_

from .base import MixerInputs, State
from .heads import AttentionMixer, wide
from .kernels import run
from .ops.selective_scan import OP
from .rates import inverse_softplus, spread_rates
from .specs.base import Geometry, TensorSpec
from .specs.mamba import MambaOptions, MambaSpec, dt_rank, group_size


class Mamba(AttentionMixer):
    """h_t = e^{-A dt_t} h_{t-1} + dt_t x_t B_t, y_t = h_t C_t + D x_t for every channel, with x = v, B = k, C = q.

    Heads are cut into groups of N channels, which share B and C, N numbers of k and q each. Exact equations and initial
    values: docs/reference/mixers/mamba.md.
    """

    spec = MambaSpec
    decays = "channel"
    options: MambaOptions

    def __init__(self, geometry: Geometry, options: MambaOptions, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        inner, rank, self.group = geometry.inner_size, dt_rank(geometry, options), group_size(geometry, options)
        if options.out_norm == "none":
            self.q_scale = nn.Parameter(torch.empty(geometry.num_heads))
        self.dt_in_proj = nn.Linear(geometry.hidden_size, rank, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, self.group))
        self.D = nn.Parameter(torch.empty(inner))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class."""
        options, value = self.options, super().initial(row, generator)
        if row.name == "q_scale":
            return value.fill_(self.group**0.5 if options.qk_norm == "unit" else 1.0)
        if row.name == "dt_in_proj.weight":
            return orthogonal_(value, generator=generator)
        if row.name == "dt_bias" and options.start == "paper":
            return inverse_softplus(value.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp())
        if row.name == "dt_bias":
            return inverse_softplus(spread_rates(row.shape[0], options.half_life_min, options.half_life_max))
        if row.name == "A_log" and options.start == "paper":
            return value + torch.arange(1.0, self.group + 1).log()
        if row.name == "D":
            return value.fill_(options.skip)
        return value

    @property
    def rate_channels(self) -> int:
        """See the base class: the N numbers of state of a channel; of each group alike."""
        return self.group

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class: the step is the geometric mean of a head's rates, A the rates over it."""
        step = rates.log().mean(-1, keepdim=True).exp()
        width = self.geometry.head_dim
        self.dt_bias.copy_(inverse_softplus(step).expand(-1, width).flatten())
        self.A_log.copy_((rates / step).log()[:, None].expand(-1, width, -1).flatten(0, 1))

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads, d) -> (B, T, heads, d / N, N): groups of a head; what turns together stays together."""
        geometry = self.geometry
        if self.options.rope and geometry.rope and geometry.rotary == "half" and self.group % 2 == 0:
            halves = x.unflatten(-1, (2, -1, self.group // 2))
            return halves.transpose(-3, -2).flatten(-2)
        return x.unflatten(-1, (-1, self.group))

    def recurrence(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: (B, H d, N)."""
        heads, options = self.geometry.num_heads, self.options
        C, B = self.scaled(self.grouped(q), self.grouped(k))
        dt = softplus(wide(self.dt_proj(self.dt_in_proj(x))) + self.dt_bias)
        v = self.repeat(v)
        parts = (v.flatten(2), dt, -self.A_log.exp(), self.repeat(B).flatten(2, 3), C.flatten(2, 3))
        y, state = run(OP, options.form, options.chunk, *parts, where=inputs, state=state)
        y = wide(y).unflatten(-1, (heads, -1))
        if options.out_norm == "none":
            y = y * self.q_scale[:, None]
        return y + self.D.view(heads, -1) * v, state
