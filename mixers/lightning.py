"""Lightning attention (arXiv 2401.04658), as HALO (arXiv 2601.22156) puts it in the place of attention."""

from __future__ import annotations

import torch

from .linear import LinearAttention
from .ops.chunks import compute_dtype
from .ops.simple_gla import OP
from .specs.base import Geometry
from .specs.lightning import LightningOptions, LightningSpec

LEAST_SHARE = 2.0**-12
"""RetNet's slowest heads hardly forget: none counts a token less than an average over 4096 would."""


class Lightning(LinearAttention):
    """S_t = gamma_h S_{t-1} + (1 - gamma_h) k v^T, o_t = q_scale S_t^T q, with unit k and q.

    Exact equations and initial values: docs/reference/mixers/lightning.md.
    """

    spec = LightningSpec
    op = OP
    options: LightningOptions

    def __init__(
        self, geometry: Geometry, options: LightningOptions, layer_idx: int, num_layers: int, first: bool
    ) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        self.reset_parameters()

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """See the base class: (H,), the same at every token."""
        dtype = compute_dtype(x.dtype)
        return fixed_slopes(self.options.slopes, self.geometry.num_heads, x.device).to(dtype)

    def write(self, x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return k * (-torch.expm1(g)).clamp(min=LEAST_SHARE)[:, None] if self.options.balance else k


def fixed_slopes(kind: str, heads: int, device: torch.device) -> torch.Tensor:
    """Log-decays (H,) in fp64.

    ALiBi's are -2^(-8 i / P), i from 1 to P, for the highest power of two P <= H; the other heads take every second
    one of those for 2 P, from the first on.
    """
    h = torch.arange(heads, device=device, dtype=torch.float64)
    if kind == "retnet":
        return torch.log1p(-torch.exp2(-5 - h))
    power = 2 ** (heads.bit_length() - 1)
    exponent = torch.where(h < power, (h + 1) / power, (2 * (h - power) + 1) / (2 * power))
    return -torch.exp2(-8 * exponent)
