"""RAD-RWKV7 (RADLADS, arXiv 2505.03005): RWKV-7's recurrence on the attention's own projections."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import group_norm
from torch.nn.init import orthogonal_

from .base import MixerInputs, State
from .heads import AttentionMixer, unit, wide
from .kernels import run
from .ops.rwkv7 import OP
from .specs.base import Geometry, TensorSpec
from .specs.heads import chunk_length
from .specs.rwkv7 import RWKV7Options, RWKV7Spec, ranks

ONES = ("g0", "r_scale", "k_a", "ln_x.weight")
LOG_DECAY_BOUND = math.exp(-0.5)
"""RWKV-7's decays lie in (exp(-0.6065), 1)."""


class RWKV7(AttentionMixer):
    """S_t = S_{t-1} (diag(w_t) - kappa^T (a * kappa)) + v^T k_hat, o_t = d^{-1/2} r_t S_t^T, gated.

    No token shift, no bonus, no GroupNorm by default, rotary embedding kept. Exact equations and initial values:
    docs/reference/mixers/rwkv7.md.
    """

    spec = RWKV7Spec
    decays = "channel"
    writes = True
    couples_layers = True
    options: RWKV7Options

    def __init__(self, geometry: Geometry, options: RWKV7Options, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        hidden, inner = geometry.hidden_size, geometry.inner_size
        rank = ranks(hidden, options)
        self.w0 = nn.Parameter(torch.empty(inner))
        self.w1, self.w2 = _low_rank(hidden, rank["w"], inner)
        self.a0 = nn.Parameter(torch.empty(inner))
        self.a1, self.a2 = _low_rank(hidden, rank["a"], inner)
        self.has_residual = options.value_residual and not first
        if self.has_residual:
            self.v0 = nn.Parameter(torch.empty(inner))
            self.v1, self.v2 = _low_rank(hidden, rank["v"], inner)
        if options.gate_init == "identity":
            self.g0 = nn.Parameter(torch.empty(inner))
        self.g1, self.g2 = _low_rank(hidden, rank["g"], inner)
        if options.unit_keys:
            self.r_scale = nn.Parameter(torch.empty(geometry.num_heads))
        if not options.balance_state:
            self.k_k = nn.Parameter(torch.empty(inner))
            self.k_a = nn.Parameter(torch.empty(inner))
        if options.group_norm:
            self.ln_x = nn.GroupNorm(geometry.num_heads, inner, eps=geometry.head_dim * 1e-5)
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class; the paper's values but for gate, removal and value residual (see the card)."""
        value = super().initial(row, generator)
        if row.name in ("conv", "window_mix"):
            return value
        identity = self.options.gate_init == "identity"
        constants = {"v0": self.options.value_start, "k_k": 0.85} | dict.fromkeys(ONES, 1.0)
        if row.name == "w0":
            ramp = torch.linspace(0, 1, row.shape[0]) ** (0.85 + self.position**0.5)
            return -6.5 + 5 * ramp
        if row.name == "a0":
            return value.fill_(math.log(self.options.removal / (1 - self.options.removal)))
        if row.name == "g1" and identity:
            return orthogonal_(value, generator=generator)
        if row.name in ("w2", "a2", "v2") or (row.name == "g2" and not identity):
            rows, columns = row.shape
            return orthogonal_(value, gain=0.1 * max(1.0, rows / columns) ** 0.5, generator=generator)
        return value.fill_(constants.get(row.name, 0.0))

    def values(self, x: torch.Tensor, v: torch.Tensor, inputs: MixerInputs) -> torch.Tensor:
        """See the base class: of all heads, mixed with those of the lowest converted layer."""
        return self.residual(x, self.repeat(v), inputs)

    def set_rates(self, rates: torch.Tensor) -> None:
        """See the base class; as fast as RWKV-7's decays can be."""
        self.w0.copy_(torch.logit((rates / LOG_DECAY_BOUND).clamp(max=0.99)).flatten())

    def set_strength(self, strength: torch.Tensor) -> None:
        """See the base class: the removal strength a."""
        self.a0.copy_(torch.logit(strength).repeat_interleave(self.geometry.head_dim))

    def gate_inputs(self, x: torch.Tensor) -> torch.Tensor | None:
        """See the base class."""
        return (x @ self.g1).sigmoid() if self.options.gate_init == "identity" else None

    @torch.no_grad()
    def set_gates(self, slopes: torch.Tensor) -> None:
        """See the base class: here exact."""
        self.g2.copy_(slopes.repeat_interleave(self.geometry.head_dim, 0).mT)

    def recurrence(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: (B, H, d, d). The queries are RWKV's receptance r."""
        split = (self.geometry.num_heads, self.geometry.head_dim)
        r, k, v = q, self.repeat(k), self.repeat(v)
        w = -LOG_DECAY_BOUND * (self.w0 + wide((x @ self.w1).tanh() @ self.w2)).sigmoid().unflatten(-1, split)
        a = wide(self.a0 + (x @ self.a1) @ self.a2).sigmoid().unflatten(-1, split)
        if self.options.unit_keys:
            r, k = unit(r) * self.r_scale[:, None], unit(k)
        if self.options.balance_state:
            kappa = unit(k)
            k = wide(k) * (a - torch.expm1(w))
        else:
            kappa = unit(k * self.k_k.view(split))
            k = wide(k) * (1 + (a - 1) * self.k_a.view(split))
        if not (self.options.group_norm or self.options.unit_keys):
            r = wide(r) * self.geometry.query_scale
        chunk = chunk_length(self.geometry.head_dim, self.options.chunk)
        return run(OP, self.options.form, chunk, *(r, w, k, v, kappa, a), where=inputs, state=state)

    def output(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """See the base class: GroupNorm where it is on, and RWKV-7's low-rank gate."""
        o = o.flatten(2)
        if self.options.group_norm:
            norm = self.ln_x
            o = group_norm(wide(o).flatten(0, 1), norm.num_groups, eps=norm.eps).view_as(o) * norm.weight + norm.bias
        gate = (x @ self.g1).sigmoid() @ self.g2
        if self.options.gate_init == "identity":
            gate = self.g0 + gate
        return self.o_proj(o.to(x.dtype) * gate)

    def residual(self, x: torch.Tensor, v: torch.Tensor, inputs: MixerInputs) -> torch.Tensor:
        """Values of all heads, (B, T, H, d), mixed with those of the lowest converted layer; that layer stores its own.

        Raises:
            ValueError: the lowest layer has not run in this forward.
        """
        if not self.options.value_residual:
            return v
        if self.first:
            inputs.shared["v_first"] = v.flatten(2)
            return v
        if "v_first" not in inputs.shared:
            raise ValueError(
                f"layer {self.layer_idx}: the value residual needs mixer_inputs.shared['v_first'], which the lowest "
                "converted layer writes earlier in the same forward"
            )
        share = (self.v0 + (x @ self.v1) @ self.v2).sigmoid().view_as(v)
        return v + (inputs.shared["v_first"].view_as(v) - v) * share


def _low_rank(hidden: int, rank: int, inner: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(hidden, rank)), nn.Parameter(torch.empty(rank, inner))
