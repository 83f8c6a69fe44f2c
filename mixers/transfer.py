"""Initialise a mixer from the attention that it replaces, row by row of its spec's table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .base import Mixer
from .specs.base import Geometry, TensorSpec


def repeat_heads(source: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Give every query head the key/value rows of its group: (K * d, ...) -> (H * d, ...), whole heads in order."""
    heads = source.unflatten(0, (geometry.num_kv_heads, geometry.head_dim))
    return heads.repeat_interleave(geometry.num_heads // geometry.num_kv_heads, 0).flatten(0, 1)


DERIVATIONS: dict[str, Callable[[torch.Tensor, Geometry], torch.Tensor]] = {"repeat_heads": repeat_heads}
"""The functions that a `derived` row may name, as in `repeat_heads(k_proj.weight)`."""


@dataclass
class TransferReport:
    """Where every parameter of a mixer came from.

    Attributes:
        copied: parameter name -> attention tensor that it equals.
        derived: parameter name -> function of an attention tensor.
        new: parameter name -> initial value, in words.
        dropped: attention tensors that the mixer has no use for, as its spec says.
        parameters: elements by source.
        notes: what attention did and the mixer does not do, in words.
    """

    copied: dict[str, str] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=lambda: {"copied": 0, "derived": 0, "new": 0})
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for result.json."""
        return asdict(self)


@torch.no_grad()
def transfer(
    mixer: Mixer, attention: Mapping[str, torch.Tensor], generator: torch.Generator | None = None
) -> TransferReport:
    """Fill `mixer` in place by its spec's table.

    Args:
        mixer: freshly built; every parameter is overwritten.
        attention: the attention's parameters by name (`q_proj.weight`, ...). Each must be used, or dropped by the spec.
        generator: a CPU generator for the rows that are new.

    Returns:
        Every parameter, under copied, derived or new, and what was dropped.

    Raises:
        ValueError: a parameter without a row, a row without a parameter or source, shapes that differ, a dtype that
            would lose bits, or an attention tensor that no row uses. All of them at once; nothing is changed.
    """
    table = {row.name: row for row in mixer.table()}
    parameters = dict(mixer.named_parameters())
    problems = [f"parameter {name} has no row in the table" for name in parameters if name not in table]
    problems += [f"row {name} has no parameter" for name in table if name not in parameters]
    values: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for row in table.values():
        if row.source == "new" or row.name not in parameters:
            continue
        source, function = _origin(row)
        used.add(source)
        if function is not None and function not in DERIVATIONS:
            problems.append(f"row {row.name} names the unknown function {function!r}")
        elif source not in attention:
            problems.append(f"row {row.name} needs {source}, which the attention lacks")
        else:
            value = attention[source]
            value = value if function is None else DERIVATIONS[function](value, mixer.geometry)
            problem = _misfit(row.name, value, parameters[row.name])
            problems += [problem] if problem else []
            values[row.name] = value
    dropped = mixer.spec.drops(mixer.geometry, mixer.options)
    problems += [
        f"attention tensor {name} would be dropped: no row uses it"
        for name in attention
        if name not in used and name not in dropped
    ]
    if problems:
        raise ValueError(f"transfer to {mixer.spec.name}, layer {mixer.layer_idx}:\n" + "\n".join(problems))

    mixer.reset_parameters(generator)
    report = TransferReport(dropped=[name for name in attention if name in dropped])
    for row in table.values():
        if row.name in values:
            parameters[row.name].copy_(values[row.name])
        getattr(report, row.source)[row.name] = row.origin
        report.parameters[row.source] += row.numel
    return report


def _origin(row: TensorSpec) -> tuple[str, str | None]:
    """Attention tensor and function that a row names; the function is None for a copy."""
    if row.source == "copied":
        return row.origin, None
    match = re.fullmatch(r"(\w+)\(([\w.]+)\)", row.origin)
    if match is None:
        return row.origin, ""
    return match[2], match[1]


def _misfit(name: str, value: torch.Tensor, parameter: torch.Tensor) -> str | None:
    if value.shape != parameter.shape:
        return f"{name}: shape {tuple(value.shape)} does not fit {tuple(parameter.shape)}"
    if torch.promote_types(value.dtype, parameter.dtype) != parameter.dtype:
        return f"{name}: {value.dtype} into {parameter.dtype} would lose bits"
    return None
