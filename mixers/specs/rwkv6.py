"""RAD-RWKV6 without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, head_bytes, head_rows, output_rows
from .linear import ChannelOptions, linear_excess, linear_flops, linear_rows, span

SHIFTED = 5
"""What reads its own mix of the token and the one before: receptance, key, value, decay, gate."""


@dataclass(frozen=True)
class RWKV6Options(ChannelOptions):
    """Options of `rwkv6`."""

    token_shift: bool = option(
        True, "queries, keys, values, decay and gate each read a learnt mix of the token and the one before"
    )
    start: str = option(
        "spread",
        "decays at the start: half-lives spread over each head's channels, or the paper's ramp over all channels",
        choices=("spread", "paper"),
    )
    decay_rank: int | None = option(None, "rank of the decay's low-rank map; null: the paper's formula", low=1)
    shift_rank: int | None = option(None, "rank of the token shift's maps; null: the paper's formula", low=1)


def rank(hidden_size: int, chosen: int | None) -> int:
    """Rank of a low-rank map: as chosen, or the paper's 32 round(1.8 D^0.5 / 32) (radlads.md §2)."""
    return chosen or max(1, round(hidden_size**0.5 * 1.8 / 32)) * 32


class RWKV6Spec(MixerSpec):
    """RWKV-6's recurrence on the attention's own projections, as RADLADS converts to it."""

    name = "rwkv6"
    title = "RAD-RWKV6"
    paper = "https://arxiv.org/abs/2505.03005"
    options = RWKV6Options
    aliases = ("rwkv-6", "rad-rwkv6", "qrwkv6", "finch")
    reads = (*HEADS, "w1")
    kept = Floats(16.4, 1.4, 7.5, 0.7)
    most = Floats(18.5, 5.2, 13.9, 1.2)

    @staticmethod
    def tensors(geometry: Geometry, options: RWKV6Options, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class."""
        hidden, inner = geometry.hidden_size, geometry.inner_size
        decay, shift = rank(hidden, options.decay_rank), rank(hidden, options.shift_rank)
        ramp = f"-6 + 5 (n / (C - 1))^{0.7 + 1.3 * position:.2f} over channels n"
        rows = head_rows(geometry, options) + linear_rows(geometry, options)
        rows += [
            TensorSpec("w0", (inner,), "new", ramp if options.start == "paper" else span(options), fp32=True),
            TensorSpec("w1", (hidden, decay), "new", "0"),
            TensorSpec("w2", (decay, inner), "new", "uniform from -0.01 to 0.01"),
        ]
        if options.token_shift:
            rows += [
                TensorSpec("mu_x", (hidden,), "new", "1: the maps read the token before"),
                TensorSpec("mu", (SHIFTED, hidden), "new", "0: no shift"),
                TensorSpec("mu1", (hidden, SHIFTED * shift), "new", "0"),
                TensorSpec("mu2", (SHIFTED, shift, hidden), "new", "uniform from -0.01 to 0.01"),
            ]
        return rows + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: RWKV6Options) -> int:
        """Matrix products only, in the chunked form."""
        hidden = geometry.hidden_size
        flops = linear_flops(geometry, options) + 2 * rank(hidden, options.decay_rank) * (hidden + geometry.inner_size)
        if options.token_shift:
            flops += 4 * SHIFTED * hidden * rank(hidden, options.shift_rank)
        return flops

    @staticmethod
    def backward_excess(geometry: Geometry, options: RWKV6Options) -> int:
        """See `linear_excess`."""
        return linear_excess(geometry, options)

    @classmethod
    def input_flops(cls, geometry: Geometry, options: RWKV6Options) -> int:
        """See the base class: with the token shift, whose mix is learnt, nothing reads the layer input as it is."""
        return 0 if options.token_shift else super().input_flops(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: RWKV6Options) -> int:
        """See `head_bytes`; the token shift adds the last layer input."""
        return head_bytes(geometry, options) + (4 * geometry.hidden_size if options.token_shift else 0)
