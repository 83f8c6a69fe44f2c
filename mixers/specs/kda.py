"""Kimi delta attention without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .deltanet import DeltaOptions, delta_flops, delta_rows
from .heads import HEADS, chunk_length, head_bytes, head_rows, output_rows


@dataclass(frozen=True)
class KDAOptions(DeltaOptions):
    """Options of `kda`."""

    chunk: int | None = option(None, "tokens per chunk; null picks by head size", choices=(None, 16, 32))
    beta: float = option(0.1, "write strength at the start", low=0.01, high=0.99)
    decay_rank: int | None = option(None, "rank of the decay's projection; null: channels per head", low=1, high=4096)
    half_life_min: float = option(2.0, "tokens after which the fastest decay has halved", low=0.2, high=1e6)
    half_life_max: float = option(1024.0, "tokens after which the slowest decay has halved", low=0.2, high=1e7)


class KDASpec(MixerSpec):
    """Gated delta rule with one decay per channel, on the attention's own queries, keys and values."""

    name = "kda"
    title = "Kimi delta attention"
    paper = "https://arxiv.org/abs/2510.26692"
    options = KDAOptions
    aliases = ("kimi", "kimi-delta-attention", "kimi_delta_attention")
    reads = (*HEADS, "f_a_proj.weight", "b_proj.weight")
    kept = Floats(14.0, 1.5, 0.2, 0.6)
    most = Floats(16.0, 6.2, 3.4, 1.4)

    @staticmethod
    def tensors(geometry: Geometry, options: KDAOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        inner, rank = geometry.inner_size, options.decay_rank or geometry.head_dim
        span = f"{options.half_life_min:g} to {options.half_life_max:g} tokens"
        rows = head_rows(geometry, options)
        rows += [
            TensorSpec("f_a_proj.weight", (rank, geometry.hidden_size), "new", "orthogonal"),
            TensorSpec("f_b_proj.weight", (inner, rank), "new", "0: decay does not depend on the token yet"),
            TensorSpec("A_log", (geometry.num_heads,), "new", "0", fp32=True),
            TensorSpec("dt_bias", (inner,), "new", f"half-lives log-uniform over all channels, {span}", fp32=True),
        ]
        return rows + delta_rows(geometry, options) + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: KDAOptions) -> int:
        """Matrix products only, in the chunked form."""
        rank, chunk = options.decay_rank or geometry.head_dim, chunk_length(geometry.head_dim, options.chunk)
        # The decay's projection; what a chunk's inverse makes of the keys that read the state.
        flops = 2 * rank * (geometry.hidden_size + geometry.inner_size) + 2 * chunk * geometry.inner_size
        return delta_flops(geometry, options) + flops

    @staticmethod
    def backward_excess(geometry: Geometry, options: KDAOptions) -> int:
        """See the base class: scores and what keys read in the state are made again; the inverse is kept."""
        d, chunk = geometry.head_dim, chunk_length(geometry.head_dim, options.chunk)
        return geometry.num_heads * (6 * chunk * d + 4 * d * d - 2 * chunk * chunk)

    @staticmethod
    def state_bytes(geometry: Geometry, options: KDAOptions) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
