"""No mixing at all in the place of attention, for ablations: what is a layer worth without its view of other tokens?"""

from __future__ import annotations

import torch
from torch import nn

from .base import Mixer, MixerInputs, State
from .specs.base import Geometry
from .specs.identity import IdentityOptions, IdentitySpec


class Identity(Mixer):
    """out = Wo Wv x, each query head reading its own group's values: attention whose every token sees itself only.

    With `skip` zero, and no parameters.
    """

    spec = IdentitySpec
    options: IdentityOptions

    def __init__(
        self, geometry: Geometry, options: IdentityOptions, layer_idx: int, num_layers: int, first: bool
    ) -> None:
        super().__init__(geometry, options, layer_idx, num_layers, first)
        if not options.skip:
            self.v_proj = nn.Linear(geometry.hidden_size, geometry.kv_size, bias=geometry.qkv_bias)
            self.o_proj = nn.Linear(geometry.inner_size, geometry.hidden_size, bias=geometry.o_bias)
        self.reset_parameters()

    def mix(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """See the base class. There is no state."""
        if self.options.skip:
            return torch.zeros_like(x), ()
        geometry = self.geometry
        group = geometry.num_heads // geometry.num_kv_heads
        v = self.v_proj(x).unflatten(-1, (geometry.num_kv_heads, 1, geometry.head_dim))
        return self.o_proj(v.expand(*v.shape[:3], group, geometry.head_dim).flatten(2)), ()
