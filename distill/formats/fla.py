"""gla and gated_deltanet students as flash-linear-attention's own models (version 0.6)."""

from __future__ import annotations

from typing import Any

import torch

from ...mixers.rates import LOG_DECAY_FLOOR
from . import pairs
from .heads import Take, pad, repeat_rows

FP32 = ("A_log", "dt_bias", "gk_proj.1.bias")
_NAMES = {
    "model.embed_tokens.": "model.embeddings.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
}


def rename(name: str) -> str:
    """The library's name of a tensor outside attention."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def config(student: pairs.Student) -> dict[str, Any]:
    """What config.json says beside what all formats say."""
    geometry, options, values = student.geometry(0), student.options(0), student.config
    shared = {
        "norm_eps": values["rms_norm_eps"],
        "hidden_act": "swish",
        "num_heads": geometry.num_heads,
        "use_short_conv": bool(options.conv),
        "attn": None,
        "fuse_cross_entropy": False,
    }
    if student.plan[0][0] == "gla":
        return shared | {
            "model_type": "gla",
            "expand_k": 1.0,
            "expand_v": 1.0,
            "num_kv_heads": None,
            "use_output_gate": options.gate != "none",
            "clamp_min": LOG_DECAY_FLOOR,
        }
    return shared | {
        "model_type": "gated_deltanet",
        "head_dim": geometry.head_dim,
        "expand_v": 1.0,
        "num_v_heads": None,
        "use_gate": options.gate != "none",
        "output_gate_activation": "silu" if options.gate == "silu" else "sigmoid",
        "conv_size": options.conv or 4,
    }


def layer(take: Take, student: pairs.Student, index: int) -> dict[str, torch.Tensor]:
    """Tensors of a layer's attention, by their name behind `model.layers.N.attn.`."""
    geometry, options = student.geometry(index), student.options(index)
    heads, d = geometry.num_heads, geometry.head_dim
    made = {"q_proj.weight": take("q_proj.weight")}
    made |= {f"{part}_proj.weight": repeat_rows(take(f"{part}_proj.weight"), heads, d) for part in "kv"}
    made["o_proj.weight"] = take("o_proj.weight") * (2 if options.gate == "identity" else 1)
    if options.gate != "none":
        made["g_proj.weight"] = take("g_proj.weight")
    if student.plan[index][0] == "gla":
        made["gk_proj.0.weight"] = pad(take("gk_down.weight"), 0, pairs.GLA_RANK)
        made["gk_proj.1.weight"] = pad(take("gk_up.weight"), 1, pairs.GLA_RANK)
        made["gk_proj.1.bias"] = take("gk_bias")
        made["g_norm.weight" if options.gate == "none" else "g_norm_swish_gate.weight"] = take("out_norm.weight")
        return made
    made |= {name: take(name) for name in ("a_proj.weight", "b_proj.weight", "A_log", "dt_bias")}
    made["o_norm.weight"] = take("out_norm.weight")
    if options.conv:
        widths = [take(f"{part}_proj.weight").shape[0] for part in "qkv"]
        for part, taps in zip("qkv", take("conv").split(widths), strict=True):
            made[f"{part}_conv1d.weight"] = repeat_rows(taps, heads, d)[:, None]
    return made


def notes(take: Take, student: pairs.Student, index: int) -> list[str]:
    """What of a layer is not exact for certain: Gated DeltaNet's decays have no floor there."""
    if student.plan[index][0] == "gla":
        return []
    hidden = student.geometry(index).hidden_size
    # The layer input has a root mean square of one before the norm's weight.
    reach = (take("a_proj.weight") * take("norm")).norm(dim=1) * hidden**0.5
    rate = take("A_log").exp() * torch.nn.functional.softplus(reach + take("dt_bias"))
    if float(rate.max()) <= -LOG_DECAY_FLOOR:
        return []
    return ["a decay can pass the floor of e^-5 per token that ours has and the format has not"]
