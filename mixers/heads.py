"""What a mixer keeps of the attention it replaces: projections, q/k norms, rotary embedding, grouped heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Mixer, MixerInputs, State
from .ops.chunks import compute_dtype
from .ops.short_conv import short_conv
from .specs.base import Geometry


class HeadNorm(nn.Module):
    """RMSNorm over the channels of one head, in fp32 as transformers' Qwen3RMSNorm does it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., dim) in the dtype of x."""
        full = wide(x)
        full = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * full.to(x.dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of the recurrence: fp32, or fp64 for fp64."""
    return x.to(compute_dtype(x.dtype))


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding in transformers' rotate-half convention.

    Args:
        x: (B, T, H, d).
        rotary: cos and sin, (B or 1, T, r) with r <= d; channels from r on are left as they are.
    """
    cos, sin = (part.unsqueeze(2).to(x.dtype) for part in rotary)
    size = cos.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return turned if rest is None else torch.cat([turned, rest], -1)


def unit(x: torch.Tensor) -> torch.Tensor:
    """fp32 vectors of length one along the last dimension (shorter than one only where x is about 1e-3 or less)."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class AttentionMixer(Mixer):
    """A mixer with the projections of the attention it replaces, under their own names."""

    def __init__(self, geometry: Geometry, options: Any, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        kv_size = geometry.inner_size if options.expand_kv else geometry.kv_size
        self.q_proj = nn.Linear(geometry.hidden_size, geometry.inner_size, bias=geometry.qkv_bias)
        self.k_proj = nn.Linear(geometry.hidden_size, kv_size, bias=geometry.qkv_bias)
        self.v_proj = nn.Linear(geometry.hidden_size, kv_size, bias=geometry.qkv_bias)
        self.o_proj = nn.Linear(geometry.inner_size, geometry.hidden_size, bias=geometry.o_bias)
        self.q_norm = HeadNorm(geometry.head_dim, geometry.norm_eps) if geometry.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(geometry.head_dim, geometry.norm_eps) if geometry.qk_norm else nn.Identity()
        if options.conv:
            self.conv = nn.Parameter(torch.empty(geometry.inner_size + 2 * kv_size, options.conv))

    def project(
        self, x: torch.Tensor, inputs: MixerInputs, state: State | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, State]:
        """Queries (B, T, H * d), keys and values (B, T, K * d), K being the key/value heads, through the convolution.

        Args:
            x: (B, T, D) layer input.
            inputs: padding and document borders.
            state: of the mixer; the convolution's last inputs are its second tensor.

        Returns:
            Queries, keys, values, and what the convolution carries on: one tensor, or none without `conv`.
        """
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.options.conv:
            return *parts, ()
        before = state[1] if state else None
        mixed, buffer = short_conv(torch.cat(parts, -1), self.conv, before, inputs.padding, inputs.segments)
        q, k, v = mixed.split([part.shape[-1] for part in parts], -1)
        return q, k, v, (buffer,)

    def heads(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split into heads, (B, T, H or K, d), and normalise and rotate queries and keys as the attention did.

        Raises:
            ValueError: the attention was rotary and `rotary` is None.
        """
        q, k, v = (part.unflatten(-1, (-1, self.geometry.head_dim)) for part in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.geometry.rope and self.options.rope:
            if rotary is None:
                raise ValueError(
                    f"layer {self.layer_idx}: rope is on but the model gave no position_embeddings; set rope: false"
                )
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, K, ...) -> (B, T, H, ...): each key/value head serves its group of query heads, in their order."""
        group = self.geometry.num_heads // x.shape[2]
        if group == 1:
            return x
        return x.unsqueeze(3).expand(*x.shape[:3], group, *x.shape[3:]).flatten(2, 3)
