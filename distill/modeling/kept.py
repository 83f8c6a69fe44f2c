"""Layers that keep their attention, changed: without rotary embedding, with sharper scores far out, with a window."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import create_sliding_window_causal_mask

from .cache import CACHE
from .config import config_view

_NAME = __name__.replace(".", "_")
"""Of `_attend` among transformers' attention functions; one of its own for every copy of this file."""


class KeptAttention(NamedTuple):
    """What is changed in kept attention layers; as it stands here, nothing.

    Attributes:
        rope: False takes the rotary embedding away (NoPE).
        logit_scale: a: scores of the query at position t are multiplied by log_a(t + a), which is 1 at t = 0
            (HALO, arXiv 2601.22156). None leaves them.
        window: a token sees so many tokens, itself included; a layer whose own window is smaller keeps that.
    """

    rope: bool = True
    logit_scale: float | None = None
    window: int | None = None


class KeptInputs(NamedTuple):
    """What one forward gives to every kept attention layer.

    Attributes:
        scale: (B or 1, T) fp32 factors of the queries' scores, or None.
        masks: by window, in the form that the attention implementation takes.
    """

    scale: torch.Tensor | None
    masks: dict[int, Any]


def kept_attention(config: Any) -> KeptAttention | None:
    """What a student's config changes in kept attention layers, None for nothing."""
    options = KeptAttention(**(config.kept_attention or {}))
    return None if options == KeptAttention() else options


def windows_of(config: Any, kept: list[int], options: KeptAttention | None) -> dict[int, int]:
    """The window of every kept layer, where there is one to set: the smaller of its own and the option's."""
    if options is None or options.window is None:
        return {}
    slides = [config.attention_types[layer] == "sliding_attention" for layer in kept]
    return {
        layer: min(options.window, config.sliding_window) if own else options.window
        for layer, own in zip(kept, slides, strict=True)
    }


def change_attention(modules: dict[int, nn.Module], options: KeptAttention, windows: dict[int, int]) -> None:
    """Have the attention modules of kept layers follow the options (in place).

    Args:
        modules: layer -> transformers' own attention module.
        options: see there.
        windows: as from `windows_of`.
    """
    for layer, module in modules.items():
        if not options.rope:
            module.register_forward_pre_hook(_without_rotation, with_kwargs=True)
        if options.logit_scale is not None or layer in windows:
            AttentionInterface.register(_NAME, _attend)
            module.window = windows.get(layer)  # pyright: ignore[reportArgumentType]
            module.config = config_view(module.config, _attn_implementation=_NAME)


def kept_inputs(
    config: Any,
    options: KeptAttention,
    windows: dict[int, int],
    given: torch.Tensor,
    dtype: torch.dtype,
    attention_mask: Any,
    cache: Any,
    position_ids: torch.Tensor | None,
    places: torch.Tensor,
) -> KeptInputs:
    """Factors and masks of one forward.

    Args:
        config: of the model.
        options: see there.
        windows: as from `windows_of`.
        given: (B, T, ...) tokens or embeddings.
        dtype: of the hidden states.
        attention_mask: (B, all tokens) as given to the model, or None.
        cache: its layers in place, or None.
        position_ids: as given to the model.
        places: (1, T), the positions of these tokens where nobody says otherwise.

    Raises:
        ValueError: a mask that is made already cannot be given another window.
    """
    if windows and attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.ndim != 2):
        raise ValueError("this model's attention has windows of its own: give a mask of shape (batch, tokens), or none")
    positions = places if position_ids is None else position_ids
    masks = {}
    for layer, window in windows.items():
        if window not in masks:
            masks[window] = create_sliding_window_causal_mask(
                config=config_view(config, sliding_window=window),
                inputs_embeds=torch.empty((*given.shape[:2], 0), dtype=dtype, device=given.device),
                attention_mask=attention_mask,
                position_ids=positions,
                layer_idx=layer,
                **{CACHE: cache},
            )
    scale = None
    if options.logit_scale is not None:
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            positions = (attention_mask.long().cumsum(-1) - 1)[:, -given.shape[1] :]
        scale = torch.log(positions.clamp(min=0).float() + options.logit_scale) / math.log(options.logit_scale)
    return KeptInputs(scale, masks)


def _without_rotation(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A rotation by nothing, whichever channels the family turns together."""
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """The attention function that the model was told to use, on scaled queries (B, H, T, d) and under its own mask."""
    inputs: KeptInputs = kwargs.pop("kept_inputs")
    if inputs.scale is not None:
        query = (query * inputs.scale[:, None, :, None]).to(query.dtype)
    if module.window is not None:
        attention_mask, kwargs["sliding_window"] = inputs.masks[module.window], module.window
    view = module.config
    # Implementations ask the module's config which of them they are.
    module.config = config_view(view, _attn_implementation=view._attn_implementation_internal)
    try:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        attend = AttentionInterface().get_interface(module.config._attn_implementation, eager)
        return attend(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = view
