"""DeltaNet (arXiv 2406.06484) in the place of attention, and the write by the delta rule that other mixers share."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from .base import MixerInputs, State
from .heads import AttentionMixer, unit, wide
from .kernels import run
from .ops.gated_delta import OP
from .ops.op import Op
from .specs.base import Geometry, TensorSpec
from .specs.deltanet import DeltaNetOptions, DeltaNetSpec
from .specs.heads import chunk_length


class DeltaRule(AttentionMixer):
    """Keys of unit length, and values that replace what the state holds under a key, by a strength per head and token.

    A subclass gives the gates of its recurrence.
    """

    op: ClassVar[Op] = OP
    writes = True

    def __init__(self, geometry: Geometry, options: Any, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        self.b_proj = nn.Linear(geometry.hidden_size, geometry.num_heads, bias=getattr(options, "beta_bias", True))
        if options.out_norm == "none":
            self.q_scale = nn.Parameter(torch.empty(geometry.num_heads))

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class. Nothing here is random."""
        if row.name == "b_proj.bias":
            return torch.full(row.shape, math.log(self.options.beta / (1 - self.options.beta)))
        if row.name == "q_scale":
            return torch.ones(row.shape)
        return super().initial(row, generator)

    def set_strength(self, strength: torch.Tensor) -> None:
        """See the base class."""
        self.b_proj.bias.copy_(torch.logit(strength))

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What the recurrence takes beside queries, keys and values, in fp32, from the layer input x (B, T, D)."""
        raise NotImplementedError

    def strength(self, x: torch.Tensor) -> torch.Tensor:
        """The share of a value that is written at once, (B, T, H), in fp32."""
        return wide(self.b_proj(x)).sigmoid()

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
        elif options.unit_q:  # the norm undoes any scale but for its epsilon, before which this is the published one
            q = q * self.geometry.query_scale
        chunk = chunk_length(self.geometry.head_dim, options.chunk)
        heads = (q, self.repeat(unit(k)), self.repeat(v), *self.gates(x))
        return run(self.op, options.form, chunk, *heads, where=inputs, state=state)


class DeltaNet(DeltaRule):
    """S_t = (I - beta_t k k^T) S_{t-1} + beta_t k v^T, o_t = scale_h S_t^T q, with unit k and q.

    Exact equations and initial values: docs/reference/mixers/deltanet.md.
    """

    spec = DeltaNetSpec
    options: DeltaNetOptions

    def __init__(
        self, geometry: Geometry, options: DeltaNetOptions, layer_idx: int, num_layers: int, first: bool
    ) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        self.reset_parameters()

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """See the base class: no decay, as nothing is forgotten but what is overwritten."""
        return None, self.strength(x)
