"""RAD-RWKV6 (RADLADS, arXiv 2505.03005): RWKV-6's recurrence on the attention's own projections."""

from __future__ import annotations

import math

import torch
from torch import nn

from .base import MixerInputs, State
from .heads import wide
from .linear import ChannelAttention
from .rates import LOG_DECAY_FLOOR
from .recorded import convolve
from .specs.base import Geometry, TensorSpec
from .specs.rwkv6 import SHIFTED, RWKV6Options, RWKV6Spec, rank


class RWKV6(ChannelAttention):
    """S_t = diag(w_t) S_{t-1} + (1 - w_t) k v^T, o_t = q_scale S_t^T r, with unit k and r.

    log w = -exp(w0 + tanh(x w1) w2) per channel. No bonus, no GroupNorm. Exact equations and initial values:
    docs/reference/mixers/rwkv6.md. With token shift what the layer computes with has one more dimension in front: its
    five inputs, for receptance (queries), key, value, decay and gate.
    """

    spec = RWKV6Spec
    options: RWKV6Options

    def __init__(self, geometry: Geometry, options: RWKV6Options, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        hidden, inner = geometry.hidden_size, geometry.inner_size
        decay, shift = rank(hidden, options.decay_rank), rank(hidden, options.shift_rank)
        self.w0 = nn.Parameter(torch.empty(inner))
        self.w1 = nn.Parameter(torch.empty(hidden, decay))
        self.w2 = nn.Parameter(torch.empty(decay, inner))
        if options.token_shift:
            self.mu_x = nn.Parameter(torch.empty(hidden))
            self.mu = nn.Parameter(torch.empty(SHIFTED, hidden))
            self.mu1 = nn.Parameter(torch.empty(hidden, SHIFTED * shift))
            self.mu2 = nn.Parameter(torch.empty(SHIFTED, shift, hidden))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class; the paper's values but for the decays (see the card)."""
        value = super().initial(row, generator)
        if row.name == "w0" and self.options.start == "paper":
            return -6.0 + 5.0 * torch.linspace(0, 1, row.shape[0]) ** (0.7 + 1.3 * self.position)
        if row.name == "w0":
            return self.first_rates().log()
        if row.name in ("w2", "mu2"):
            return value.uniform_(-0.01, 0.01, generator=generator)
        if row.name == "mu_x":
            return value.fill_(1.0)
        return value

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class."""
        self.w0.copy_(rates.log().flatten())

    def mix(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: as there, then the last layer input with token shift."""
        if not self.options.token_shift:
            return super().mix(x, rotary, inputs, state)
        shifted, last = self.shifted(x, inputs, None if state is None else state[-1])
        out, new = super().mix(shifted, rotary, inputs, None if state is None else state[:-1])
        return out, (*new, last)

    def matrix(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, inputs: MixerInputs
    ) -> torch.Tensor:
        """See the base class."""
        return super().matrix(self.shifted(x, inputs, None)[0] if self.options.token_shift else x, rotary, inputs)

    def shifted(
        self, x: torch.Tensor, inputs: MixerInputs, last: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The five inputs (5, B, T, D), each its own mix of the token and the one before, and the new last input."""
        taps = torch.stack([torch.ones_like(self.mu_x), torch.zeros_like(self.mu_x)], 1)
        full = wide(x)
        before, last = convolve(full, taps.detach(), last, inputs)
        step = before - full
        low = ((full + step * self.mu_x).to(x.dtype) @ self.mu1).tanh().unflatten(-1, (SHIFTED, -1))
        share = low.flatten(0, 1).transpose(0, 1) @ self.mu2 + self.mu[:, None]
        return (full + step * share.unflatten(1, x.shape[:2])).to(x.dtype), last

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the base class."""
        if not self.options.token_shift:
            return super().projected(x)
        return self.q_proj(x[0]), self.k_proj(x[1]), self.v_proj(x[2])

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """See the base class: (B, T, H, d)."""
        x = x[3] if self.options.token_shift else x
        log_rate = self.w0 + wide((x @ self.w1).tanh() @ self.w2)
        # Bounded before exp: beyond the bound the gradient is zero, where that of exp would be infinite times zero.
        return self.per_head(-log_rate.clamp(max=math.log(-LOG_DECAY_FLOOR)).exp())

    def output(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return super().output(x[4] if self.options.token_shift else x, o)
