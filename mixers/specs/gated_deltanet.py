"""Gated DeltaNet without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Geometry, MixerSpec, TensorSpec, option
from .heads import GatedOptions, chunk_length, head_bytes, head_flops, head_rows, output_flops, output_rows


@dataclass(frozen=True)
class GatedDeltaNetOptions(GatedOptions):
    """Options of `gated_deltanet`."""

    unit_q: bool = option(True, "normalise queries to unit length; keys always are")
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
        hidden, heads = geometry.hidden_size, geometry.num_heads
        span = f"{options.half_life_min:g} to {options.half_life_max:g} tokens"
        rows = head_rows(geometry, options)
        rows += [
            TensorSpec("a_proj.weight", (heads, hidden), "new", "0: decay does not depend on the token yet"),
            TensorSpec("A_log", (heads,), "new", "0", fp32=True),
            TensorSpec("dt_bias", (heads,), "new", f"half-lives log-uniform over heads, {span}", fp32=True),
            TensorSpec("b_proj.weight", (heads, hidden), "new", "0: write strength does not depend on the token yet"),
            TensorSpec("b_proj.bias", (heads,), "new", f"logit of {options.beta:g}"),
        ]
        if options.out_norm == "none":
            rows.append(TensorSpec("q_scale", (heads,), "new", "1", fp32=True))
        return rows + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: GatedDeltaNetOptions) -> int:
        """Matrix products only, in the chunked form."""
        d, heads = geometry.head_dim, geometry.num_heads
        chunk = chunk_length(d, options.chunk)
        flops = head_flops(geometry, options) + output_flops(geometry, options) + 2 * geometry.hidden_size * 2 * heads
        # Per token and head: scores, solve (half a square), writes, reads inside; reads of the state, scan over chunks.
        inside = 2 * chunk * 2 * d + chunk * 2 * d + 2 * d * 2 * d + 2 * chunk * 2 * d
        return flops + heads * (inside + 2 * d * d + 2 * d**3 // chunk)

    @staticmethod
    def state_bytes(geometry: Geometry, options: GatedDeltaNetOptions) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
