"""RAD-RWKV7 without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, WindowOptions, chunk_length, head_bytes, head_flops, head_rows, window_flops, window_rows


@dataclass(frozen=True)
class RWKV7Options(WindowOptions):
    """Options of `rwkv7`."""

    balance_state: bool = option(True, "write k (1 - w + a), as much as decay and removal take (the paper's mixer)")
    unit_keys: bool = option(True, "receptance and write key of unit length, times a learnt scale (the paper: false)")
    group_norm: bool = option(False, "normalise each head's output (the released code; unstable from 14B upwards)")
    value_residual: bool = option(True, "mix in the values of the lowest converted layer")
    value_start: float = option(
        -4.0, "v0 at the start: sigmoid(v0) of the value comes from there (the paper: 1)", low=-6.0, high=6.0
    )
    removal: float = option(0.05, "removal strength a at the start (the paper: 0.5)", low=0.01, high=0.99)
    gate_init: str = option(
        "identity",
        "output gate at the start: one everywhere, or the paper's small random values",
        choices=("identity", "paper"),
    )
    decay_rank: int | None = option(None, "rank of the decay's low-rank map; null: the paper's formula", low=1)
    removal_rank: int | None = option(None, "rank of the removal strength's map; null: the paper's formula", low=1)
    value_rank: int | None = option(None, "rank of the value residual's map; null: the paper's formula", low=1)
    gate_rank: int | None = option(None, "rank of the gate's map; null: the paper's formula", low=1)


def ranks(hidden_size: int, options: RWKV7Options) -> dict[str, int]:
    """Ranks by map: `w` decay, `a` removal, `v` value residual, `g` gate (radlads.md §2: 32 round(D^e m / 32))."""

    def formula(exponent: float, factor: float) -> int:
        return max(1, round(hidden_size**exponent * factor / 32)) * 32

    return {
        "w": options.decay_rank or formula(0.5, 1.8),
        "a": options.removal_rank or formula(0.5, 1.8),
        "v": options.value_rank or formula(0.5, 1.3),
        "g": options.gate_rank or formula(0.8, 0.6),
    }


class RWKV7Spec(MixerSpec):
    """RWKV-7's recurrence on the attention's own projections, as RADLADS converts to it."""

    name = "rwkv7"
    title = "RAD-RWKV7"
    paper = "https://arxiv.org/abs/2505.03005"
    options = RWKV7Options
    aliases = ("rwkv-7", "rad-rwkv7", "qrwkv7", "goose")
    reads = (*HEADS, "w1", "a1", "v1", "g1")
    kept = Floats(20.0, 0.5, 0.3, 0.7)
    most = Floats(27.4, 10.9, 1.5, 1.6)

    @staticmethod
    def tensors(geometry: Geometry, options: RWKV7Options, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. The first layer has no value residual."""
        hidden, inner = geometry.hidden_size, geometry.inner_size
        rank = ranks(hidden, options)

        def low_rank(name: str, down: str, up: str) -> list[TensorSpec]:
            shapes = (hidden, rank[name]), (rank[name], inner)
            return [
                TensorSpec(f"{name}{i}", shape, "new", origin)
                for i, shape, origin in zip((1, 2), shapes, (down, up), strict=True)
            ]

        ramp = f"-6.5 + 5 (n / (C - 1))^{0.85 + position**0.5:.2f} over channels n"
        rows = head_rows(geometry, options) + window_rows(geometry, options)
        rows.append(TensorSpec("w0", (inner,), "new", ramp, fp32=True))
        rows += low_rank("w", "0", "orthogonal, 0.1")
        rows.append(TensorSpec("a0", (inner,), "new", f"logit of {options.removal:g}"))
        rows += low_rank("a", "0", "orthogonal, 0.1")
        if options.value_residual and not first:
            rows.append(TensorSpec("v0", (inner,), "new", f"{options.value_start:g}"))
            rows += low_rank("v", "0", "orthogonal, 0.1")
        if options.gate_init == "identity":
            rows.append(TensorSpec("g0", (inner,), "new", "1"))
            rows += low_rank("g", "orthogonal, 1", "0")
        else:
            rows += low_rank("g", "0", "orthogonal, 0.1")
        if options.unit_keys:
            rows.append(TensorSpec("r_scale", (geometry.num_heads,), "new", "1", fp32=True))
        if not options.balance_state:
            rows += [TensorSpec("k_k", (inner,), "new", "0.85"), TensorSpec("k_a", (inner,), "new", "1")]
        if options.group_norm:
            rows += [TensorSpec("ln_x.weight", (inner,), "new", "1"), TensorSpec("ln_x.bias", (inner,), "new", "0")]
        return rows

    @staticmethod
    def flops_per_token(geometry: Geometry, options: RWKV7Options) -> int:
        """Matrix products only, in the chunked form, of a layer with value residual where that is on."""
        d, heads = geometry.head_dim, geometry.num_heads
        chunk = chunk_length(d, options.chunk)
        rank = ranks(geometry.hidden_size, options)
        if not options.value_residual:
            rank.pop("v")
        flops = head_flops(geometry, options) + window_flops(geometry, options.window)
        flops += sum(2 * r * (geometry.hidden_size + geometry.inner_size) for r in rank.values())
        # Per token and head: scores of kappa and r with what is removed and written; a chunk's inverse; what kappa
        # reads inside, what the inverse makes of it, what r reads inside; what the state is read for and takes up.
        return flops + heads * (8 * chunk * d + chunk * chunk + 8 * chunk * d + 8 * d * d)

    @staticmethod
    def backward_excess(geometry: Geometry, options: RWKV7Options) -> int:
        """See the base class: scores, and products inside chunks, are made again; the inverse is kept."""
        heads, d, chunk = geometry.num_heads, geometry.head_dim, chunk_length(geometry.head_dim, options.chunk)
        return heads * (8 * chunk * d - 2 * chunk * chunk)

    @staticmethod
    def state_bytes(geometry: Geometry, options: RWKV7Options) -> int:
        """See `head_bytes`."""
        return head_bytes(geometry, options)
