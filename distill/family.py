"""What relinear must know of one teacher architecture, so that everything else serves every one of them. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..mixers.specs.base import Geometry, MixerOptions, MixerSpec
from .errors import UserError

Values = Mapping[str, Any]
"""config.json with the family's defaults filled in."""


class Head(NamedTuple):
    """What the model does to the output projection's result: softcap * tanh(scale * z / softcap), or scale * z."""

    scale: float = 1.0
    softcap: float | None = None


class Experts(NamedTuple):
    """A mixture-of-experts block: how many experts, how many of them see a token, and their width."""

    number: int
    active: int
    width: int


def _all_full(values: Values) -> list[str]:
    return ["full_attention"] * values["num_hidden_layers"]


@dataclass(frozen=True)
class Family:
    """One teacher architecture, in transformers' own names.

    Where a field takes `str | bool`, a text is the key of config.json that decides.

    Attributes:
        name: `model_type` in config.json.
        prefix: of its classes in transformers: `Llama` for LlamaConfig, LlamaModel, LlamaForCausalLM.
        text: what follows the prefix in the names of config and backbone: `Text` for Gemma3TextModel.
        backbone: attribute of the causal language model that holds the backbone.
        layers: attribute of the backbone that holds the decoder layers.
        attention: attribute of a decoder layer that holds attention.
        mlp: likewise the feed-forward block or the experts.
        masks_by_type: the model looks its masks up by `config.layer_types`, else it makes one mask for all layers.
        types: what each layer is, where config.json does not say it in `layer_types`.
        fused: q, k and v are one matrix: "blocks" (all of q, of k, of v) or "heads" (q, k, v of each head in turn).
        qkv_bias: the q/k/v projections have biases.
        o_bias: the output projection has one.
        qk_norm: see `Geometry.qk_norm`.
        norm_offset: norms multiply by 1 + weight.
        norm_eps: key of the norms' epsilon.
        rotary: see `Geometry.rotary`.
        rope: (values, layer) -> whether the layer rotates queries and keys.
        scale: values -> factor of the scores; None where it is head_dim ** -0.5.
        softcap: key of the cap on scores.
        gated: the feed-forward block has a gate, so three matrices instead of two.
        mlp_bias: its matrices have biases.
        moe: (values, layer) -> the block is a mixture of experts.
        norms: in each decoder layer, attention's own aside.
        norm_bias: these norms have a bias.
        post_norm: attention's output passes a norm before it is added to the residual stream.
        residual: key of the factor with which it is added.
        head: values -> what is done to the logits.
        defaults: what transformers takes for keys that config.json leaves out, where that is not None or False.
    """

    name: str
    prefix: str
    text: str = ""
    backbone: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    masks_by_type: bool = False
    types: Callable[[Values], list[str]] = _all_full
    fused: str = ""
    qkv_bias: str | bool = False
    o_bias: str | bool = False
    qk_norm: str = ""
    norm_offset: bool = False
    norm_eps: str = "rms_norm_eps"
    rotary: str = "half"
    rope: Callable[[Values, int], bool] = lambda values, layer: True
    scale: Callable[[Values], float] | None = None
    softcap: str | None = None
    gated: bool = True
    mlp_bias: str | bool = False
    moe: Callable[[Values, int], bool] = lambda values, layer: False
    norms: int = 2
    norm_bias: bool = False
    post_norm: bool = False
    residual: str = ""
    head: Callable[[Values], Head] = lambda values: Head()
    defaults: Values = field(default_factory=dict)

    @property
    def config_class(self) -> str:
        """The config's class in transformers."""
        return f"{self.prefix}{self.text}Config"

    @property
    def backbone_class(self) -> str:
        """The backbone's class in transformers."""
        return f"{self.prefix}{self.text}Model"

    @property
    def lm_class(self) -> str:
        """The causal language model's class in transformers."""
        return f"{self.prefix}ForCausalLM"

    def values(self, config: Values) -> Values:
        """A config.json read as a dict, with what transformers takes for the keys that it leaves out."""
        return {**self.defaults, **config}

    def geometry(self, config: Values, layer: int) -> Geometry:
        """Attention geometry of a layer from a config.json read as a dict."""
        values = self.values(config)
        heads = values["num_attention_heads"]
        return Geometry(
            hidden_size=values["hidden_size"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            qkv_bias=_flag(self.qkv_bias, values),
            o_bias=_flag(self.o_bias, values),
            qk_norm=self.qk_norm,
            norm_offset=self.norm_offset,
            norm_eps=values.get(self.norm_eps, 1e-6),
            rope=self.rope({**values, "layer_types": self.layer_types(config)}, layer),
            rotary=self.rotary,
            scale=None if self.scale is None else self.scale(values),
            softcap=values.get(self.softcap) if self.softcap else None,
        )

    def layer_types(self, config: Values) -> list[str]:
        """What each attention layer of the unconverted teacher is, in transformers' closed vocabulary."""
        return list(config["layer_types"]) if config.get("layer_types") else self.types(self.values(config))

    def has_mlp_bias(self, config: Values) -> bool:
        """The feed-forward block's matrices have biases."""
        return _flag(self.mlp_bias, self.values(config))

    def experts(self, config: Values, layer: int) -> Experts | None:
        """The mixture of experts in a layer, None where the feed-forward block is one."""
        values = self.values(config)
        if not self.moe(values, layer):
            return None
        number = config.get("num_local_experts") or config.get("num_experts") or values["num_experts"]
        return Experts(
            number, values["num_experts_per_tok"], values.get("moe_intermediate_size") or values["intermediate_size"]
        )

    def logits(self, config: Values) -> Head:
        """What the model does to the output projection's result."""
        return self.head(self.values(config))

    def residual_scale(self, config: Values) -> float | None:
        """Factor with which attention's output is added to the residual stream; None where a norm comes before that."""
        return None if self.post_norm else float(config[self.residual]) if config.get(self.residual) else 1.0

    def origin(self, name: str) -> str:
        """Where a tensor of attention, by its usual name (`q_proj.weight`), stands in this family.

        `q_proj.weight` itself for most; `rows of qkv_proj.weight` where projections are fused.
        """
        part, kind = name.split(".")
        if self.fused == "blocks" and part[0] in "qkv" and part.endswith("_proj"):
            return f"rows of qkv_proj.{kind}"
        if self.fused == "heads":
            return f"dense.{kind}" if part == "o_proj" else f"rows of query_key_value.{kind}, head by head"
        return name

    def derived(self, origin: str) -> str:
        """`origin` inside a derivation: `repeat_heads(k_proj.weight)` with the family's own name of the tensor."""
        match = re.fullmatch(r"(\w+)\(([\w.]+)\)", origin)
        return f"{match[1]}({self.origin(match[2])})" if match else origin


def check_geometry(spec: type[MixerSpec], geometry: Geometry, options: MixerOptions, layer: int) -> None:
    """Refuse a mixer that cannot stand in for a layer's attention.

    Raises:
        UserError: with what could.
    """
    reason = spec.refusal(geometry, options)
    if reason is not None:
        raise UserError(f"layer {layer}: {spec.name} cannot replace this attention: {reason}")


def check_matrix(spec: type[MixerSpec], options: MixerOptions, layer: int, stage: str) -> None:
    """Refuse a stage on mixing matrices for a mixer that has none.

    Raises:
        UserError: with what to do instead.
    """
    reason = spec.no_matrix(options)
    if reason is not None:
        raise UserError(
            f"stages.{stage}: layer {layer}: {spec.name} has no mixing matrix to train: {reason}. Remove the stage, as "
            "align needs none, or convert the layer with another mixer: relinear ls"
        )


def lost(spec: type[MixerSpec], geometry: Geometry, options: MixerOptions) -> list[str]:
    """What attention did to its scores and a mixer does not do, in words; empty where nothing is lost."""
    if geometry.softcap is None or spec.softmax:
        return []
    cap = f"attention caps its scores at {geometry.softcap:g} (tanh)"
    if getattr(options, "window", 0):
        return [f"{cap}: {spec.name} does so in its window, its linear part has no such cap"]
    return [f"{cap}: {spec.name} has no softmax and no such cap; align and glue must make up for it"]


def _flag(key: str | bool, values: Values) -> bool:
    return bool(values.get(key, False)) if isinstance(key, str) else key
