"""What `plan` says of the decode cache, for a checkpoint that exists: from its config.json alone. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..distill import families
from ..distill.teacher import read_config
from . import costs
from .layers import LayerMap
from .teacher_config import TeacherConfig


def predicted_cache_bytes(folder: Path, length: int, dtype: str) -> int | None:
    """Bytes that one sequence of `length` tokens keeps for decoding, of a teacher or one of our exports.

    Args:
        folder: with config.json.
        length: tokens.
        dtype: of keys and values.

    Returns:
        None for a family that relinear does not know.
    """
    config = read_config(folder)
    ours = config.get("model_type") == "relinear"
    family = families.FAMILIES.get(config["base_model_type"] if ours else config.get("model_type", ""))
    if family is None:
        return None
    if not ours:
        teacher = TeacherConfig(str(folder), family, config)
        return costs.cache_bytes(teacher, LayerMap(teacher.num_layers, [], {}), length, dtype)[0]
    teacher = TeacherConfig(str(folder), family, {**config, "layer_types": config["attention_types"]})
    return costs.cache_bytes(teacher, _layers(config), length, dtype)[1]


def _layers(config: dict[str, Any]) -> LayerMap:
    """The layers of an export."""
    names = config["mixer_types"]
    converted = {}
    for layer, name in enumerate(names):
        if name is not None:
            options = dict(config["mixers"][name])
            own = options.pop("layers", {}).get(str(layer), {})
            converted[layer] = (name, {**options, **own})
    kept = [layer for layer, name in enumerate(names) if name is None]
    return LayerMap(len(names), kept, converted, config.get("kept_attention"))
