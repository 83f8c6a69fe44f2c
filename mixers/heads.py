"""What a mixer keeps of the attention it replaces: projections, q/k norms, rotary embedding, grouped heads."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import layer_norm, silu

from .base import Mixer, MixerInputs, State
from .calibration import REACH, SPREAD, STRENGTH, AttentionStats, channel_rates, entropy_strength, head_rates
from .kernels import run
from .ops.chunks import compute_dtype
from .ops.window import OP as WINDOW
from .recorded import convolve
from .specs.base import Geometry, TensorSpec
from .specs.heads import GatedOptions, WindowOptions

GROUP_EPS = 1e-5
SILU_ONE = 1.2784645427610738
"""silu of this is one: a silu gate with zero weights lets everything pass."""


class HeadNorm(nn.Module):
    """RMSNorm over the last dimension, in fp32 as transformers' Qwen3RMSNorm does it.

    Args:
        dim: its size.
        eps: added to the mean square.
        offset: added to the weight (Gemma 3: 1).
    """

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., dim) in the dtype of x."""
        full = wide(x)
        full = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (full * (self.offset + wide(self.weight))).to(x.dtype)
        return self.weight * full.to(x.dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of the recurrence: fp32, or fp64 for fp64."""
    return x.to(compute_dtype(x.dtype))


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], interleaved: bool = False) -> torch.Tensor:
    """Rotary embedding in transformers' conventions.

    Args:
        x: (B, T, H, d).
        rotary: cos and sin, (B or 1, T, r) with r <= d; channels from r on are left as they are.
        interleaved: channels 2i and 2i + 1 turn together (Cohere), else i and i + r/2.
    """
    cos, sin = (part.unsqueeze(2).to(x.dtype) for part in rotary)
    size = cos.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    if interleaved:
        half = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        half = torch.cat([-second, first], -1)
    turned = turned * cos + half * sin
    return turned if rest is None else torch.cat([turned, rest], -1)


def unit(x: torch.Tensor) -> torch.Tensor:
    """fp32 vectors of length one along the last dimension (shorter than one only where x is about 1e-3 or less)."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class AttentionMixer(Mixer):
    """A mixer with the projections of the attention it replaces, under their own names.

    A subclass implements `recurrence`, between the heads that attention had and what makes the layer's output of them:
    a norm per head and a gate where the options are `GatedOptions`, then the output projection.
    """

    states: ClassVar[int] = 1
    """Tensors of the recurrence's state; after them come the convolution's last inputs, then the window's three."""
    decays: ClassVar[str] = ""
    """Whose rates of decay are parameters that do not depend on the token: "head"s, "channel"s, or none."""
    writes: ClassVar[bool] = False
    """Whether there is a write strength (or removal) of that kind."""
    branches: str = "both"
    """What of a mixer with a window counts: "both", or "window" or "linear" alone, which then has the whole weight.
    Set on an instance by ablations; state and parameters do not depend on it."""

    def __init__(self, geometry: Geometry, options: Any, layer_idx: int, num_layers: int, first: bool) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        inner, hidden = geometry.inner_size, geometry.hidden_size
        kv_size = inner if options.expand_kv else geometry.kv_size
        biases = geometry.qkv_bias and options.qkv_bias
        self.q_proj = nn.Linear(hidden, inner, bias=biases)
        self.k_proj = nn.Linear(hidden, kv_size, bias=biases)
        self.v_proj = nn.Linear(hidden, kv_size, bias=biases)
        self.o_proj = nn.Linear(inner, hidden, bias=geometry.o_bias)
        if geometry.qk_norm:
            sizes = {"head": (geometry.head_dim, geometry.head_dim), "full": (inner, kv_size)}[geometry.qk_norm]
            self.q_norm, self.k_norm = (HeadNorm(n, geometry.norm_eps, float(geometry.norm_offset)) for n in sizes)
        if options.conv:
            self.conv = nn.Parameter(torch.empty(inner + 2 * kv_size, options.conv))
        if isinstance(options, WindowOptions) and options.window:
            self.window_mix = nn.Parameter(torch.empty(geometry.num_heads))
        if isinstance(options, GatedOptions):
            if options.gate != "none":
                self.g_proj = nn.Linear(hidden, inner, bias=False)
            if options.out_norm == "group":
                self.out_norm = nn.GroupNorm(geometry.num_heads, inner, eps=GROUP_EPS)
            elif options.out_norm != "none":
                self.out_norm = HeadNorm(geometry.head_dim, geometry.norm_eps)

    def knobs(self) -> dict[str, tuple[float, ...]]:
        """See the base class: how far back the decays reach, how far a head's channels differ, the write strength."""
        found: dict[str, tuple[float, ...]] = {}
        if self.decays:
            found["reach"] = REACH
        if self.decays == "channel":
            found["spread"] = SPREAD
        if self.writes:
            found["strength"] = STRENGTH
        return found

    @torch.no_grad()
    def calibrate(self, stats: AttentionStats, knobs: dict[str, torch.Tensor]) -> None:
        """See the base class."""
        if self.decays == "head":
            self.set_rates(head_rates(stats, knobs["reach"]))
        elif self.decays == "channel":
            copies = 2 if self.geometry.rope and self.geometry.rotary == "half" and self.options.rope else 1
            count = self.rate_channels // copies
            self.set_rates(channel_rates(stats, knobs["reach"], knobs["spread"], count, copies))
        if self.writes and "strength" in knobs:
            asked = knobs["strength"]
            self.set_strength(torch.where(asked > 0, asked, entropy_strength(stats)))

    def gate_inputs(self, x: torch.Tensor) -> torch.Tensor | None:
        """What a gate that is one everywhere is nearly linear in, (..., R), from the layer input; None without such."""
        options = self.options
        open_gate = isinstance(options, GatedOptions) and options.gate == "identity" and options.out_norm != "gated_rms"
        return x if open_gate else None

    @torch.no_grad()
    def set_gates(self, slopes: torch.Tensor) -> None:
        """Have each head's output gated by about 1 + `gate_inputs` . slopes, (H, R), in place."""
        self.g_proj.weight.copy_((2 * slopes).repeat_interleave(self.geometry.head_dim, 0))  # 2 sigmoid(z) is 1 + z / 2

    @property
    def rate_channels(self) -> int:
        """Channels of a head that decay each by itself."""
        return self.geometry.head_dim

    def set_rates(self, rates: torch.Tensor) -> None:
        """Have the recurrence decay by these rates per token, (H,) or (H, rate_channels) fp64, whatever the token."""
        raise NotImplementedError

    def set_strength(self, strength: torch.Tensor) -> None:
        """Have the recurrence write, or remove, by this share, (H,) fp64 between 0 and 1, whatever the token."""
        raise NotImplementedError

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class: the rows that specs/heads.py adds, and zeros for any other."""
        value = torch.zeros(row.shape)
        if row.name == "conv":
            value[:, -1] = 1.0
        elif row.name == "out_norm.weight":
            value.fill_(1.0)
        elif row.name == "g_proj.weight" and self.options.gate == "silu":
            value.normal_(0.0, row.shape[1] ** -0.5, generator=generator)
        elif row.name == "window_mix":
            value.fill_(math.log(self.options.window_share / (1 - self.options.window_share)))
        return value

    def recurrence(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """Mix tokens, head by head.

        Args:
            x: (B, T, D) layer input, for decays and gates.
            q: (B, T, H, d) queries as attention would score them, but for its scale.
            k: (B, T, K, d) keys; K is H with `expand_kv`. `repeat` gives every query head its own.
            v: (B, T, K or H, n) what `values` gives, n = d; any n gives n columns of the output.
            inputs: padding, document borders and shared values.
            state: the first `states` tensors of the mixer's state, None at the start.

        Returns:
            (B, T, H, n) and the new state.
        """
        raise NotImplementedError

    def mix(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. State: the recurrence's tensors, the convolution's last inputs, the window's three."""
        past = state or ()
        q, k, v, buffers = self.project(x, inputs, past[self.states] if past and self.options.conv else None)
        o, new, ring = self.attend(x, q, k, v, self.values(x, v, inputs), rotary, inputs, past)
        return self.output(x, o), (*new, *buffers, *ring)

    def values(self, x: torch.Tensor, v: torch.Tensor, inputs: MixerInputs) -> torch.Tensor:
        """What the recurrence mixes, (B, T, K or H, d), from values (B, T, K, d) and layer input: the former as is."""
        return v

    def attend(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        values: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        inputs: MixerInputs,
        past: State,
    ) -> tuple[torch.Tensor, State, State]:
        """The heads' outputs, (B, T, H, d), by recurrence and window, and the new states of the two.

        Args:
            x: layer input.
            q, k: as `project` gives them, not yet rotated.
            v: what the window mixes, (B, T, K, d).
            values: what the recurrence mixes, (B, T, K or H, d).
            rotary, inputs: see `mix`.
            past: the mixer's state, empty at the start.
        """
        options = self.options
        turned = self.turn(q, k, rotary) if options.rope else (q, k)
        o, new = self.recurrence(x, *turned, values, inputs, past[: self.states] or None)
        if not (isinstance(options, WindowOptions) and options.window):
            return o, new, ()
        seen = turned if options.rope else self.turn(q, k, rotary)
        near, ring = self.window(*seen, v, inputs, past[-3:] or None)
        return self.blend(near, o), new, ring

    def matrix(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, inputs: MixerInputs
    ) -> torch.Tensor:
        """See the base class: recurrence and window on one-hot values, token s giving the s-th column."""
        self.require_matrix()
        q, k, _, _ = self.project(x, inputs, None)
        batch, length, heads = k.shape[:3]
        tokens = torch.eye(length, dtype=compute_dtype(q.dtype), device=q.device)
        tokens = tokens[:, None].expand(batch, length, heads, length)
        return self.attend(x, q, k, tokens, tokens, rotary, inputs, ())[0].transpose(1, 2)

    def window(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: MixerInputs, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """What the teacher's softmax attention would give over the last `options.window` tokens, (B, T, H, d)."""
        geometry, form = self.geometry, self.options.form
        settings = (self.options.window, geometry.query_scale, geometry.softcap, 0)
        form = "auto" if form == "fused" else form
        return run(WINDOW, form, None, q, k, v, *settings, where=inputs, state=state)

    def blend(self, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        """The window's output and the recurrence's, both (B, T, H, d), by the share that each head has learnt."""
        if self.branches == "both":
            return far + self.window_mix.sigmoid()[:, None] * (wide(near) - far)
        return wide(near) if self.branches == "window" else far

    @property
    def has_branches(self) -> bool:
        """There is a window beside the linear part."""
        return bool(isinstance(self.options, WindowOptions) and self.options.window)

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The bare projections to queries, keys and values, (B, T, heads * d), of the layer input."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        """What a mixer makes of queries, keys and values alike, (B, T, heads * d), before norms: nothing, here."""
        return x

    def project(
        self, x: torch.Tensor, inputs: MixerInputs, taps: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, State]:
        """Queries (B, T, H, d), keys and values (B, T, K, d), through convolution and norms, not yet rotated.

        Args:
            x: (B, T, D) layer input.
            inputs: padding and document borders.
            taps: the convolution's last inputs, None at the start.

        Returns:
            Queries, keys, values, and what the convolution carries on: one tensor, or none without `conv`.
        """
        parts, buffers = self.projected(x), ()
        if self.options.conv:
            sizes = [part.shape[-1] for part in parts]
            mixed, buffer = convolve(torch.cat(parts, -1), self.conv, taps, inputs)
            parts, buffers = mixed.split(sizes, -1), (buffer,)
        q, k, v = map(self.activated, parts)
        if self.geometry.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.geometry.head_dim)) for part in (q, k, v))
        if self.geometry.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, buffers

    def turn(
        self, q: torch.Tensor, k: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, (B, T, heads, d), rotated as the attention did.

        Raises:
            ValueError: the attention was rotary and `rotary` is None.
        """
        if not self.geometry.rope:
            return q, k
        if rotary is None:
            raise ValueError(
                f"layer {self.layer_idx}: rope is on but the model gave no position_embeddings; set rope: false"
            )
        interleaved = self.geometry.rotary == "interleaved"
        return rotate(q, rotary, interleaved), rotate(k, rotary, interleaved)

    def scaled(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys for a recurrence that takes any length (`LinearOptions`): unit, or queries by the scale."""
        if self.options.qk_norm == "unit":
            return unit(q), unit(k)
        return wide(q) * self.geometry.query_scale, k

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, K, ...) -> (B, T, H, ...): each key/value head serves its group of query heads, in their order."""
        group = self.geometry.num_heads // x.shape[2]
        if group == 1:
            return x
        return x.unsqueeze(3).expand(*x.shape[:3], group, *x.shape[3:]).flatten(2, 3)

    def output(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """The layer output, (B, T, D), from the heads' outputs (B, T, H, d): norm and gate, if any, and projection."""
        if not isinstance(self.options, GatedOptions):
            return self.o_proj(o.flatten(2).to(x.dtype))
        kind = self.options.out_norm
        if kind == "group":
            norm: Any = self.out_norm
            flat = layer_norm(wide(o), o.shape[-1:], eps=GROUP_EPS).flatten(2)
            o = (flat * wide(norm.weight) + wide(norm.bias)).view_as(o)
        elif kind != "none":
            o = self.out_norm(o)
        o = o.flatten(2).to(x.dtype)
        if self.options.gate != "none":
            gate = self.g_proj(x)
            if kind == "gated_rms":
                o = o * silu(gate + SILU_ONE)
            elif self.options.gate == "silu":
                o = o * silu(gate)
            else:
                o = o * (gate.sigmoid() * (2 if self.options.gate == "identity" else 1))
        return self.o_proj(o)
