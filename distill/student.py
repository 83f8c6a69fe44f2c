"""Putting mixers in place: transfer from the teacher's attention, and the standalone student model."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..mixers import registry
from ..mixers.base import Mixer
from ..mixers.transfer import TransferReport
from ..mixers.transfer import transfer as transfer_weights
from .engine import Engine
from .family import check_geometry, lost
from .modeling.classes import student_classes
from .modeling.config import is_first
from .teacher import Teacher

Plan = dict[int, tuple[str, dict[str, Any]]]


def transfer(teacher: Teacher, plan: Plan, seed: int = 0) -> tuple[dict[int, Mixer], dict[int, TransferReport]]:
    """Build a mixer for every layer of `plan` and initialise it from the attention that it will replace.

    Args:
        teacher: whose attention is read; not changed.
        plan: layer -> (mixer name, options).
        seed: of the parameters that have no source; each layer draws from its own stream.

    Returns:
        The mixers (fp32, on the teacher's device) and, per layer, the report of where every parameter came from, by the
        family's own names of its tensors.

    Raises:
        UserError: a mixer cannot stand in for this attention.
        ValueError: a tensor of the attention has no place in the mixer, or the other way round.
    """
    mixers: dict[int, Mixer] = {}
    reports: dict[int, TransferReport] = {}
    for layer in sorted(plan):
        mixer, reports[layer] = transfer_layer(teacher, plan, layer, seed)
        mixers[layer] = mixer.to(next(teacher.model.parameters()).device)
    return mixers, reports


def transfer_layer(teacher: Teacher, plan: Plan, layer: int, seed: int = 0) -> tuple[Mixer, TransferReport]:
    """`transfer` for one layer of `plan`, left on the CPU."""
    mixer = _build(teacher, plan, layer)
    attention = {key: value.float() for key, value in teacher.attention_tensors(layer).items()}
    generator = torch.Generator().manual_seed(seed * 10_007 + layer)
    report = transfer_weights(mixer, attention, generator)
    report.copied = {key: teacher.family.origin(source) for key, source in report.copied.items()}
    report.derived = {key: teacher.family.derived(source) for key, source in report.derived.items()}
    report.notes += lost(mixer.spec, mixer.geometry, mixer.options)
    return mixer, report


def transfer_between(
    engine: Engine, teacher: Teacher, plan: Plan, seed: int
) -> tuple[dict[int, Mixer], dict[int, TransferReport]]:
    """`transfer` for the ranks of an engine, which may hold one copy together: reports on ranks that made one."""
    reports: dict[int, TransferReport] = {}

    def make() -> nn.ModuleDict:
        mixers, found = transfer(teacher, plan, seed)
        reports.update(found)
        return _named(mixers)

    held: Any = engine.between(make, lambda: _named(untransferred(teacher, plan)))
    return {int(layer): mixer for layer, mixer in held.items()}, reports


def _named(mixers: dict[int, Mixer]) -> nn.ModuleDict:
    return nn.ModuleDict({str(layer): mixer for layer, mixer in mixers.items()})


def untransferred(teacher: Teacher, plan: Plan) -> dict[int, Mixer]:
    """The mixers of `transfer` but for their values, on torch's default device."""
    return {layer: _build(teacher, plan, layer) for layer in sorted(plan)}


def _build(teacher: Teacher, plan: Plan, layer: int) -> Mixer:
    name, values = plan[layer]
    cls, shape = registry.module(name), teacher.geometry(layer)
    options = cls.spec.options.parse(values)
    check_geometry(cls.spec, shape, options, layer)
    return cls(shape, options, layer, teacher.num_layers, is_first(plan, layer))


def student_config(teacher: Teacher, plan: Plan, kept: dict[str, Any] | None = None) -> Any:
    """The student's configuration: the teacher's own fields and ours; `kept` as for `assemble`."""
    from .. import __version__

    fields = teacher.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "dtype"):
        fields.pop(key, None)
    parsed = {layer: (registry.spec(name), values) for layer, (name, values) in plan.items()}
    mixed = {layer: spec.layer_type(spec.options.parse(values)) for layer, (spec, values) in parsed.items()}
    layers = range(teacher.num_layers)
    fields.update(
        base_model_type=teacher.family.name,
        layer_types=[mixed.get(layer, kind) for layer, kind in enumerate(teacher.layer_types)],
        attention_types=teacher.layer_types,
        mixer_types=[plan[layer][0] if layer in plan else None for layer in layers],
        mixers=_settings(plan),
        kept_attention=kept,
        geometry=_shared({layer: asdict(teacher.geometry(layer)) for layer in layers}),
        relinear_version=__version__,
    )
    config = student_classes(teacher.family.name).config(**fields)
    config.dtype = torch.float32
    return config


def _settings(plan: Plan) -> dict[str, Any]:
    """Options by mixer, as config.json holds them."""
    settings: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in plan.values()):
        parse = registry.spec(name).options.parse
        settings[name] = _shared({i: parse(options).to_dict() for i, (other, options) in plan.items() if other == name})
    return settings


def _shared(layers: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The values that most layers have, and under `layers` what differs; all layers have the same keys."""
    common = {
        key: Counter(repr(values[key]) for values in layers.values()).most_common(1)[0][0]
        for key in next(iter(layers.values()))
    }
    shared: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for layer, values in layers.items():
        for key, value in values.items():
            if repr(value) == common[key]:
                shared[key] = value
            else:
                differences.setdefault(str(layer), {})[key] = value
    return {**shared, **({"layers": differences} if differences else {})}


def assemble(teacher: Teacher, mixers: dict[int, Mixer], kept: dict[str, Any] | None = None) -> Any:
    """A standalone student: its own fp32 copies of the teacher's tensors, with `mixers` in place of attention.

    Args:
        teacher: not changed.
        mixers: layer -> mixer, as from `transfer` or after align; their tensors are copied.
        kept: what is changed in the layers that keep their attention: fields of `modeling.kept.KeptAttention`.

    Returns:
        The student's causal language model, in eval mode, all parameters requiring gradients.
    """
    student = unfilled(teacher, mixers, kept).to(next(teacher.model.parameters()).device)
    paths = {layer: teacher.attention_path(layer) + "." for layer in mixers}
    state = {
        name: value for name, value in teacher.model.state_dict().items() if not name.startswith(tuple(paths.values()))
    }
    for layer, mixer in mixers.items():
        state.update({paths[layer] + name: value for name, value in mixer.state_dict().items()})
    student.load_state_dict(state, strict=True)
    return student


def unfilled(teacher: Teacher, mixers: dict[int, Mixer], kept: dict[str, Any] | None = None) -> Any:
    """`assemble` but for the values of the tensors, on torch's default device."""
    plan = {layer: (mixer.spec.name, mixer.options.to_dict()) for layer, mixer in mixers.items()}
    config = student_config(teacher, plan, kept)
    cls = student_classes(teacher.family.name).causal_lm
    student = cls._from_config(config, attn_implementation=teacher.config._attn_implementation)
    if teacher.model.generation_config is not None:
        student.generation_config = teacher.model.generation_config
    return student.eval().requires_grad_(True)
