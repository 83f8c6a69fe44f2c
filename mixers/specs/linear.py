"""What mixers with a linear state and no removal have in common: S_t = decay S_{t-1} + k v^T, o = S^T q."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Geometry, TensorSpec, option
from .heads import GatedOptions, LinearOptions, chunk_length, head_flops, output_flops


@dataclass(frozen=True)
class ChannelOptions(LinearOptions):
    """Options of a mixer that decays each channel of the key by itself."""

    chunk: int | None = option(None, "tokens per chunk; null picks by head size", choices=(None, 16, 32))
    qk_norm: str = option(
        "unit",
        "what is done to queries and keys beside the teacher's own norms: nothing, or unit length",
        choices=("none", "unit"),
    )
    half_life_min: float = option(
        2.0, "tokens after which a head's fastest channel has forgotten half", low=1.0, high=1e6
    )
    half_life_max: float = option(
        256.0, "tokens after which a head's slowest channel has forgotten half", low=1.0, high=1e7
    )


def span(options: ChannelOptions) -> str:
    """The decays' first values in words."""
    low, high = options.half_life_min, options.half_life_max
    return f"half-lives log-uniform over the channels of a head, {low:g} to {high:g} tokens"


def linear_rows(geometry: Geometry, options: LinearOptions, share: str = "") -> list[TensorSpec]:
    """The row of the queries' scale, which an output norm would undo.

    Unit vectors of d channels that have nothing to do with each other have products of about d^-1/2: times d^1/2 they
    are spread as an untrained attention's scores are.

    Args:
        geometry: of the attention being replaced.
        options: of the mixer.
        share: what else the first value is multiplied by, in words.
    """
    if options.out_norm != "none":
        return []
    start = "d^(1/2)" if options.qk_norm == "unit" else "1"
    start = f"{start} {share}" if share else start
    return [TensorSpec("q_scale", (geometry.num_heads,), "new", start, fp32=True)]


def linear_flops(geometry: Geometry, options: LinearOptions) -> int:
    """Forward FLOPs per token of projections, gate and recurrence, without those of decays: chunked form."""
    d = geometry.head_dim
    # Per token and head: scores and reads inside the chunk; writes to the state and reads of it.
    inside = 4 * chunk_length(d, options.chunk) * d + 4 * d * d
    return head_flops(geometry, options) + output_flops(geometry, options) + geometry.num_heads * inside


def linear_excess(geometry: Geometry, options: GatedOptions) -> int:
    """What the backward pass costs beyond twice the forward: the scores inside chunks are made again."""
    return geometry.num_heads * 2 * chunk_length(geometry.head_dim, options.chunk) * geometry.head_dim
