"""xLSTM's matrix memory without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, LinearOptions, chunk_length, head_bytes, head_flops, head_rows, output_flops, output_rows
from .linear import linear_excess


@dataclass(frozen=True)
class MLSTMOptions(LinearOptions):
    """Options of `mlstm`."""

    qk_norm: str = option(
        "unit",
        "what is done to queries and keys beside the teacher's own norms: nothing, or unit length",
        choices=("none", "unit"),
    )
    half_life_min: float = option(2.0, "tokens after which the fastest head has forgotten half", low=1.0, high=1e6)
    half_life_max: float = option(1024.0, "tokens after which the slowest head has forgotten half", low=1.0, high=1e7)
    input_gate: float = option(-2.0, "log of the input gate at the start", low=-15.0, high=0.0)


class MLSTMSpec(MixerSpec):
    """Linear attention with an exponential input gate, a forget gate and a normaliser, on the attention's heads."""

    name = "mlstm"
    title = "mLSTM (xLSTM's matrix memory)"
    paper = "https://arxiv.org/abs/2405.04517"
    options = MLSTMOptions
    aliases = ("xlstm", "m-lstm", "matrix-lstm")
    reads = (*HEADS, "i_proj.weight", "f_proj.weight")
    kept = Floats(8.7, 1.2, 0.1, 0.7)
    most = Floats(8.3, 1.1, 6.1, 0.9)

    @staticmethod
    def tensors(geometry: Geometry, options: MLSTMOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        hidden, heads = geometry.hidden_size, geometry.num_heads
        span = f"{options.half_life_min:g} to {options.half_life_max:g} tokens"
        rows = head_rows(geometry, options)
        rows += [
            TensorSpec("i_proj.weight", (heads, hidden), "new", "0: the input gate does not depend on the token yet"),
            TensorSpec("i_bias", (heads,), "new", f"{options.input_gate:g}", fp32=True),
            TensorSpec("f_proj.weight", (heads, hidden), "new", "0: the forget gate does not depend on the token yet"),
            TensorSpec("f_bias", (heads,), "new", f"half-lives log-uniform over heads, {span}", fp32=True),
        ]
        return rows + output_rows(geometry, options)

    @staticmethod
    def flops_per_token(geometry: Geometry, options: MLSTMOptions) -> int:
        """Matrix products only, in the chunked form."""
        d, heads = geometry.head_dim, geometry.num_heads
        chunk = chunk_length(d, options.chunk)
        flops = head_flops(geometry, options) + output_flops(geometry, options) + 2 * geometry.hidden_size * 2 * heads
        # Per token and head: scores and what they read; what is written; reads of the state and of the normaliser.
        return flops + heads * (4 * chunk * d + 2 * d * d + 2 * d * d + 2 * d)

    @staticmethod
    def backward_excess(geometry: Geometry, options: MLSTMOptions) -> int:
        """See `linear_excess`."""
        return linear_excess(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: MLSTMOptions) -> int:
        """See `head_bytes`: memory, normaliser and stabiliser."""
        d, heads = geometry.head_dim, geometry.num_heads
        return head_bytes(geometry, options, heads * d * d, heads * d, heads)
