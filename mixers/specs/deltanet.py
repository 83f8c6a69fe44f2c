"""DeltaNet without torch, and what all mixers with its write have in common: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, GatedOptions, chunk_length, head_bytes, head_flops, head_rows, output_flops, output_rows


@dataclass(frozen=True)
class DeltaOptions(GatedOptions):
    """Options of every mixer that writes by the delta rule."""

    unit_q: bool = option(True, "normalise queries to unit length; keys always are")
    beta: float = option(0.2, "write strength at the start", low=0.01, high=0.99)


@dataclass(frozen=True)
class DeltaNetOptions(DeltaOptions):
    """Options of `deltanet`."""

    beta: float = option(0.1, "write strength at the start", low=0.01, high=0.99)


def delta_rows(geometry: Geometry, options: DeltaOptions) -> list[TensorSpec]:
    """The rows of the write strength and of the queries' scale."""
    hidden, heads = geometry.hidden_size, geometry.num_heads
    rows = [
        TensorSpec("b_proj.weight", (heads, hidden), "new", "0: write strength does not depend on the token yet"),
        TensorSpec("b_proj.bias", (heads,), "new", f"logit of {options.beta:g}"),
    ]
    if options.out_norm == "none":
        rows.append(TensorSpec("q_scale", (heads,), "new", "1", fp32=True))
    return rows


def delta_flops(geometry: Geometry, options: DeltaOptions) -> int:
    """Forward FLOPs per token of projections and recurrence, without those of decays: matrix products, chunked form."""
    d, heads = geometry.head_dim, geometry.num_heads
    chunk = chunk_length(d, options.chunk)
    flops = head_flops(geometry, options) + output_flops(geometry, options) + 2 * geometry.hidden_size * heads
    # Per token and head: scores of k and q, a chunk's inverse and what it makes of values, reads inside; what the
    # state recalls, what is written to it, what is read of it.
    return flops + heads * (4 * chunk * d + chunk * chunk + 4 * chunk * d + 6 * d * d)


def delta_excess(geometry: Geometry, options: DeltaOptions) -> int:
    """What the backward pass costs beyond twice the forward: scores are made again; the chunks' inverses are kept."""
    d, chunk = geometry.head_dim, chunk_length(geometry.head_dim, options.chunk)
    return geometry.num_heads * (2 * chunk * d - 2 * chunk * chunk)


class DeltaNetSpec(MixerSpec):
    """The delta rule without decay, on the attention's own queries, keys and values."""

    name = "deltanet"
    title = "DeltaNet"
    paper = "https://arxiv.org/abs/2406.06484"
    options = DeltaNetOptions
    aliases = ("delta-net", "delta_net", "delta")
    reads = (*HEADS, "b_proj.weight")
    kept = Floats(11.0, 1.4, 0.2, 0.5)
    most = Floats(11.2, 2.4, 5.4, 1.1)

    @staticmethod
    def tensors(geometry: Geometry, options: DeltaNetOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        return head_rows(geometry, options) + delta_rows(geometry, options) + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: DeltaNetOptions) -> int:
        """Matrix products only, in the chunked form."""
        return delta_flops(geometry, options)

    @staticmethod
    def backward_excess(geometry: Geometry, options: DeltaNetOptions) -> int:
        """See `delta_excess`."""
        return delta_excess(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: DeltaNetOptions) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
