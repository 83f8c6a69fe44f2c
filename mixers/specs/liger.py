"""Liger without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, GatedOptions, chunk_length, head_bytes, head_flops, head_rows, output_flops, output_rows
from .linear import linear_excess


@dataclass(frozen=True)
class LigerOptions(GatedOptions):
    """Options of `liger`."""

    chunk: int | None = option(None, "tokens per chunk; null picks by head size", choices=(None, 16, 32))
    rope: bool = option(False, "rotate the recurrence's queries and keys too; the window's always are")
    window: int = option(
        64, "tokens of the softmax window beside the recurrence; 0: none", low=0, high=65536, samples=(0, 7)
    )
    gate: str = option(
        "none",
        "output gate: 2 sigmoid(x W), one at the start; sigmoid(x W), a half at the start; or none",
        choices=("identity", "sigmoid", "none"),
    )
    out_norm: str = option(
        "none",
        "norm over each head's output: none, RMSNorm or LayerNorm (RetNet's group norm)",
        choices=("none", "rms", "group"),
    )
    normalise: bool = option(
        True, "divide the recurrence by the sum of its weights: it averages, as attention does (the paper: false)"
    )
    gate_divisor: float = option(
        16.0, "log-decays are divided by it: the larger, the longer the memory", low=1.0, high=1e4
    )


class LigerSpec(MixerSpec):
    """Gated linear attention whose decays are read from the keys, and a softmax window; nothing but the mix is new."""

    name = "liger"
    title = "Liger: gated linear attention and a window"
    paper = "https://arxiv.org/abs/2503.01496"
    options = LigerOptions
    aliases = ("liger-gla", "liger_gla")
    reads = HEADS
    kept = Floats(10.4, 1.0, 0.3)
    most = Floats(14.2, 0.7, 4.7)

    @staticmethod
    def tensors(geometry: Geometry, options: LigerOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        return head_rows(geometry, options) + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: LigerOptions) -> int:
        """Matrix products only, in the chunked form."""
        d, chunk = geometry.head_dim, chunk_length(geometry.head_dim, options.chunk)
        read = d + options.normalise
        # Per token and head: scores and their read-out inside a chunk, what is written, and what is read of the state.
        inside = 2 * chunk * (d + read) + 2 * 2 * d * read
        return head_flops(geometry, options) + output_flops(geometry, options) + geometry.num_heads * inside

    @staticmethod
    def backward_excess(geometry: Geometry, options: LigerOptions) -> int:
        """See the base class: scores are made again."""
        return linear_excess(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: LigerOptions) -> int:
        """A d x d matrix per head, one column more with `normalise`; see `head_bytes`."""
        d = geometry.head_dim
        return head_bytes(geometry, options, geometry.num_heads * d * (d + options.normalise))
