"""Gated DeltaNet without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .deltanet import DeltaOptions, delta_excess, delta_flops, delta_rows
from .heads import HEADS, head_bytes, head_rows, output_rows


@dataclass(frozen=True)
class GatedDeltaNetOptions(DeltaOptions):
    """Options of `gated_deltanet`."""

    activation: str = option(
        "none",
        "what queries, keys and values pass after projection and convolution: nothing, or silu (the paper)",
        choices=("none", "silu"),
    )
    beta_bias: bool = option(True, "the write strength has a bias, which `beta` sets (the paper: false)")
    half_life_min: float = option(2.0, "tokens after which the fastest head has forgotten half", low=1.0, high=1e6)
    half_life_max: float = option(1024.0, "tokens after which the slowest head has forgotten half", low=1.0, high=1e7)


class GatedDeltaNetSpec(MixerSpec):
    """Gated delta rule with one decay per head, on the attention's own queries, keys and values."""

    name = "gated_deltanet"
    title = "Gated DeltaNet"
    paper = "https://arxiv.org/abs/2412.06464"
    options = GatedDeltaNetOptions
    aliases = ("gdn", "gated-deltanet", "gated_delta_net")
    reads = (*HEADS, "a_proj.weight", "b_proj.weight")
    kept = Floats(11.2, 1.4, 0.1, 0.5)
    most = Floats(11.3, 3.1, 4.9, 1.3)

    @staticmethod
    def tensors(geometry: Geometry, options: GatedDeltaNetOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        heads = geometry.num_heads
        span = f"{options.half_life_min:g} to {options.half_life_max:g} tokens"
        origin = "0: decay does not depend on the token yet"
        rows = head_rows(geometry, options)
        rows += [
            TensorSpec("a_proj.weight", (heads, geometry.hidden_size), "new", origin),
            TensorSpec("A_log", (heads,), "new", "0", fp32=True),
            TensorSpec("dt_bias", (heads,), "new", f"half-lives log-uniform over heads, {span}", fp32=True),
        ]
        strength = [row for row in delta_rows(geometry, options) if options.beta_bias or row.name != "b_proj.bias"]
        return rows + strength + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: GatedDeltaNetOptions) -> int:
        """Matrix products only, in the chunked form."""
        return delta_flops(geometry, options) + 2 * geometry.hidden_size * geometry.num_heads

    @staticmethod
    def backward_excess(geometry: Geometry, options: GatedDeltaNetOptions) -> int:
        """See `delta_excess`."""
        return delta_excess(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: GatedDeltaNetOptions) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
