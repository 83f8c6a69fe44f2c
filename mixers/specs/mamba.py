"""Mamba without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, LinearOptions, head_bytes, head_flops, head_rows, output_flops, output_rows

STATE = 16
"""Mamba's own state size."""


@dataclass(frozen=True)
class MambaOptions(LinearOptions):
    """Options of `mamba`."""

    qk_norm: str = option(
        "unit",
        "what is done to C and B (queries and keys), group by group, beside the teacher's own norms: nothing, or unit "
        "length",
        choices=("none", "unit"),
    )
    state: int | None = option(
        None,
        "numbers of state per channel: channels of a group, into which each head is cut; divides the head's, null "
        "takes the largest such up to 16",
        low=1,
        high=1024,
        samples=(2,),
    )
    dt_rank: int | None = option(
        None, "rank of the step's projection; null: a sixteenth of the width", low=1, high=4096
    )
    start: str = option(
        "spread",
        "first values of dt and A: A = 1 and half-lives spread over channels, or Mamba's own: A = 1 to N, dt random",
        choices=("spread", "paper"),
    )
    half_life_min: float = option(2.0, "tokens after which the fastest channel has forgotten half", low=1.0, high=1e6)
    half_life_max: float = option(256.0, "tokens after which the slowest channel has forgotten half", low=1.0, high=1e7)
    skip: float = option(
        0.0, "D at the start: what a token's own value adds to its output (Mamba: 1)", low=0.0, high=1.0
    )


def group_size(geometry: Geometry, options: MambaOptions) -> int:
    """N: channels of a group, and numbers of state per channel."""
    if options.state is not None:
        return options.state
    return max(n for n in divisors(geometry.head_dim) if n <= STATE)


def divisors(n: int) -> list[int]:
    """Of a positive number, rising."""
    return [m for m in range(1, n + 1) if n % m == 0]


class MambaSpec(MixerSpec):
    """Mamba's selective scan on the attention's projections: x is v, B is k, C is q."""

    name = "mamba"
    title = "Mamba"
    paper = "https://arxiv.org/abs/2312.00752"
    options = MambaOptions
    aliases = ("mamba1", "mamba-1", "s6", "mamba-in-the-llama")
    reads = (*HEADS, "dt_in_proj.weight")
    kept = Floats(11.5, 1.1, 0.0, 0.1)
    most = Floats(14.1, 5.6, 3.4, 0.5)

    @staticmethod
    def refusal(geometry: Geometry, options: MambaOptions) -> str | None:
        """A head must be whole groups."""
        d = geometry.head_dim
        if d % group_size(geometry, options) == 0:
            return None
        fitting = ", ".join(map(str, divisors(d)))
        return f"state {options.state} does not divide the head's {d} channels; take one of {fitting}, or null"

    @staticmethod
    def no_matrix(options: MambaOptions) -> str | None:
        """See the base class."""
        return "every channel of a head decays, and so mixes, at its own rate"

    @staticmethod
    def tensors(geometry: Geometry, options: MambaOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        inner, rank, size = geometry.inner_size, dt_rank(geometry, options), group_size(geometry, options)
        paper = options.start == "paper"
        span = (
            f"half-lives log-uniform over all channels, {options.half_life_min:g} to {options.half_life_max:g} tokens"
        )
        rows = head_rows(geometry, options)
        if options.out_norm == "none":
            start = "N^(1/2)" if options.qk_norm == "unit" else "1"
            rows.append(TensorSpec("q_scale", (geometry.num_heads,), "new", start, fp32=True))
        rows += [
            TensorSpec("dt_in_proj.weight", (rank, geometry.hidden_size), "new", "orthogonal"),
            TensorSpec("dt_proj.weight", (inner, rank), "new", "0: the step does not depend on the token yet"),
            TensorSpec("dt_bias", (inner,), "new", "dt log-uniform from 0.001 to 0.1" if paper else span, fp32=True),
            TensorSpec("A_log", (inner, size), "new", "log of 1 to N" if paper else "0", fp32=True),
            TensorSpec("D", (inner,), "new", f"{options.skip:g}", fp32=True),
        ]
        return rows + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: MambaOptions) -> int:
        """Matrix products only: beside the projections just the read-out, as the scan goes element by element."""
        inner, rank = geometry.inner_size, dt_rank(geometry, options)
        flops = head_flops(geometry, options) + output_flops(geometry, options)
        return flops + 2 * rank * (geometry.hidden_size + inner) + 2 * inner * group_size(geometry, options)

    @staticmethod
    def backward_excess(geometry: Geometry, options: MambaOptions) -> int:
        """See the base class: the states are made again, and read once more."""
        return 2 * geometry.inner_size * group_size(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: MambaOptions) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options, geometry.inner_size * group_size(geometry, options))


def dt_rank(geometry: Geometry, options: MambaOptions) -> int:
    """Rank of the step's projection."""
    return options.dt_rank or -(-geometry.hidden_size // 16)
