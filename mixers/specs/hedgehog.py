"""LoLCATs' Hedgehog attention without torch: options, tensors, FLOPs, state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerSpec, TensorSpec, option
from .heads import HEADS, HeadOptions, head_bytes, head_flops, head_rows, window_block, window_flops, window_numbers


@dataclass(frozen=True)
class HedgehogOptions(HeadOptions):
    """Options of `hedgehog`."""

    chunk: int | None = option(None, "queries per block; null picks by the window", choices=(None, 32, 64, 128))
    rope: bool = option(True, "read features off rotated queries and keys; the window's are always as attention's")
    window: int = option(64, "tokens that softmax attention sees, itself included", low=1, high=65536, samples=(7,))
    window_weight: float = option(
        0.9,
        "weight w of the window's terms at the start; learnt (the paper: 0.1)",
        low=0.001,
        high=0.999,
    )
    mixing: str = option(
        "affine",
        "weight of the terms beyond the window: 1 - w, or 1 as in the paper, whose window never weighs more",
        choices=("affine", "paper"),
    )
    feature_map: str = option(
        "softmax",
        "features of a projected query or key y: softmax over channels of y and of -y (Hedgehog), or ReLU of y plus a "
        "bias (T2R)",
        choices=("softmax", "relu"),
    )
    feature_size: int | None = option(
        None, "channels of y; null: as the head, 64 at most", low=1, high=1024, samples=(3, 20)
    )
    feature_init: str = option(
        "identity",
        "feature projections at the start: the identity (Hedgehog) or uniform",
        choices=("identity", "uniform"),
    )


def feature_size(geometry: Geometry, options: HedgehogOptions) -> int:
    """Channels of a projected query or key."""
    return options.feature_size or min(geometry.head_dim, 64)


def _features(geometry: Geometry, options: HedgehogOptions) -> int:
    """Features of a query or key."""
    return (2 if options.feature_map == "softmax" else 1) * feature_size(geometry, options)


def _kv_heads(geometry: Geometry, options: HedgehogOptions) -> int:
    return geometry.num_heads if options.expand_kv else geometry.num_kv_heads


class HedgehogSpec(MixerSpec):
    """Softmax attention over a window and linear attention on learnt features before it, under one denominator."""

    name = "hedgehog"
    title = "LoLCATs: Hedgehog features and a window"
    paper = "https://arxiv.org/abs/2410.10254"
    options = HedgehogOptions
    aliases = ("lolcats", "hedgehog-swa")
    reads = HEADS
    kept = Floats(7.6, 1.9, 1.0)
    near = (1.5, 5.6), (0.9, 5.0)
    most = Floats(10.3, 1.7, 5.8)

    @staticmethod
    def tensors(geometry: Geometry, options: HedgehogOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        d, size = geometry.head_dim, feature_size(geometry, options)
        start = (
            "the identity" if options.feature_init == "identity" else f"uniform within {(6 / (d * size)) ** 0.5:.2g}"
        )
        rows = head_rows(geometry, options)
        for part, heads in (("q", geometry.num_heads), ("k", _kv_heads(geometry, options))):
            rows.append(TensorSpec(f"{part}_features", (heads, d, size), "new", start))
            if options.feature_map == "relu":
                rows.append(TensorSpec(f"{part}_features_bias", (heads, size), "new", "0"))
        origin = f"logit of {options.window_weight:g}"
        return [*rows, TensorSpec("window_weight", (geometry.num_heads,), "new", origin, fp32=True)]

    @staticmethod
    def flops_per_token(geometry: Geometry, options: HedgehogOptions) -> int:
        """Matrix products only, in rows longer than the window."""
        d, heads, features = geometry.head_dim, geometry.num_heads, _features(geometry, options)
        kv, block = _kv_heads(geometry, options), window_block(options.window, options.chunk)
        near = window_flops(geometry, options.window, 0, options.chunk)
        mapped = 2 * (heads + kv) * d * feature_size(geometry, options)
        far = heads * (2 * block * (features + d + 1) + 2 * features * (d + 1)) + kv * 2 * features * (d + 1)
        return head_flops(geometry, options) + near + mapped + far

    @staticmethod
    def backward_excess(geometry: Geometry, options: HedgehogOptions) -> int:
        """See the base class: the scores beyond the window are made again."""
        block = window_block(options.window, options.chunk)
        return geometry.num_heads * 2 * block * _features(geometry, options)

    @staticmethod
    def state_bytes(geometry: Geometry, options: HedgehogOptions) -> int:
        """Keys, values and features of the window, a count, the sums over what came before, the convolution's taps."""
        window = window_numbers(geometry, options, options.window)
        features = _features(geometry, options)
        kept = _kv_heads(geometry, options) * features * (options.window + geometry.head_dim + 1)
        return head_bytes(geometry, options, window, kept)
