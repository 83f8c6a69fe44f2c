"""Titans' linear memory without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .deltanet import DeltaOptions, delta_flops, delta_rows
from .heads import HEADS, chunk_length, head_bytes, head_rows, output_rows


@dataclass(frozen=True)
class TitansOptions(DeltaOptions):
    """Options of `titans`."""

    beta: float = option(
        0.15, "write strength at the start; the step size is (1 - max_momentum) of it", low=0.01, high=0.99
    )
    max_momentum: float = option(0.5, "bound of the momentum, which is half of it at the start", low=0.01, high=0.95)
    half_life_min: float = option(2.0, "tokens after which the fastest head has forgotten half", low=1.0, high=1e6)
    half_life_max: float = option(1024.0, "tokens after which the slowest head has forgotten half", low=1.0, high=1e7)


class TitansSpec(MixerSpec):
    """Linear neural memory that learns by gradient descent with momentum and forgetting, on the attention's heads."""

    name = "titans"
    title = "Titans (linear neural memory)"
    paper = "https://arxiv.org/abs/2501.00663"
    options = TitansOptions
    aliases = ("titans-lmm", "neural-memory", "lmm")
    reads = (*HEADS, "a_proj.weight", "b_proj.weight", "e_proj.weight")
    kept = Floats(10.3, 1.3, 0.1, 1.5)
    most = Floats(11.3, 7.7, 3.3, 2.8)

    @staticmethod
    def tensors(geometry: Geometry, options: TitansOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        hidden, heads = geometry.hidden_size, geometry.num_heads
        span = f"{options.half_life_min:g} to {options.half_life_max:g} tokens"
        rows = head_rows(geometry, options) + delta_rows(geometry, options)
        rows += [
            TensorSpec("e_proj.weight", (heads, hidden), "new", "0: momentum does not depend on the token yet"),
            TensorSpec("e_bias", (heads,), "new", f"0: momentum is {options.max_momentum / 2:g}", fp32=True),
            TensorSpec("a_proj.weight", (heads, hidden), "new", "0: forgetting does not depend on the token yet"),
            TensorSpec("a_bias", (heads,), "new", f"half-lives log-uniform over heads, {span}", fp32=True),
        ]
        return rows + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: TitansOptions) -> int:
        """Matrix products only, in the chunked form."""
        d, heads = geometry.head_dim, geometry.num_heads
        chunk = chunk_length(d, options.chunk)
        gates = 2 * geometry.hidden_size * 2 * heads
        # Per head: sums of log-gates between tokens, products of the gates; both states instead of one.
        weights = 6 * chunk * chunk + 2 * chunk
        states = 4 * chunk * d + 6 * d * d + 8 * d * d // chunk
        return delta_flops(geometry, options) + gates + heads * (weights + states)

    @staticmethod
    def backward_excess(geometry: Geometry, options: TitansOptions) -> int:
        """See the base class: scores, and what the weights need of both states, are made again."""
        d, chunk = geometry.head_dim, chunk_length(geometry.head_dim, options.chunk)
        return geometry.num_heads * (2 * chunk * d + 8 * d * d - 8 * d * d // chunk + 6 * chunk)

    @staticmethod
    def state_bytes(geometry: Geometry, options: TitansOptions) -> int:
        """See `head_bytes`: the memory and its momentum."""
        size = geometry.num_heads * geometry.head_dim**2
        return head_bytes(geometry, options, size, size)
