"""The teacher architectures that relinear knows. Torch-free, so that a plan can be made from config.json alone.

A new family is an entry of `FAMILIES`; what is special in each is told in docs/reference/families.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import UserError
from .family import Family, Head, Values

ATTENTION_TYPES = ("full_attention", "sliding_attention")
"""The entries of `layer_types` that are softmax attention as relinear converts it."""


def _all_slide(values: Values) -> list[str]:
    """Every layer slides where a window is set: Mistral, Mixtral, Phi-3, StarCoder 2, Qwen3-MoE."""
    slides = values.get("sliding_window") is not None and values.get("use_sliding_window", True)
    return ["sliding_attention" if slides else "full_attention"] * values["num_hidden_layers"]


def _upper_slide(values: Values) -> list[str]:
    """Qwen2, Qwen3: layers from max_window_layers upwards slide."""
    first = values["max_window_layers"] if values["use_sliding_window"] and values["sliding_window"] else None
    return [
        "full_attention" if first is None or layer < first else "sliding_attention"
        for layer in range(values["num_hidden_layers"])
    ]


def _nope_slides(values: Values) -> list[str]:
    """SmolLM3: where sliding is on, the layers without rotary embedding slide."""
    slides = values["use_sliding_window"] and values["sliding_window"] is not None
    return [
        "sliding_attention" if slides and not _smollm3_rope(values, layer) else "full_attention"
        for layer in range(values["num_hidden_layers"])
    ]


def _full_every(default: int, key: str = "") -> Callable[[Values], list[str]]:
    """Every n-th layer is full and the others slide, n being `default` or, where there is one, the config's `key`."""

    def types(values: Values) -> list[str]:
        every = values.get(key) or default
        return [
            "sliding_attention" if (layer + 1) % every else "full_attention"
            for layer in range(values["num_hidden_layers"])
        ]

    return types


def _smollm3_rope(values: Values, layer: int) -> bool:
    listed = values.get("no_rope_layers")  # 1 where the layer is rotary, whatever the name says
    return bool(listed[layer]) if listed else (layer + 1) % values["no_rope_layer_interval"] != 0


def _query_scalar(values: Values) -> float:
    return values["query_pre_attn_scalar"] ** -0.5


def _sparse(values: Values, layer: int) -> bool:
    """Qwen3-MoE: some layers may have a plain feed-forward block."""
    listed = values.get("mlp_only_layers") or []
    return layer not in listed and (layer + 1) % values["decoder_sparse_step"] == 0


_QWEN = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
}
_GEMMA = {"head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}
_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "Llama", **_BIAS, mlp_bias="mlp_bias"),
        Family("mistral", "Mistral", types=_all_slide, defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
        Family("qwen2", "Qwen2", qkv_bias=True, masks_by_type=True, types=_upper_slide, defaults=_QWEN),
        Family(
            "qwen3", "Qwen3", **_BIAS, qk_norm="head", masks_by_type=True, types=_upper_slide,
            defaults={**_QWEN, "head_dim": 128},
        ),
        Family(
            "qwen3_moe", "Qwen3Moe", **_BIAS, qk_norm="head", types=_all_slide, moe=_sparse,
            defaults={
                "use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 4, "num_experts": 128,
                "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
            },
        ),
        Family(
            "mixtral", "Mixtral", types=_all_slide, moe=lambda values, layer: True,
            defaults={"num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
        ),
        Family("olmo2", "Olmo2", post_norm=True, **_BIAS, qk_norm="full", defaults={"rms_norm_eps": 1e-5}),
        Family(
            "olmo3", "Olmo3", post_norm=True, **_BIAS, qk_norm="full", masks_by_type=True, types=_full_every(4),
            defaults={"sliding_window": 4096, "rms_norm_eps": 1e-5},
        ),
        Family(
            "gemma2", "Gemma2", post_norm=True, **_BIAS, masks_by_type=True, types=_full_every(2), norms=4,
            scale=_query_scalar, softcap="attn_logit_softcapping",
            head=lambda values: Head(softcap=values["final_logit_softcapping"]),
            defaults={
                **_GEMMA, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            },
        ),
        Family(
            "gemma3_text", "Gemma3", "Text", post_norm=True, **_BIAS, masks_by_type=True,
            types=_full_every(6, "sliding_window_pattern"), qk_norm="head", norm_offset=True, norms=4,
            scale=_query_scalar,
            head=lambda values: Head(softcap=values.get("final_logit_softcapping")),
            defaults={**_GEMMA, "sliding_window": 4096},
        ),
        Family("phi3", "Phi3", types=_all_slide, fused="blocks", defaults={"rms_norm_eps": 1e-5}),
        Family(
            "smollm3", "SmolLM3", **_BIAS, masks_by_type=True, types=_nope_slides, rope=_smollm3_rope,
            mlp_bias="mlp_bias",
            defaults={
                "use_sliding_window": False, "sliding_window": None, "no_rope_layer_interval": 4,
                "num_key_value_heads": 4, "tie_word_embeddings": True,
            },
        ),
        Family(
            "granite", "Granite", **_BIAS, residual="residual_multiplier", mlp_bias="mlp_bias",
            scale=lambda values: values["attention_multiplier"],
            head=lambda values: Head(1 / values["logits_scaling"]),
            defaults={"attention_multiplier": 1.0, "logits_scaling": 1.0},
        ),
        Family(
            "gpt_neox", "GPTNeoX", backbone="gpt_neox", attention="attention", fused="heads", **_BIAS, gated=False,
            mlp_bias=True, norm_bias=True, norm_eps="layer_norm_eps",
            defaults={"attention_bias": True, "layer_norm_eps": 1e-5},
        ),
        Family(
            "starcoder2", "Starcoder2", types=_all_slide, qkv_bias="use_bias", o_bias="use_bias", gated=False,
            mlp_bias="use_bias", norm_bias=True, norm_eps="norm_epsilon",
            defaults={"use_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": True, "norm_epsilon": 1e-5},
        ),
        Family(
            "cohere2", "Cohere2", **_BIAS, masks_by_type=True, types=_full_every(4, "sliding_window_pattern"),
            rotary="interleaved", norms=1, norm_eps="layer_norm_eps",
            rope=lambda values, layer: values["layer_types"][layer] == "sliding_attention"
            and values["sliding_window"] is not None,
            head=lambda values: Head(values["logit_scale"]),
            defaults={
                "sliding_window": 4096, "logit_scale": 0.0625, "tie_word_embeddings": True, "layer_norm_eps": 1e-5,
            },
        ),
    )
}  # fmt: skip


def family(model_type: str, where: str) -> Family:
    """The entry for a config's `model_type`.

    Raises:
        UserError: unknown family; names `where` it was read and the families there are.
    """
    if model_type not in FAMILIES:
        raise UserError(f"{where}: {_unknown(model_type)} Known: {_known()}. {_ADD}")
    return FAMILIES[model_type]


def family_of(config: Values, where: str) -> Family:
    """The family of a teacher, from its config.json read as a dict.

    Raises:
        UserError: unknown family, or a model of a known one that is not causal softmax attention in every layer.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in FAMILIES:
        text = config.get("text_config")
        kind = text.get("model_type") if isinstance(text, dict) else None
        if kind in FAMILIES:
            raise UserError(
                f"{where}: model_type {model_type!r} is a model of text and more. relinear converts text models, of "
                f"family {kind} too: save its language model by itself and give that folder"
            )
        odd = _not_attention(config)
        if odd:
            raise UserError(
                f"{where}: {_unknown(model_type)} {odd} relinear converts models that are softmax attention in every "
                f"layer, of the families {_known()}"
            )
    found = family(model_type, where)
    odd = _not_attention(config)
    if odd:
        raise UserError(f"{where}: {odd} relinear converts softmax attention; give the model that this one came from")
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise UserError(f"{where}: attends in both directions; a linear mixer reads from left to right only")
    if config.get("per_layer_config"):
        raise UserError(f"{where}: per_layer_config gives layers different shapes, which relinear does not know")
    return found


_ADD = "To add one, see docs/how-to/add-a-family.md"
# Keys and names by which architectures with recurrent layers are known.
_KEYS = ("layers_block_type", "hybrid_override_pattern", "block_types", "linear_attn_config", "full_attention_interval")
_NAMES = ("amba", "rwkv", "xlstm", "recurrent", "retnet", "linear", "falcon_h1", "lfm", "nemotron_h", "qwen3_next")


def _unknown(model_type: str) -> str:
    return f"model_type {model_type!r} is not a family that relinear knows."


def _known() -> str:
    return ", ".join(FAMILIES)


def _not_attention(config: Values) -> str | None:
    """A sentence on the layers that are no softmax attention, as far as a config shows it; None where nothing does."""
    types = config.get("layer_types")
    if isinstance(types, list):
        other = [(layer, kind) for layer, kind in enumerate(types) if kind not in ATTENTION_TYPES]
        if other:
            layer, kind = other[0]
            return f"Layer {layer} is {kind!r}, {len(other)} of {len(types)} layers are not softmax attention."
        return None
    name = str(config.get("model_type", "")).lower()
    if any(part in name for part in _NAMES) or any(config.get(key) for key in _KEYS):
        return "It has layers that are not softmax attention."
    return None
