"""The teacher with some of its layers answered by mixers: which ones is switched between two forward passes.

What `student.assemble` builds anew for every choice of layers is here one teacher and one set of mixers: a converted
layer's attention module is given the mixer's forward for as long as the choice lasts. No tensor is copied, so trying
every layer of a model costs forward passes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import find_packed_sequence_indices

from ..mixers.base import Mixer, MixerInputs
from .modeling.config import is_first
from .teacher import Teacher


class Hybrid:
    """A teacher and mixers for its layers.

    Attributes:
        teacher: its tensors are read, never changed.
        mixers: layer -> mixer, as from `transfer` or after align.
    """

    def __init__(self, teacher: Teacher, mixers: dict[int, Mixer]) -> None:
        self.teacher = teacher
        self.mixers = mixers
        self._lowest: dict[int, Mixer] = {}

    def mixers_of(self, layers: Iterable[int]) -> dict[int, Mixer]:
        """The mixers of a student that converts `layers` and no others, ascending.

        The lowest layer that a mixer takes is the source of what its layers share and reads nothing itself (RWKV-7's
        v_first). Where a choice of layers makes another layer the lowest, that layer's mixer is built again as such,
        on the same tensors; those that a lowest layer does not have (v0, v1, v2) are left out. A run that starts from
        aligned mixers of another plan does the same.

        Raises:
            ValueError: a layer has no mixer.
        """
        chosen = sorted(layers)
        missing = [layer for layer in chosen if layer not in self.mixers]
        if missing:
            raise ValueError(f"layer {missing[0]} has no mixer; there are mixers for {sorted(self.mixers)}")
        plan = {layer: (self.mixers[layer].spec.name, {}) for layer in chosen}
        return {layer: self._at(layer, is_first(plan, layer)) for layer in chosen}

    @contextmanager
    def converting(self, layers: Iterable[int]) -> Iterator[Any]:
        """The teacher's causal language model with `layers` converted, inside the context; as it was after it.

        It is called as any model of its family, without a cache: `use_cache` is off. Padding is what a (B, T)
        attention mask says; documents start where positions do.

        Yields:
            The model.

        Raises:
            ValueError: in a forward pass, for a cache or a mask of more than two dimensions.
        """
        mixers = self.mixers_of(layers)
        held: list[MixerInputs] = []
        with ExitStack() as stack:
            hook = self.teacher.backbone.register_forward_pre_hook(_inputs(held), with_kwargs=True)
            stack.callback(hook.remove)
            for layer, mixer in mixers.items():
                module = self.teacher.attention(layer)
                module.forward = _forward(mixer, held)
                stack.callback(vars(module).pop, "forward", None)
            yield self.teacher.model

    def _at(self, layer: int, first: bool) -> Mixer:
        """A layer's mixer as the lowest of its kind, or not."""
        own = self.mixers[layer]
        if own.first == first:
            return own
        if layer not in self._lowest:
            made = type(own)(own.geometry, own.options, layer, own.num_layers, first)
            tensors = own.state_dict()
            made.load_state_dict({name: tensors[name] for name in made.state_dict()}, assign=True)
            self._lowest[layer] = made.requires_grad_(False).train(own.training)
        return self._lowest[layer]


def _inputs(held: list[MixerInputs]) -> Callable[..., tuple[tuple, dict[str, Any]]]:
    """A hook before the backbone's forward: what its mixers must know of padding and documents."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
            raise ValueError("a teacher with switched layers runs without a cache; assemble a student to generate")
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            raise ValueError("a teacher with switched layers takes a mask of shape (batch, tokens), or none")
        given = kwargs.get("input_ids")
        given = args[0] if given is None and args else given
        rows = given.shape[0] if given is not None else kwargs["inputs_embeds"].shape[0]
        padding = None if mask is None or bool(mask.all()) else mask.bool()
        segments = None
        if mask is None and positions is not None:
            segments = find_packed_sequence_indices(positions)
            segments = None if segments is None else segments.expand(rows, -1)
        held[:] = [MixerInputs(padding, segments)]
        return args, {**kwargs, "use_cache": False}

    return hook


def _forward(mixer: Mixer, held: list[MixerInputs]) -> Callable[..., tuple[Tensor, None]]:
    """What stands for an attention module's forward."""
    exact = next((p.dtype for p in mixer.parameters()), torch.float32)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rotary = kwargs.get("position_embeddings")
        dtype = hidden.dtype
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden, rotary = hidden.to(exact), None if rotary is None else tuple(part.to(exact) for part in rotary)
        made, _ = mixer(hidden, position_embeddings=rotary, mixer_inputs=held[0])
        return made.to(dtype), None

    return forward
