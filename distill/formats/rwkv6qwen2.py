"""rwkv6 students as RWKV6Qwen2 (QRWKV6, arXiv 2505.03005), the layout that llama.cpp's converter reads."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...mixers.rates import LOG_DECAY_FLOOR
from . import pairs
from .heads import Take, scale_heads

FP32 = ("time_decay",)
_INPUTS = "rkvwg"  # as the mixer's own order, and the format's


def rename(name: str) -> str:
    """Names outside attention are the same."""
    return name


def config(student: pairs.Student) -> dict[str, Any]:
    """What config.json says beside what all formats say."""
    found = pairs.ranks(student, 0)
    geometry, options = student.geometry(0), student.options(0)
    return {
        "model_type": "rwkv6qwen2",
        "attention_bias": geometry.qkv_bias and options.qkv_bias,
        "num_key_value_heads": geometry.num_heads if options.expand_kv else geometry.num_kv_heads,
        "attention_output_bias": False,
        "lora_rank_decay": found["w"],
        "lora_rank_tokenshift": found["shift"],
    }


def layer(take: Take, student: pairs.Student, index: int) -> dict[str, torch.Tensor]:
    """Tensors of a layer's attention, by their name behind `model.layers.N.self_attn.`."""
    geometry, options = student.geometry(index), student.options(index)
    made = {f"time_maa_{part}": take("mu")[i].view(1, 1, -1) for i, part in enumerate(_INPUTS)}
    made |= {"time_maa_x": take("mu_x").view(1, 1, -1), "time_maa_w1": take("mu1"), "time_maa_w2": take("mu2")}
    made |= {"time_decay": take("w0").view(1, 1, -1), "time_decay_w1": take("w1"), "time_decay_w2": take("w2")}
    biased = geometry.qkv_bias and options.qkv_bias
    for part in ("weight", "bias") if biased else ("weight",):
        made[f"q_proj.{part}"] = scale_heads(take(f"q_proj.{part}"), take("q_scale"), geometry.head_dim)
        made |= {f"{name}_proj.{part}": take(f"{name}_proj.{part}") for name in "kv"}
    made["gate.weight"] = take("g_proj.weight")
    made["o_proj.weight"] = take("o_proj.weight") * (2 if options.gate == "identity" else 1)
    return made


def notes(take: Take, student: pairs.Student, index: int) -> list[str]:
    """What of a layer is not exact for certain: the format's decays have no floor."""
    fastest = float((take("w0") + take("w2").abs().sum(0)).max())
    if fastest <= math.log(-LOG_DECAY_FLOOR):
        return []
    return ["a decay can pass the floor of e^-5 per token that ours has and the format has not"]
