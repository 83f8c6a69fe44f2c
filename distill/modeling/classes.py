"""The student classes of an installed relinear, made once per family from the same source as every export."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ...mixers import registry
from ..families import FAMILIES
from .config import config_class
from .model import Family, model_classes


class Classes(NamedTuple):
    """What transformers needs for one family of students."""

    config: Any
    model: Any
    causal_lm: Any


@cache
def student_classes(family: str) -> Classes:
    """Config, backbone and causal language model for students of a family.

    Args:
        family: a key of `families.FAMILIES`.
    """
    import transformers

    entry = FAMILIES[family]
    name = f"Relinear{entry.prefix}"
    config = config_class(getattr(transformers, entry.config_class), f"{name}Config", __name__)
    model, causal_lm = model_classes(
        config,
        getattr(transformers, entry.backbone_class),
        getattr(transformers, entry.lm_class),
        {mixer: registry.module(mixer) for mixer in registry.names()},
        Family(entry.backbone, entry.layers, entry.attention, entry.masks_by_type),
        (f"{name}Model", f"{name}ForCausalLM"),
        __name__,
    )
    return Classes(config, model, causal_lm)
