"""Options, tensors and costs that mixers on the attention's own projections share; the module is mixers/heads.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Geometry, MixerOptions, MixerSpec, TensorSpec, option


@dataclass(frozen=True)
class HeadOptions(MixerOptions):
    """Options of every mixer with the attention's projections."""

    chunk: int | None = option(None, "tokens per chunk; null picks by head size", choices=(None, 16, 32, 64))
    rope: bool = option(True, "rotate queries and keys as the attention did")
    expand_kv: bool = option(False, "give every query head keys and values of its own instead of sharing in groups")
    conv: int = option(0, "taps of a causal depthwise convolution on q, k and v; 0: none", low=0, high=8)
    qkv_bias: bool = option(
        True, "carry the biases of the attention's q, k and v projections; false leaves them behind, where it has such"
    )


@dataclass(frozen=True)
class WindowOptions(HeadOptions):
    """Options of a mixer that may have softmax attention over a short window beside its recurrence."""

    window: int = option(
        0, "tokens of a softmax window beside the recurrence, mixed per head; 0: none", low=0, high=65536, samples=(7,)
    )
    window_share: float = option(0.5, "share of the window's output at the start; learnt", low=0.01, high=0.99)


@dataclass(frozen=True)
class GatedOptions(WindowOptions):
    """Options of a mixer with the shared output: a norm per head and a gate."""

    gate: str = option(
        "identity",
        "output gate: 2 sigmoid(x W), one at the start; sigmoid(x W), a half at the start; silu(x W) of a random W, as "
        "GLA and Gated DeltaNet were published; or none",
        choices=("identity", "sigmoid", "silu", "none"),
    )
    out_norm: str = option(
        "none",
        "norm over each head's output: none, RMSNorm, LayerNorm (RetNet's group norm), or RMSNorm times silu of the "
        "gate (Mamba-2)",
        choices=("none", "rms", "group", "gated_rms"),
    )

    def conflicts(self) -> list[str]:
        """See the base class."""
        if self.out_norm == "gated_rms" and self.gate == "none":
            return ["out_norm: gated_rms needs the gate's projection; set gate: identity, or out_norm: rms"]
        if self.out_norm == "gated_rms" and self.gate == "silu":
            return ["out_norm: gated_rms has a silu gate of its own, shifted to be one at the start; set out_norm: rms"]
        return []


@dataclass(frozen=True)
class LinearOptions(GatedOptions):
    """Options of a mixer whose recurrence takes queries and keys of any length."""

    qk_norm: str = option(
        "none",
        "what is done to queries and keys beside the teacher's own norms: nothing, or unit length",
        choices=("none", "unit"),
    )


HEADS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight")
"""What multiplies the layer input in every mixer with the attention's projections."""


def chunk_length(head_dim: int, chosen: int | None) -> int:
    """Tokens per chunk: as chosen, else the fastest as measured on CPUs (small heads like small chunks)."""
    return chosen or (16 if head_dim <= 16 else 32)


def _kv_size(geometry: Geometry, options: HeadOptions) -> int:
    return geometry.inner_size if options.expand_kv else geometry.kv_size


def head_rows(geometry: Geometry, options: HeadOptions) -> list[TensorSpec]:
    """The rows that a mixer takes from attention, projections with their biases and q/k norms, and the convolution.

    Args:
        geometry: of the attention being replaced.
        options: with `expand_kv`, keys and values are derived by repeating each head's rows.
    """
    hidden, inner, kv = geometry.hidden_size, geometry.inner_size, _kv_size(geometry, options)
    grouped = geometry.num_kv_heads != geometry.num_heads

    def row(name: str, shape: tuple[int, ...]) -> TensorSpec:
        repeats = options.expand_kv and grouped and name[0] in "kv"
        return TensorSpec(name, shape, "derived" if repeats else "copied", f"repeat_heads({name})" if repeats else name)

    rows = []
    for part, width in (("q", inner), ("k", kv), ("v", kv)):
        rows.append(row(f"{part}_proj.weight", (width, hidden)))
        if geometry.qkv_bias and options.qkv_bias:
            rows.append(row(f"{part}_proj.bias", (width,)))
    rows.append(row("o_proj.weight", (hidden, inner)))
    if geometry.o_bias:
        rows.append(row("o_proj.bias", (hidden,)))
    if geometry.qk_norm == "head":
        rows += [TensorSpec(f"{p}_norm.weight", (geometry.head_dim,), "copied", f"{p}_norm.weight") for p in "qk"]
    if geometry.qk_norm == "full":
        rows += [row("q_norm.weight", (inner,)), row("k_norm.weight", (kv,))]
    if options.conv:
        origin = "identity: 1 at the token itself, 0 before it"
        rows.append(TensorSpec("conv", (inner + 2 * kv, options.conv), "new", origin))
    return rows


def window_rows(geometry: Geometry, options: WindowOptions) -> list[TensorSpec]:
    """The row of the window's share, where there is a window."""
    if not options.window:
        return []
    return [TensorSpec("window_mix", (geometry.num_heads,), "new", f"logit of {options.window_share:g}", fp32=True)]


def output_rows(geometry: Geometry, options: GatedOptions) -> list[TensorSpec]:
    """The rows of the window, the gate and the output norm."""
    inner, rows = geometry.inner_size, window_rows(geometry, options)
    if options.gate != "none":
        start = {
            "identity": "0: the gate is 1",
            "sigmoid": "0: the gate is a half",
            "silu": "normal of standard deviation D^(-1/2)",
        }[options.gate]
        start = "0: the gate is 1" if options.out_norm == "gated_rms" else start
        rows.append(TensorSpec("g_proj.weight", (inner, geometry.hidden_size), "new", start))
    if options.out_norm in ("rms", "gated_rms"):
        rows.append(TensorSpec("out_norm.weight", (geometry.head_dim,), "new", "1"))
    if options.out_norm == "group":
        rows.append(TensorSpec("out_norm.weight", (inner,), "new", "1"))
        rows.append(TensorSpec("out_norm.bias", (inner,), "new", "0"))
    return rows


def head_flops(geometry: Geometry, options: HeadOptions) -> int:
    """Forward FLOPs per token of the q, k, v and o projections (a multiply-add counts two)."""
    return 2 * geometry.hidden_size * (2 * geometry.inner_size + 2 * _kv_size(geometry, options))


def output_flops(geometry: Geometry, options: GatedOptions) -> int:
    """Forward FLOPs per token of the gate's projection and of the window."""
    gate = 0 if options.gate == "none" else 2 * geometry.hidden_size * geometry.inner_size
    return gate + window_flops(geometry, options.window)


def window_block(window: int, chunk: int | None) -> int:
    """Queries per block of softmax attention over a window: as chosen, else as mixers/ops/window.py does."""
    return chunk or min(max(window // 2, 32), 128)


def window_flops(geometry: Geometry, window: int, sinks: int = 0, chunk: int | None = None) -> int:
    """Forward FLOPs per token of scores and read-out, in the blocks that mixers/ops/window.py cuts of long rows."""
    if not window:
        return 0
    block = window_block(window, chunk)
    keys = block * (1 + -(-(window - 1) // block)) + sinks
    return geometry.num_heads * 4 * keys * geometry.head_dim


def activations(spec: type[MixerSpec], geometry: Geometry, options: Any) -> tuple[int, int]:
    """Floats per token that training a layer takes: kept from forward to backward, and the most of it alone."""
    chunk = chunk_length(geometry.head_dim, getattr(options, "chunk", None))
    kept, most = spec.kept.total(geometry, chunk), spec.most.total(geometry, chunk)
    if window := getattr(options, "window", 0):
        block = window_block(window, getattr(options, "chunk", None) if spec.softmax else None)
        blocks = 1 + -(-(window - 1) // block)
        scores = geometry.num_heads * (block * blocks + getattr(options, "sinks", 0))
        kept, most = (
            floats + per_score * scores + per_copy * blocks * geometry.kv_size
            for floats, (per_score, per_copy) in zip((kept, most), spec.near, strict=True)
        )
    return round(kept), round(most)


def window_numbers(geometry: Geometry, options: HeadOptions, window: int, sinks: int = 0) -> int:
    """Numbers in a window's state: keys, values and a count."""
    return 2 * (window + sinks) * _kv_size(geometry, options) + 1 if window else 0


def head_bytes(geometry: Geometry, options: HeadOptions, *states: int) -> int:
    """Bytes of what one sequence carries in one layer: fp32 states of so many numbers each, and the convolution's taps.

    Args:
        geometry: of the attention being replaced.
        options: of the mixer; a window beside the recurrence is counted too.
        states: numbers in each state tensor; without any, one d x d matrix per head.
    """
    numbers = sum(states) if states else geometry.num_heads * geometry.head_dim**2
    numbers += max(0, options.conv - 1) * (geometry.inner_size + 2 * _kv_size(geometry, options))
    if isinstance(options, WindowOptions):
        numbers += window_numbers(geometry, options, options.window)
    return 4 * numbers
