"""Putting mixers in place: transfer from the teacher's attention, and the standalone student model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ..mixers import registry
from ..mixers.base import Mixer
from ..mixers.transfer import transfer as transfer_weights
from .modeling.classes import student_classes
from .modeling.config import is_first
from .teacher import Teacher

Plan = dict[int, tuple[str, dict[str, Any]]]


def transfer(teacher: Teacher, plan: Plan, seed: int = 0) -> tuple[dict[int, Mixer], dict[int, Any]]:
    """Build a mixer for every layer of `plan` and initialise it from the attention that it will replace.

    Args:
        teacher: whose attention is read; not changed.
        plan: layer -> (mixer name, options).
        seed: of the parameters that have no source; each layer draws from its own stream.

    Returns:
        The mixers (fp32, on the teacher's device) and, per layer, the report of where every parameter came from.

    Raises:
        ValueError: a tensor of the attention has no place in the mixer, or the other way round.
    """
    mixers: dict[int, Mixer] = {}
    reports: dict[int, Any] = {}
    for layer, (name, options) in sorted(plan.items()):
        cls = registry.module(name)
        mixer = cls(teacher.geometry, cls.spec.options.parse(options), layer, teacher.num_layers, is_first(plan, layer))
        attention = {key: value.float() for key, value in teacher.attention(layer).state_dict().items()}
        generator = torch.Generator().manual_seed(seed * 10_007 + layer)
        reports[layer] = transfer_weights(mixer, attention, generator)
        mixers[layer] = mixer.to(next(teacher.model.parameters()).device)
    return mixers, reports


def student_config(teacher: Teacher, plan: Plan) -> Any:
    """The student's configuration: the teacher's own fields and ours."""
    from .. import __version__

    types = list(getattr(teacher.config, "layer_types", None) or _attention_types(teacher))
    fields = teacher.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "dtype"):
        fields.pop(key, None)
    fields.update(
        base_model_type=teacher.family.name,
        layer_types=["linear_attention" if layer in plan else kind for layer, kind in enumerate(types)],
        mixer_types=[plan[layer][0] if layer in plan else None for layer in range(teacher.num_layers)],
        mixers=_settings(plan),
        geometry=dict(teacher.geometry.__dict__),
        relinear_version=__version__,
    )
    config = student_classes(teacher.family.name).config(**fields)
    config.dtype = torch.float32
    return config


def _attention_types(teacher: Teacher) -> list[str]:
    return teacher.family.layer_types(teacher.config.to_dict())


def _settings(plan: Plan) -> dict[str, Any]:
    """Options by mixer, as config.json holds them: what most layers share, and under `layers` what differs."""
    settings: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in plan.values()):
        parse = registry.spec(name).options.parse
        whole = {layer: parse(options).to_dict() for layer, (other, options) in plan.items() if other == name}
        common = {
            key: Counter(repr(options[key]) for options in whole.values()).most_common(1)[0][0]
            for key in next(iter(whole.values()))
        }
        shared: dict[str, Any] = {}
        layers: dict[str, Any] = {}
        for layer, options in whole.items():
            for key, value in options.items():
                if repr(value) == common[key]:
                    shared[key] = value
                else:
                    layers.setdefault(str(layer), {})[key] = value
        settings[name] = {**shared, **({"layers": layers} if layers else {})}
    return settings


def assemble(teacher: Teacher, mixers: dict[int, Mixer]) -> Any:
    """A standalone student: its own fp32 copies of the teacher's tensors, with `mixers` in place of attention.

    Args:
        teacher: not changed.
        mixers: layer -> mixer, as from `transfer` or after align; their tensors are copied.

    Returns:
        The student's causal language model, in eval mode, all parameters requiring gradients.
    """
    plan = {layer: (mixer.spec.name, mixer.options.to_dict()) for layer, mixer in mixers.items()}
    config = student_config(teacher, plan)
    cls = student_classes(teacher.family.name).causal_lm
    student = cls._from_config(config, attn_implementation=teacher.config._attn_implementation)
    student.to(next(teacher.model.parameters()).device)
    prefix = "model.layers.{}." + teacher.family.attention + "."
    state = {
        name: value
        for name, value in teacher.model.state_dict().items()
        if not any(name.startswith(prefix.format(layer)) for layer in mixers)
    }
    for layer, mixer in mixers.items():
        state.update({prefix.format(layer) + name: value for name, value in mixer.state_dict().items()})
    student.load_state_dict(state, strict=True)
    if teacher.model.generation_config is not None:
        student.generation_config = teacher.model.generation_config
    return student.eval().requires_grad_(True)
