"""Lightning attention without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, LinearOptions, head_bytes, head_rows, output_rows
from .linear import linear_excess, linear_flops, linear_rows


@dataclass(frozen=True)
class LightningOptions(LinearOptions):
    """Options of `lightning`."""

    qk_norm: str = option(
        "unit",
        "what is done to queries and keys beside the teacher's own norms: nothing, or unit length",
        choices=("none", "unit"),
    )
    slopes: str = option(
        "halo",
        "log-decay of head h of H: -2^(-8 h / H) from h = 1 (ALiBi's, as in HALO), or log(1 - 2^(-5 - h)) from h = 0 "
        "(RetNet's)",
        choices=("halo", "retnet"),
    )
    balance: bool = option(
        True, "write k (1 - decay), at least k / 4096: what is read is an average over tokens, not a sum"
    )


class LightningSpec(MixerSpec):
    """Linear attention with one fixed decay per head: nothing to learn but the projections."""

    name = "lightning"
    title = "Lightning attention"
    paper = "https://arxiv.org/abs/2601.22156"
    options = LightningOptions
    aliases = ("lightning-attention", "lightning_attention", "retnet", "halo")
    reads = HEADS
    kept = Floats(9.1, 1.1, 0.1, 0.9)
    most = Floats(9.3, 1.0, 6.0, 0.9)

    @staticmethod
    def tensors(geometry: Geometry, options: LightningOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same; decays are no parameters."""
        return head_rows(geometry, options) + linear_rows(geometry, options) + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: LightningOptions) -> int:
        """Matrix products only, in the chunked form."""
        return linear_flops(geometry, options)

    @staticmethod
    def backward_excess(geometry: Geometry, options: LightningOptions) -> int:
        """See `linear_excess`."""
        return linear_excess(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: LightningOptions) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
