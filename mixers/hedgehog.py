"""LoLCATs (arXiv 2410.10254): a softmax window and Hedgehog's linear attention (arXiv 2402.04347) in one layer."""

from __future__ import annotations

import math

import torch
from torch import nn

from .base import MixerInputs, State
from .heads import AttentionMixer, wide
from .kernels import run
from .ops.hedgehog import OP
from .specs.base import Geometry, TensorSpec
from .specs.hedgehog import HedgehogOptions, HedgehogSpec, feature_size

LEAST_WEIGHT = 1e-6
"""Of a window that should not count, where the linear part alone is looked at."""


class Hedgehog(AttentionMixer):
    """o = [w sum_near e^(q.k - c) v + (1 - w) sum_far (phi(q) . phi(k)) v] / [the same without v], w per head; with the
    paper's mixing sum_far counts whole.

    phi(y) = softmax over channels of (W y) and of (-W y), with a W per head and apart for queries and keys. Exact
    equations and initial values: docs/reference/mixers/hedgehog.md.
    """

    spec = HedgehogSpec
    states = 5
    options: HedgehogOptions

    def __init__(
        self, geometry: Geometry, options: HedgehogOptions, layer_idx: int, num_layers: int, first: bool
    ) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        size, kv = feature_size(geometry, options), self.k_proj.out_features // geometry.head_dim
        self.q_features = nn.Parameter(torch.empty(geometry.num_heads, geometry.head_dim, size))
        self.k_features = nn.Parameter(torch.empty(kv, geometry.head_dim, size))
        if options.feature_map == "relu":
            self.q_features_bias = nn.Parameter(torch.empty(geometry.num_heads, size))
            self.k_features_bias = nn.Parameter(torch.empty(kv, size))
        self.window_weight = nn.Parameter(torch.empty(geometry.num_heads))
        self.reset_parameters()

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class."""
        if row.name == "window_weight":
            weight = self.options.window_weight
            return torch.full(row.shape, math.log(weight / (1 - weight)))
        if row.name in ("q_features", "k_features"):
            heads, d, size = row.shape
            if self.options.feature_init == "identity":
                return torch.eye(d, size).repeat(heads, 1, 1)
            bound = (6 / (d * size)) ** 0.5
            return torch.empty(row.shape).uniform_(-bound, bound, generator=generator)
        return super().initial(row, generator)

    @property
    def has_branches(self) -> bool:
        """See the base class: always."""
        return True

    def mix(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: as in mixers/ops/hedgehog.py, then the convolution's last inputs."""
        options, geometry = self.options, self.geometry
        past = state or ()
        q, k, v, buffers = self.project(x, inputs, past[self.states] if past and options.conv else None)
        turned = self.turn(q, k, rotary)
        mapped = self.features(*(turned if options.rope else (q, k)))
        logit = wide(self.window_weight)
        gamma = logit.exp() if options.mixing == "affine" else logit.sigmoid()  # w / (1 - w), or w
        if self.branches == "window":
            mapped = tuple(torch.zeros_like(part) for part in mapped)
        elif self.branches == "linear":  # a token with nothing before its window has the window still
            gamma = torch.full_like(gamma, LEAST_WEIGHT)
        heads = (*turned, v, *mapped, gamma)
        settings = (options.window, geometry.query_scale, geometry.softcap)
        o, new = run(
            OP, options.form, options.chunk, *heads, *settings, where=inputs, state=past[: self.states] or None
        )
        return self.output(x, o), (*new, *buffers)

    def features(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nonnegative features, fp32, of queries (B, T, H, d) and keys (B, T, K, d)."""
        mapped = []
        for part, x in (("q", q), ("k", k)):
            y = wide(torch.einsum("bthd,hdf->bthf", x, getattr(self, f"{part}_features").to(x.dtype)))
            if self.options.feature_map == "softmax":
                mapped.append(torch.cat([y.softmax(-1), (-y).softmax(-1)], -1))
            else:
                mapped.append((y + getattr(self, f"{part}_features_bias")).relu())
        return mapped[0], mapped[1]
