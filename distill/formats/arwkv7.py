"""rwkv7 students as ARWKV-7 (arXiv 2501.15570), the layout that llama.cpp's converter reads."""

from __future__ import annotations

from typing import Any

import torch

from . import pairs
from .heads import Take, pad, repeat_rows

FP32 = ("w0", "a0", "v0", "k_k", "k_a", "r_k")
_NEVER = -100.0
"""The sigmoid of this is 4e-44: nothing of the first layer's values."""


def rename(name: str) -> str:
    """Names outside attention are the same."""
    return name


def config(student: pairs.Student) -> dict[str, Any]:
    """What config.json says beside what all formats say."""
    return {
        "model_type": "rwkv_hybrid",
        "head_size": student.geometry(0).head_dim,
        "wkv_version": 7,
        "wkv_has_gate": True,
        "wkv_has_group_norm": student.options(0).group_norm,
        "attention_bias": False,
    }


def layer(take: Take, student: pairs.Student, index: int) -> dict[str, torch.Tensor]:
    """Tensors of a layer's attention, by their name behind `model.layers.N.self_attn.`."""
    geometry, options = student.geometry(index), student.options(index)
    heads, d, inner, hidden = geometry.num_heads, geometry.head_dim, geometry.inner_size, geometry.hidden_size
    size = pairs.ARWKV7_RANKS
    made = {f"x_{part}": torch.zeros(1, 1, hidden, dtype=torch.float64) for part in "rwkvag"}  # no token shift
    made["r_k"] = torch.zeros(heads, d, dtype=torch.float64)  # no bonus
    scale = 1.0 if options.group_norm else geometry.query_scale
    made["receptance.weight"] = take("q_proj.weight") * scale
    made["key.weight"] = repeat_rows(take("k_proj.weight"), heads, d)
    made["value.weight"] = repeat_rows(take("v_proj.weight"), heads, d)
    made["output.weight"] = take("o_proj.weight")
    made |= {"k_k": take("k_k"), "k_a": take("k_a")}
    for part in "wa":
        made[f"{part}0"] = take(f"{part}0")
        made |= {f"{part}1": pad(take(f"{part}1"), 1, size[part]), f"{part}2": pad(take(f"{part}2"), 0, size[part])}
    if index == min(student.plan) or not options.value_residual:
        made["v0"] = torch.full((inner,), _NEVER, dtype=torch.float64)
        made["v1"] = torch.zeros(hidden, size["v"], dtype=torch.float64)
        made["v2"] = torch.zeros(size["v"], inner, dtype=torch.float64)
    else:
        made["v0"] = take("v0")
        made |= {"v1": pad(take("v1"), 1, size["v"]), "v2": pad(take("v2"), 0, size["v"])}
    down, up = take("g1"), take("g2")
    if options.gate_init == "identity":  # a column of zeros gives a half everywhere
        down, up = pad(down, 1, down.shape[1] + 1), torch.cat([up, 2 * take("g0")[None]])
    made |= {"g1": pad(down, 1, size["g"]), "g2": pad(up, 0, size["g"])}
    if options.group_norm:
        made |= {f"ln_x.{part}": take(f"ln_x.{part}") for part in ("weight", "bias")}
    return made


def notes(take: Take, student: pairs.Student, index: int) -> list[str]:
    """Nothing is uncertain: decays are bounded alike."""
    return []
