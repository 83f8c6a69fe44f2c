"""The teacher architectures that relinear knows: where attention lives in each, and what its geometry is.

Torch-free, so that a plan can be made from config.json alone. A new family is an entry of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..mixers.specs.base import Geometry
from .errors import UserError


@dataclass(frozen=True)
class Family:
    """One teacher architecture, in transformers' own names.

    Attributes:
        name: `model_type` in config.json.
        prefix: of its classes in transformers: `Llama` for LlamaConfig, LlamaModel, LlamaForCausalLM.
        qkv_bias: config key that switches the q/k/v biases on, or True/False where the family fixes it.
        o_bias: likewise for the output projection.
        qk_norm: the attention normalises queries and keys per head before the rotary embedding.
        masks_by_type: the model looks its masks up by `config.layer_types`, else it makes one mask for all layers.
    """

    name: str
    prefix: str
    qkv_bias: str | bool = False
    o_bias: str | bool = False
    qk_norm: str = ""
    masks_by_type: bool = False
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"

    def geometry(self, config: dict[str, Any]) -> Geometry:
        """Attention geometry from a config.json read as a dict (defaults as transformers fills them in)."""
        heads = config["num_attention_heads"]
        return Geometry(
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or (128 if self.name == "qwen3" else config["hidden_size"] // heads),
            qkv_bias=_flag(self.qkv_bias, config),
            o_bias=_flag(self.o_bias, config),
            qk_norm=self.qk_norm,
            norm_eps=config.get("rms_norm_eps", 1e-6),
        )

    def layer_types(self, config: dict[str, Any]) -> list[str]:
        """What each attention layer of the unconverted teacher is, in transformers' closed vocabulary."""
        layers = config["num_hidden_layers"]
        if config.get("layer_types"):
            return list(config["layer_types"])
        window = config.get("sliding_window", 4096)
        if self.name == "mistral":
            return ["sliding_attention" if window else "full_attention"] * layers
        if self.masks_by_type and window and config.get("use_sliding_window"):
            # Qwen2/Qwen3: layers from max_window_layers upwards slide.
            first = config.get("max_window_layers", 28)
            return ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
        return ["full_attention"] * layers


def _flag(key: str | bool, config: dict[str, Any]) -> bool:
    return bool(config.get(key, False)) if isinstance(key, str) else key


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "Llama", qkv_bias="attention_bias", o_bias="attention_bias"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2", qkv_bias=True, masks_by_type=True),
        Family(
            "qwen3",
            "Qwen3",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="head",
            masks_by_type=True,
        ),
    )
}


def family(model_type: str, where: str) -> Family:
    """The entry for a config's `model_type`.

    Raises:
        UserError: unknown family; names `where` it was read and the families there are.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type {model_type!r} is not a family that relinear knows. Known: {', '.join(FAMILIES)}. "
            "To add one, see docs/how-to/add-a-family.md"
        )
    return FAMILIES[model_type]
