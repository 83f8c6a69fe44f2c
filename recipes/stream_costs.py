"""What a streamed align takes on the disk and in memory, from config.json alone. Torch-free."""

from __future__ import annotations

import math
from typing import Any

from ..mixers import registry
from .layers import LayerMap
from .stream_section import StreamSection
from .teacher_config import TeacherConfig

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PER_VALUE = {"bfloat16": 2.0, "float8": 1 + 4 / 128}
_BATCH = 14  # ids, positions and segments in 32 bits, two marks


def disk(
    stream: StreamSection, settings: dict[str, Any], teacher: TeacherConfig, layers: LayerMap, dtype: str, valid: int
) -> dict[str, int]:
    """Bytes that a streamed align has on the disk at most, by use, with one worker.

    Args:
        stream: the section.
        settings: of the stage, as `plan.stage_settings` gives them.
        teacher: geometry.
        layers: what is converted.
        dtype: in which the teacher computes.
        valid: held-out tokens of a measurement.
    """
    positions = math.ceil(settings["tokens"] / (settings["batch"] * settings["seq_len"])) * settings["batch"]
    positions = positions * settings["seq_len"] + valid
    each = _PER_VALUE.get(stream.borders, _SIZES[dtype])
    count = max(layers.converted) + 1
    blocks = math.ceil(count / (stream.blocks or count))
    # Besides the first ones of the blocks: what a layer reads and writes, where that is not among them.
    held = count if stream.keep_borders else min(count, blocks + (1 if blocks == 1 else 2))
    sizes = mixer_sizes(teacher, layers)
    g = teacher.geometry(0)
    names = [name for name, _ in layers.converted.values()]
    handed = sum(names.count(name) > 1 for name in {"rwkv7"} & set(names))
    # A commit within a layer holds weights and both moments; a layer's last one is held twice until the stage's own.
    commits = 2 * 4 * sum(sizes.values()) + (settings["keep"] + 1) * 12 * max(sizes.values())
    return {
        "hidden states": math.ceil(held * positions * g.hidden_size * each),
        "v_first": math.ceil(handed * positions * g.inner_size * each),
        "batches": _BATCH * positions,
        "checkpoints": commits,
    }


def mixer_sizes(teacher: TeacherConfig, layers: LayerMap) -> dict[int, int]:
    """Parameters of each converted layer's mixer."""
    made = {}
    for layer, (name, options) in layers.converted.items():
        spec = registry.spec(name)
        first, position = layer == min(layers.layers_of(name)), layer / max(1, teacher.num_layers - 1)
        rows = spec.tensors(teacher.geometry(layer), spec.options.parse(options), first=first, position=position)
        made[layer] = sum(row.numel for row in rows)
    return made
