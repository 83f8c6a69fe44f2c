"""Linear attention with decays on the attention's own queries, keys and values: what such mixers share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .base import MixerInputs, State
from .heads import AttentionMixer, wide
from .kernels import run
from .ops.gla import OP as GLA_OP
from .ops.op import Op
from .rates import LOG_DECAY_FLOOR, spread_rates
from .specs.base import Geometry, TensorSpec
from .specs.heads import chunk_length


class LinearAttention(AttentionMixer):
    """S_t = e^{g_t} S_{t-1} + k v^T, o_t = q_scale S_t^T q.

    A subclass names its recurrence and gives the log-decays, and what is written where that is not the bare key.
    """

    op: ClassVar[Op]

    def __init__(self, geometry: Geometry, options: Any, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        if options.out_norm == "none":
            self.q_scale = nn.Parameter(torch.empty(geometry.num_heads))

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class."""
        if row.name == "q_scale":
            return torch.full(row.shape, self.geometry.head_dim**0.5 if self.options.qk_norm == "unit" else 1.0)
        return super().initial(row, generator)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """The log-decays that the recurrence takes as g, from the layer input x (B, T, D), in fp32."""
        raise NotImplementedError

    def write(self, x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """What is written with each value.

        Args:
            x: (B, T, D) layer input.
            k: (B, T, H, d) keys in fp32.
            g: their log-decays.
        """
        raise NotImplementedError

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
        q, k = self.scaled(q, k)
        if self.options.out_norm == "none":
            q = q * self.q_scale[:, None]
        g = self.log_decay(x)
        k = self.write(x, self.repeat(wide(k)), g)
        chunk = chunk_length(self.geometry.head_dim, self.options.chunk)
        return run(self.op, self.options.form, chunk, q, k, self.repeat(v), g, where=inputs, state=state)


class ChannelAttention(LinearAttention):
    """Linear attention with a decay per channel of the key: S_t = diag(e^{g_t}) S_{t-1} + (1 - e^{g_t}) k v^T."""

    op = GLA_OP
    decays = "channel"

    def first_rates(self) -> torch.Tensor:
        """Rates of decay per token, (H d,), at the start: the same in every head.

        Where channels i and i + d/2 turn together the two get the same, the pairs that turn fast the shortest lives.
        """
        geometry, options = self.geometry, self.options
        pairs = 2 if geometry.rope and geometry.rotary == "half" and options.rope else 1
        rates = spread_rates(geometry.head_dim // pairs, options.half_life_min, options.half_life_max)
        return rates.repeat(pairs * geometry.num_heads)

    def per_head(self, g: torch.Tensor) -> torch.Tensor:
        """(B, T, H d) log-decays -> (B, T, H, d), none below `LOG_DECAY_FLOOR`."""
        return g.clamp(min=LOG_DECAY_FLOOR).unflatten(-1, (self.geometry.num_heads, -1))

    def write(self, x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """See the base class: (1 - e^g) k, as much as the state forgets, so that its size stays."""
        return k * -torch.expm1(g)
