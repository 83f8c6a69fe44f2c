"""A causal depthwise convolution of a few taps, exact at document borders, padding and between calls."""

from __future__ import annotations

import torch

from .chunks import compute_dtype, real_segments, without_padding


def short_conv(
    x: torch.Tensor,
    taps: torch.Tensor,
    buffer: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = sum_i taps[:, K - 1 - i] x_{t - i}, over the tokens of the same document.

    Args:
        x: (B, T, channels).
        taps: (channels, K); the last one is for the token itself.
        buffer: (B, K - 1, channels), the last inputs of the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Padding stands before a sequence or after it, never inside.
        segments: (B, T) document numbers, non-decreasing.

    Returns:
        (B, T, channels) in the dtype of x, and the new buffer in fp32 (fp64 for fp64 inputs).
    """
    batch, length, channels = x.shape
    past = taps.shape[1] - 1
    dtype = compute_dtype(x.dtype)
    weights = taps.to(dtype).unbind(1)
    wide = without_padding(x.to(dtype), padding)
    before = wide.new_zeros(batch, past, channels) if buffer is None else buffer.to(dtype)
    line = torch.cat([before, wide], 1)
    out = wide * weights[past]
    real = real_segments(segments, padding)
    numbers = None if real is None else torch.cat([real[:, :1].expand(batch, past), real], 1)
    for i in range(past):
        seen = line[:, i : i + length] * weights[i]
        if numbers is not None:
            seen = seen.masked_fill((numbers[:, i : i + length] != numbers[:, past:])[..., None], 0.0)
        out = out + seen
    last = torch.arange(length, length + past, device=x.device).expand(batch, past)
    if padding is not None:
        # The last K - 1 real inputs of each row; the old buffer counts as real.
        filled = torch.cat([padding.new_ones(batch, past), padding], 1)
        places = torch.arange(length + past, device=x.device).masked_fill(~filled, -1)
        last = places.topk(past, 1).values.sort(1).values
    kept = line.gather(1, last[..., None].expand(-1, -1, channels))
    if numbers is not None:
        # Inputs of an earlier document must not reach the next call, which continues the last one.
        kept = kept.masked_fill((numbers.gather(1, last) != numbers[:, -1:])[..., None], 0.0)
    return out.to(x.dtype), kept
