"""Gated DeltaNet without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import (
    Geometry,
    MixerOptions,
    MixerSpec,
    TensorSpec,
    attention_flops,
    attention_rows,
    chunk_length,
    option,
    recurrent_bytes,
)


@dataclass(frozen=True)
class GatedDeltaNetOptions(MixerOptions):
    """Options of `gated_deltanet`."""

    chunk: int | None = option(None, "tokens per chunk; null picks by head size", choices=(None, 16, 32, 64))
    rope: bool = option(True, "rotate queries and keys as the attention did")
    expand_kv: bool = option(False, "give every query head keys and values of its own instead of sharing in groups")
    unit_q: bool = option(True, "normalise queries to unit length; keys always are")
    gate: bool = option(True, "output gate 2 sigmoid(x W), one at the start")
    out_norm: str = option("none", "norm over each head's output", choices=("none", "rms"))
    conv: int = option(0, "taps of a causal depthwise convolution on q, k and v; 0: none", low=0, high=8)
    beta: float = option(0.2, "write strength at the start", low=0.01, high=0.99)
    half_life_min: float = option(2.0, "tokens after which the fastest head has forgotten half", low=1.0, high=1e6)
    half_life_max: float = option(1024.0, "tokens after which the slowest head has forgotten half", low=1.0, high=1e7)


class GatedDeltaNetSpec(MixerSpec):
    """Gated delta rule with one decay per head, on the attention's own queries, keys and values."""

    name = "gated_deltanet"
    title = "Gated DeltaNet"
    paper = "https://arxiv.org/abs/2412.06464"
    options = GatedDeltaNetOptions
    aliases = ("gdn", "gated-deltanet", "gated_delta_net")

    @staticmethod
    def tensors(geometry: Geometry, options: GatedDeltaNetOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        hidden, heads, inner = geometry.hidden_size, geometry.num_heads, geometry.inner_size
        span = f"{options.half_life_min:g} to {options.half_life_max:g} tokens"
        rows = attention_rows(geometry, expand_kv=options.expand_kv, conv=options.conv)
        rows += [
            TensorSpec("a_proj.weight", (heads, hidden), "new", "0: decay does not depend on the token yet"),
            TensorSpec("A_log", (heads,), "new", "0", fp32=True),
            TensorSpec("dt_bias", (heads,), "new", f"half-lives log-uniform over heads, {span}", fp32=True),
            TensorSpec("b_proj.weight", (heads, hidden), "new", "0: write strength does not depend on the token yet"),
            TensorSpec("b_proj.bias", (heads,), "new", f"logit of {options.beta:g}"),
        ]
        if options.out_norm == "none":
            rows.append(TensorSpec("q_scale", (heads,), "new", "1", fp32=True))
        if options.gate:
            rows.append(TensorSpec("g_proj.weight", (inner, hidden), "new", "0: gate is 1"))
        if options.out_norm == "rms":
            rows.append(TensorSpec("out_norm.weight", (geometry.head_dim,), "new", "1"))
        return rows

    @staticmethod
    def flops_per_token(geometry: Geometry, options: GatedDeltaNetOptions) -> int:
        """Matrix products only, in the chunked form."""
        d, heads = geometry.head_dim, geometry.num_heads
        chunk = chunk_length(d, options.chunk)
        flops = attention_flops(geometry, expand_kv=options.expand_kv) + 2 * geometry.hidden_size * 2 * heads
        if options.gate:
            flops += 2 * geometry.hidden_size * geometry.inner_size
        # Per token and head: scores, solve (half a square), writes, reads inside; reads of the state, scan over chunks.
        inside = 2 * chunk * 2 * d + chunk * 2 * d + 2 * d * 2 * d + 2 * chunk * 2 * d
        return flops + heads * (inside + 2 * d * d + 2 * d**3 // chunk)

    @staticmethod
    def state_bytes(geometry: Geometry, options: GatedDeltaNetOptions) -> int:
        """See `recurrent_bytes`."""
        return recurrent_bytes(geometry, expand_kv=options.expand_kv, conv=options.conv)
