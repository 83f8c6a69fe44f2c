"""Sliding-window softmax attention with sinks (StreamingLLM, arXiv 2309.17453; LightTransfer, arXiv 2410.13846)."""

from __future__ import annotations

import torch

from .base import MixerInputs, State
from .heads import AttentionMixer
from .kernels import run
from .ops.window import OP
from .specs.base import Geometry
from .specs.swa import SWAOptions, SWASpec


class SWA(AttentionMixer):
    """The teacher's attention, scale and softcap included, over the last `window` and the first `sinks` tokens.

    As long as a document is no longer than the window, it is the teacher's attention itself.
    """

    spec = SWASpec
    states = 3
    options: SWAOptions

    def __init__(self, geometry: Geometry, options: SWAOptions, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        self.reset_parameters()

    def recurrence(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: keys and values, (B, K, sinks + window, d), and a count (B, 1)."""
        options, geometry = self.options, self.geometry
        settings = (options.window, geometry.query_scale, geometry.softcap, options.sinks)
        return run(OP, options.form, options.chunk, q, k, v, *settings, where=inputs, state=state)
