"""HGRN-2 without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, head_bytes, head_rows, output_rows
from .linear import ChannelOptions, linear_excess, linear_flops, linear_rows, span


@dataclass(frozen=True)
class HGRN2Options(ChannelOptions):
    """Options of `hgrn2`."""

    out_norm: str = option(
        "none",
        "norm over each head's output: none, RMSNorm (the paper's), or LayerNorm",
        choices=("none", "rms", "group"),
    )
    lower_bound: str = option(
        "none",
        "least that a forget gate keeps: nothing, or layer / layers, where the paper's learnt bounds begin",
        choices=("none", "depth"),
    )


class HGRN2Spec(MixerSpec):
    """Linear attention whose input gate is what the forget gate leaves."""

    name = "hgrn2"
    title = "HGRN-2"
    paper = "https://arxiv.org/abs/2404.07904"
    options = HGRN2Options
    aliases = ("hgrn-2", "hgrn")
    reads = (*HEADS, "f_proj.weight")
    kept = Floats(16.2, 1.2, 0.2, 0.7)
    most = Floats(17.3, 2.0, 4.9, 1.2)

    @staticmethod
    def tensors(geometry: Geometry, options: HGRN2Options, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        hidden, inner = geometry.hidden_size, geometry.inner_size
        rows = head_rows(geometry, options) + linear_rows(geometry, options)
        bound = "" if options.lower_bound == "none" else ", as far as the lower bound lets"
        rows += [
            TensorSpec("f_proj.weight", (inner, hidden), "new", "0: the forget gate does not depend on the token yet"),
            TensorSpec("f_bias", (inner,), "new", span(options) + bound, fp32=True),
        ]
        return rows + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: HGRN2Options) -> int:
        """Matrix products only, in the chunked form."""
        return linear_flops(geometry, options) + 2 * geometry.hidden_size * geometry.inner_size

    @staticmethod
    def backward_excess(geometry: Geometry, options: HGRN2Options) -> int:
        """See `linear_excess`."""
        return linear_excess(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: HGRN2Options) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
