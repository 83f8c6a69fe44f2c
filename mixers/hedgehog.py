"""LoLCATs (arXiv 2410.10254): a softmax window and Hedgehog's linear attention (arXiv 2402.04347) in one layer."""

from __future__ import annotations

import math

import torch
from torch import nn

from .base import MixerInputs, State
from .calibration import AttentionStats
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

    def knobs(self) -> dict[str, tuple[float, ...]]:
        """See the base class: the sharpness of the features (a factor of their maps) and the window's weight."""
        window = (self.options.window_weight, 0.01, 0.05, 0.3, 0.6, 0.97, 0.99, 0.997)
        return {"sharpness": (1.0, 0.0, 0.3, 0.6, 1.5, 2.5, 4.0, 6.0), "window_weight": window}

    @torch.no_grad()
    def calibrate(self, stats: AttentionStats, knobs: dict[str, torch.Tensor]) -> None:
        """See the base class: features are those of `initial`, times the sharpness."""
        shared = len(self.q_features) // len(self.k_features)
        for name, sharpness in (("q", knobs["sharpness"]), ("k", knobs["sharpness"].view(-1, shared).mean(1))):
            maps = getattr(self, f"{name}_features")
            maps.copy_(torch.eye(*maps.shape[1:]) * sharpness.to(maps.dtype)[:, None, None])
        self.window_weight.copy_(torch.logit(knobs["window_weight"]))

    @property
    def has_branches(self) -> bool:
        """See the base class: always."""
        return True

    def attend(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        values: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        inputs: MixerInputs,
        past: State,
    ) -> tuple[torch.Tensor, State, State]:
        """See the base class. State: as in mixers/ops/hedgehog.py."""
        options, geometry = self.options, self.geometry
        turned = self.turn(q, k, rotary)
        mapped = self.features(*(turned if options.rope else (q, k)))
        logit = wide(self.window_weight)
        gamma = logit.exp() if options.mixing == "affine" else logit.sigmoid()  # w / (1 - w), or w
        if self.branches == "window":
            mapped = tuple(torch.zeros_like(part) for part in mapped)
        elif self.branches == "linear":  # a token with nothing before its window has the window still
            gamma = torch.full_like(gamma, LEAST_WEIGHT)
        heads = (*turned, values, *mapped, gamma)
        settings = (options.window, geometry.query_scale, geometry.softcap)
        state = past[: self.states] or None
        o, new = run(OP, options.form, options.chunk, *heads, *settings, where=inputs, state=state)
        return o, new, ()

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
