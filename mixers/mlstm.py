"""The matrix memory of xLSTM (arXiv 2405.04517) in the place of attention."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from .base import MixerInputs, State
from .calibration import AttentionStats
from .heads import AttentionMixer, wide
from .kernels import run
from .ops.mlstm import OP
from .specs.base import Geometry, TensorSpec
from .specs.heads import chunk_length
from .specs.mlstm import MLSTMOptions, MLSTMSpec


class MLSTM(AttentionMixer):
    """C_t = f_t C_{t-1} + i_t k v^T, n_t = f_t n_{t-1} + i_t k, o_t = C_t^T q / max(|n_t^T q|, 1).

    i = exp(x i_proj + i_bias), f = sigmoid(x f_proj + f_bias) per head. Exact equations and initial values:
    docs/reference/mixers/mlstm.md.
    """

    spec = MLSTMSpec
    decays = "head"
    options: MLSTMOptions
    states = 3

    def __init__(self, geometry: Geometry, options: MLSTMOptions, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        heads, hidden = geometry.num_heads, geometry.hidden_size
        self.i_proj = nn.Linear(hidden, heads, bias=False)
        self.i_bias = nn.Parameter(torch.empty(heads))
        self.f_proj = nn.Linear(hidden, heads, bias=False)
        self.f_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class. Nothing here is random: heads are told apart by their half-lives."""
        if row.name == "i_bias":
            return torch.full(row.shape, self.options.input_gate)
        if row.name == "f_bias":
            low, high = math.log(self.options.half_life_min), math.log(self.options.half_life_max)
            rate = math.log(2.0) / torch.linspace(low, high, row.shape[0]).exp()
            return -torch.log(torch.expm1(rate))  # the sigmoid of this is e^-rate
        return super().initial(row, generator)

    def knobs(self) -> dict[str, tuple[float, ...]]:
        """See the base class; the log of the input gate decides how often the normaliser counts."""
        return {**super().knobs(), "input_gate": (self.options.input_gate, -6.0, -4.0, -1.0, 0.0, 2.0, 5.0)}

    @torch.no_grad()
    def calibrate(self, stats: AttentionStats, knobs: dict[str, torch.Tensor]) -> None:
        """See the base class."""
        super().calibrate(stats, knobs)
        self.i_bias.copy_(knobs["input_gate"])

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class."""
        self.f_bias.copy_(-torch.log(torch.expm1(rates)))

    def recurrence(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: memory (B, H, d, d), normaliser (B, H, d), stabiliser (B, H)."""
        options = self.options
        q, k = self.scaled(q, k)
        i = wide(self.i_proj(x)) + self.i_bias
        f = logsigmoid(wide(self.f_proj(x)) + self.f_bias)
        chunk = chunk_length(self.geometry.head_dim, options.chunk)
        heads = (q, self.repeat(k), self.repeat(v), i, f)
        return run(OP, options.form, chunk, *heads, where=inputs, state=state)
