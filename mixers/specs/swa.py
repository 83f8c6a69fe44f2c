"""Sliding-window attention with sinks, without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, HeadOptions, head_bytes, head_flops, head_rows, window_flops, window_numbers


@dataclass(frozen=True)
class SWAOptions(HeadOptions):
    """Options of `swa`."""

    chunk: int | None = option(None, "queries per block; null picks by the window", choices=(None, 32, 64, 128))
    window: int = option(256, "tokens that a token sees, itself included", low=1, high=65536, samples=(7,))
    sinks: int = option(4, "first tokens of a document that all its tokens see", low=0, high=1024, samples=(0,))


class SWASpec(MixerSpec):
    """The teacher's own softmax attention over the last tokens and the first ones. Nothing in it is new."""

    name = "swa"
    title = "Sliding-window attention with sinks"
    paper = "https://arxiv.org/abs/2309.17453"
    options = SWAOptions
    aliases = ("sliding-window", "sliding_window", "streaming-llm", "lighttransfer")
    reads = HEADS
    kept = Floats(2.1, 0.8)
    near = (1.0, 2.5), (4.0, 1.5)
    most = Floats(1.1, 0.5, 1.0)
    softmax = True

    @staticmethod
    def reach(options: SWAOptions) -> int | None:
        """The window's; with sinks a document's first tokens reach everywhere."""
        return None if options.sinks else options.window - 1

    @staticmethod
    def tensors(geometry: Geometry, options: SWAOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        return head_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: SWAOptions) -> int:
        """Matrix products only, in rows longer than the window."""
        window = window_flops(geometry, options.window, options.sinks, options.chunk)
        return head_flops(geometry, options) + window

    @staticmethod
    def state_bytes(geometry: Geometry, options: SWAOptions) -> int:
        """Keys and values of window and sinks, a count, and the convolution's taps."""
        return head_bytes(geometry, options, window_numbers(geometry, options, options.window, options.sinks))
