"""Mamba-2 without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, LinearOptions, head_bytes, head_rows, output_rows
from .linear import linear_excess, linear_flops, linear_rows


@dataclass(frozen=True)
class Mamba2Options(LinearOptions):
    """Options of `mamba2`."""

    qk_norm: str = option(
        "unit",
        "what is done to C and B (queries and keys) beside the teacher's own norms: nothing, or unit length",
        choices=("none", "unit"),
    )
    discrete: bool = option(
        False, "MOHAWK's variant: the log-decay is projected directly, and what is written is not scaled by a step dt"
    )
    start: str = option(
        "spread",
        "first values of dt and A: A = 1 and half-lives spread over heads, or Mamba-2's own random ones",
        choices=("spread", "paper"),
    )
    half_life_min: float = option(2.0, "tokens after which the fastest head has forgotten half", low=1.0, high=1e6)
    half_life_max: float = option(256.0, "tokens after which the slowest head has forgotten half", low=1.0, high=1e7)
    skip: float = option(
        0.0, "D at the start: what a token's own value adds to its output (Mamba-2: 1)", low=0.0, high=1.0
    )

    def conflicts(self) -> list[str]:
        """See the base class."""
        both = self.discrete and self.start == "paper"
        return [*super().conflicts(), *(["start: paper says dt and A, which discrete: true has not"] if both else [])]


class Mamba2Spec(MixerSpec):
    """Mamba-2's state-space recurrence on the attention's projections: x is v, B is k, C is q."""

    name = "mamba2"
    title = "Mamba-2"
    paper = "https://arxiv.org/abs/2405.21060"
    options = Mamba2Options
    aliases = ("mamba-2", "ssd", "mohawk")
    reads = (*HEADS, "a_proj.weight", "dt_proj.weight")
    kept = Floats(11.4, 0.0, 0.5, 0.6)
    most = Floats(11.8, 0.0, 6.3, 0.6)

    @staticmethod
    def tensors(geometry: Geometry, options: Mamba2Options, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        hidden, heads = geometry.hidden_size, geometry.num_heads
        span = f"half-lives log-uniform over heads, {options.half_life_min:g} to {options.half_life_max:g} tokens"
        still = "0: decay does not depend on the token yet"
        rows = head_rows(geometry, options)
        if options.discrete:
            rows += linear_rows(geometry, options, "(1 - decay)")
            rows += [
                TensorSpec("a_proj.weight", (heads, hidden), "new", still),
                TensorSpec("a_bias", (heads,), "new", span, fp32=True),
            ]
        else:
            paper = options.start == "paper"
            step = "dt log-uniform from 0.001 to 0.1" if paper else span
            rows += linear_rows(geometry, options)
            rows += [
                TensorSpec("dt_proj.weight", (heads, hidden), "new", still),
                TensorSpec("dt_bias", (heads,), "new", step, fp32=True),
                TensorSpec("A_log", (heads,), "new", "log of uniform 1 to 16" if paper else "0", fp32=True),
            ]
        rows.append(TensorSpec("D", (heads,), "new", f"{options.skip:g}", fp32=True))
        return rows + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: Mamba2Options) -> int:
        """Matrix products only, in the chunked form."""
        return linear_flops(geometry, options) + 2 * geometry.hidden_size * geometry.num_heads

    @staticmethod
    def backward_excess(geometry: Geometry, options: Mamba2Options) -> int:
        """See `linear_excess`."""
        return linear_excess(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: Mamba2Options) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
