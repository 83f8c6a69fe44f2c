"""Liger (arXiv 2503.01496): gated linear attention whose gates are the attention's own keys, and a softmax window."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid, pad

from .base import MixerInputs, State
from .heads import AttentionMixer, wide
from .kernels import run
from .ops.gla import OP
from .specs.base import Geometry
from .specs.heads import chunk_length
from .specs.liger import LigerOptions, LigerSpec

LOG_DECAY_FLOOR = -5.0
"""One step keeps at least 0.7 % of a channel: what the chunked forms allow. Reached at keys below -80."""

LEAST_WEIGHT = 1e-6
"""Added to the sum of weights, which softmaxes of far-apart queries and keys let underflow."""


class Liger(AttentionMixer):
    """S_t = diag(e^{g_t}) S_{t-1} + softmax(k) v^T, o_t = S_t^T softmax(q), g = log sigmoid(k) / 16, and a window.

    With `normalise` o_t is divided by what it would be if every v were 1. Exact equations:
    docs/reference/mixers/liger.md.
    """

    spec = LigerSpec
    options: LigerOptions

    def __init__(self, geometry: Geometry, options: LigerOptions, layer_idx: int, num_layers: int, first: bool) -> None:
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
        """See the base class. State: (B, H, d, d), one column more with `normalise`."""
        k = wide(k)
        g = (logsigmoid(k) / self.options.gate_divisor).clamp(min=LOG_DECAY_FLOOR)
        if self.options.normalise:
            v = pad(v, (0, 1), value=1.0)
        heads = (wide(q).softmax(-1), *(self.repeat(part) for part in (k.softmax(-1), v, g)))
        chunk = chunk_length(self.geometry.head_dim, self.options.chunk)
        o, new = run(OP, self.options.form, chunk, *heads, where=inputs, state=state)
        if self.options.normalise:
            o = wide(o)
            o = o[..., :-1] / (o[..., -1:] + LEAST_WEIGHT)
        return o, new
