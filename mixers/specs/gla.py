"""Gated linear attention without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, head_bytes, head_rows, output_rows
from .linear import ChannelOptions, linear_excess, linear_flops, linear_rows, span


@dataclass(frozen=True)
class GLAOptions(ChannelOptions):
    """Options of `gla`."""

    decay_rank: int = option(16, "rank of the decay's map from the layer input", low=1, samples=(3,))
    temperature: float = option(
        1.0, "the log-decay is a log sigmoid divided by this (the paper: 16)", low=1.0, high=64.0
    )
    balance: bool = option(True, "write k (1 - decay), as much as the state forgets, so that its size stays")


class GLASpec(MixerSpec):
    """Linear attention with a decay per channel of the key and token."""

    name = "gla"
    title = "Gated linear attention"
    paper = "https://arxiv.org/abs/2312.06635"
    options = GLAOptions
    aliases = ("gated-linear-attention", "gated_linear_attention")
    reads = (*HEADS, "gk_down.weight")
    kept = Floats(16.2, 1.2, 0.2, 0.7)
    most = Floats(17.3, 2.0, 4.9, 1.2)

    @staticmethod
    def tensors(geometry: Geometry, options: GLAOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        hidden, inner, rank = geometry.hidden_size, geometry.inner_size, options.decay_rank
        rows = head_rows(geometry, options) + linear_rows(geometry, options)
        rows += [
            TensorSpec("gk_down.weight", (rank, hidden), "new", "normal of standard deviation D^(-1/2)"),
            TensorSpec("gk_up.weight", (inner, rank), "new", "0: decay does not depend on the token yet"),
            TensorSpec("gk_bias", (inner,), "new", span(options), fp32=True),
        ]
        return rows + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: GLAOptions) -> int:
        """Matrix products only, in the chunked form."""
        decay = 2 * options.decay_rank * (geometry.hidden_size + geometry.inner_size)
        return linear_flops(geometry, options) + decay

    @staticmethod
    def backward_excess(geometry: Geometry, options: GLAOptions) -> int:
        """See `linear_excess`."""
        return linear_excess(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: GLAOptions) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
