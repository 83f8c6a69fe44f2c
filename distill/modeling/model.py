"""The student as a transformers model: the family's own classes with mixers where attention stood."""

from __future__ import annotations

from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_recurrent_attention_mask, find_packed_sequence_indices

from ...mixers.base import Mixer, MixerInputs
from .cache import CACHE, MixerCacheLayer, install_layers
from .config import family_view, geometry, is_first, mixer_plan
from .kept import change_attention, kept_attention, kept_inputs, windows_of


class Family(NamedTuple):
    """What the model must know of its family, so that this file serves every one of them.

    Attributes:
        backbone: attribute of the causal language model that holds the backbone.
        layers: attribute of the backbone that holds the decoder layers.
        attention: attribute of a decoder layer that holds attention.
        masks_by_type: the family looks its masks up by `config.layer_types`.
    """

    backbone: str
    layers: str
    attention: str
    masks_by_type: bool


def build_mixers(config: Any, classes: dict[str, type[Mixer]]) -> dict[int, Mixer]:
    """The mixers that a student's config names, with fresh parameters."""
    plan = mixer_plan(config)
    built: dict[int, Mixer] = {}
    for layer, (name, options) in plan.items():
        mixer = classes[name]
        chosen = mixer.spec.options.parse(options)
        built[layer] = mixer(geometry(config, layer), chosen, layer, config.num_hidden_layers, is_first(plan, layer))
    return built


def _initialise(module: Mixer) -> None:
    """Initial values for the parameters of `module` that no checkpoint gave."""
    loaded = {name: p.detach().clone() for name, p in module.named_parameters() if getattr(p, "_is_hf_initialized", 0)}
    if len(loaded) == len(list(module.parameters())):
        return
    module.reset_parameters()
    with torch.no_grad():
        for name, value in loaded.items():
            module.get_parameter(name).copy_(value)


class StudentBase:
    """Shared by the backbone and the causal language model: both must know how a mixer is initialised."""

    # Compiled decoding with a mixer's cache is not established.
    _can_compile_fullgraph = False
    # Servers that put their own attention in (vLLM, SGLang) know no mixer's state: let them refuse, not write nonsense.
    _supports_attention_backend = False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(module, Mixer):
            _initialise(module)

    def mixers(self) -> dict[int, Mixer]:
        """Layer index -> mixer, for the converted layers."""
        return {module.layer_idx: module for module in self.modules() if isinstance(module, Mixer)}  # pyright: ignore


def model_classes(
    config_type: type,
    base_model: type,
    base_lm: type,
    mixers: dict[str, type[Mixer]],
    family: Family,
    names: tuple[str, str],
    module: str,
) -> tuple[type, type]:
    """The backbone and the causal language model of one family.

    Args:
        config_type: the student's config class.
        base_model: the family's backbone, e.g. `LlamaModel`.
        base_lm: the family's causal language model, e.g. `LlamaForCausalLM`.
        mixers: mixer classes by name; those that the config may name.
        family: attribute names and mask conventions.
        names: of the two new classes.
        module: `__module__` of the new classes: where transformers looks for the file to copy when saving.
    """

    class Model(StudentBase, base_model):  # pyright: ignore[reportGeneralTypeIssues]
        config_class = config_type

        def __init__(self, config: Any) -> None:
            super().__init__(family_view(config))  # pyright: ignore[reportCallIssue]
            built = build_mixers(config, mixers)
            self.mixer_layers = sorted(built)
            layers = getattr(self, family.layers)
            for layer, mixer in built.items():
                setattr(layers[layer], family.attention, mixer)
            kept = {i: getattr(block, family.attention) for i, block in enumerate(layers) if i not in built}
            self.kept_attention = kept_attention(config)
            self.windows = windows_of(config, sorted(kept), self.kept_attention)
            if self.kept_attention is not None:
                change_attention(kept, self.kept_attention, self.windows)
            # Matched as substrings of parameter names: with the module in front, nothing else can match.
            self._keep_in_fp32_modules_strict = {
                f"{family.attention}.{name}" for mixer in built.values() for name in mixer.fp32_parameter_names()
            }
            self.post_init()

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            attention_mask: torch.Tensor | dict | None = None,
            position_ids: torch.Tensor | None = None,
            past_key_values: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            use_cache: bool | None = None,
            cache: Any = None,
            states_to_keep: int | None = None,
            **kwargs: Any,
        ) -> Any:
            """The family's forward, with a mixer's cache layers, padding and document borders seen to.

            `cache` and `past_key_values` are two names of the same. A cache that records its past gets the states after
            the last `states_to_keep` tokens of this call, by default after every one.
            """
            cache = past_key_values if cache is None else cache
            if not self.mixer_layers and self.kept_attention is None:
                return super().forward(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    inputs_embeds=inputs_embeds,
                    use_cache=use_cache,
                    **{CACHE: cache},
                    **kwargs,
                )
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is None or (input_ids is not None and inputs_embeds is not None):
                raise ValueError("give exactly one of input_ids and inputs_embeds")
            if use_cache is None:
                use_cache = bool(self.config.use_cache)
            if self.gradient_checkpointing and self.training:
                use_cache = False
                cache = None  # as decoder layers do: what runs twice would be written twice
            if use_cache and cache is None:
                cache = DynamicCache(config=self.config)
            if cache is not None:
                install_layers(cache, self.mixer_layers, self.windows)
            record = 0
            if cache is not None and self.mixer_layers and cache.is_recording_past(self.mixer_layers[0]):
                record = given.shape[1] if states_to_keep is None else states_to_keep
            seen = cache.get_seq_length() if cache is not None else 0
            arange = torch.arange(given.shape[1], device=given.device)[None] + seen
            positions = arange if position_ids is None else position_ids
            if self.kept_attention is not None:
                kwargs["kept_inputs"] = kept_inputs(
                    self.config,
                    self.kept_attention,
                    self.windows,
                    given,
                    self.dtype,
                    attention_mask,
                    cache,
                    position_ids,
                    arange,
                )
            return super().forward(
                input_ids=input_ids,
                attention_mask=self._attention_masks(given, attention_mask),
                position_ids=positions,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                mixer_inputs=self._mixer_inputs(given, attention_mask, cache, positions, record),
                **{CACHE: cache},
                **kwargs,
            )

        def _attention_masks(self, given: torch.Tensor, attention_mask: torch.Tensor | dict | None) -> Any:
            """What the family's own forward takes as its mask, for the layers where attention stays."""
            types = self.config.attention_types
            kept = [kind for layer, kind in enumerate(types) if layer not in self.mixer_layers]
            if not kept or self.windows:
                # No layer reads this mask. A tensor of four dimensions tells transformers not to make one.
                none = given.new_empty((1, 1, 1, 1), dtype=torch.float32)
                return dict.fromkeys(types, none) if family.masks_by_type else none
            if isinstance(attention_mask, dict):
                # Made by the caller, who may have left out the kinds of attention that no layer has any more.
                made = {kind: attention_mask.get(kind) for kind in types}
                return made if family.masks_by_type else made[kept[0]]
            return attention_mask

        def _mixer_inputs(
            self,
            given: torch.Tensor,
            attention_mask: torch.Tensor | dict | None,
            cache: Any,
            position_ids: torch.Tensor,
            record: int,
        ) -> MixerInputs:
            """The cache, and padding and document borders by the rules that transformers applies to kept attention."""
            if isinstance(attention_mask, dict):
                padding = attention_mask.get("linear_attention")
            else:
                padding = create_recurrent_attention_mask(self.config, given, attention_mask, cache)
            segments = None
            if attention_mask is None and cache is None:
                segments = find_packed_sequence_indices(position_ids)
                if segments is not None:
                    segments = segments.expand(given.shape[0], -1)
            return MixerInputs(None if padding is None else padding.bool(), segments, cache, record)

    class ForCausalLM(StudentBase, base_lm):  # pyright: ignore[reportGeneralTypeIssues]
        config_class = config_type

        def __init__(self, config: Any) -> None:
            super().__init__(family_view(config))  # pyright: ignore[reportCallIssue]
            self.config = config
            setattr(self, family.backbone, Model(config))
            self.post_init()

        @wraps(base_lm.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """The family's forward; of as many last tokens as logits are asked for, a recording cache gets the states.

            A draft's verification asks for the logits of its tokens and of the one before, and may take any of them
            back; who drafts takes back one token more than it drafted.
            """
            asked = kwargs.get("logits_to_keep")
            if isinstance(asked, int) and asked > 0 and self._records(kwargs):
                kwargs["states_to_keep"] = max(2, asked)
            return super().forward(*args, **kwargs)

        @staticmethod
        def _records(given: dict[str, Any]) -> bool:
            """Whether the cache among a forward's keywords keeps earlier states."""
            caches = (given.get(name) for name in (CACHE, "past_key_values"))
            layers = [layer for cache in caches if cache is not None for layer in cache.layers]
            return any(isinstance(layer, MixerCacheLayer) and layer.record_past for layer in layers)

        def _prepare_cache_for_generation(
            self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> Any:
            """Have the model's own layers in the cache before generate first asks for its length."""
            made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            if model_kwargs.get(CACHE) is not None:
                backbone = getattr(self, family.backbone)
                install_layers(model_kwargs[CACHE], backbone.mixer_layers, backbone.windows)
                if generation_config.is_assistant:
                    model_kwargs[CACHE].activate_past_recording()
            return made

        @staticmethod
        def create_masks_for_generate(attention_mask: Any, **kwargs: Any) -> Any:
            """Leave the making of masks to the forward, also with a static cache."""
            return attention_mask

    for made, name in ((Model, names[0]), (ForCausalLM, names[1])):
        made.__name__ = made.__qualname__ = name
        made.__module__ = module
    return Model, ForCausalLM
