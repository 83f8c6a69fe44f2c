"""What a streamed align takes on the disk and in memory, from config.json alone. Torch-free."""

from __future__ import annotations

import math
from typing import Any

from ..mixers import registry
from .costs import Counts
from .layers import LayerMap
from .stream_section import StreamSection
from .teacher_config import TeacherConfig
from .units import format_bytes

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


def calibrate_disk(
    stream: StreamSection, settings: dict[str, Any], teacher: TeacherConfig, layers: LayerMap, dtype: str
) -> dict[str, int]:
    """`disk` for the calibrate stage before a streamed align: what comes to one layer and what it gives.

    Args:
        stream: the section of the align.
        settings: of the calibrate stage, as `plan.calibrate_settings` gives them.
        teacher, layers, dtype: as for `disk`.
    """
    rows = settings["batch"] * settings["seq_len"]
    positions = sum(math.ceil(part / rows) * rows for part in (settings["tokens"], settings["tokens"] / 8))
    each, g = _PER_VALUE.get(stream.borders, _SIZES[dtype]), teacher.geometry(0)
    streams = 2 if settings["inputs"] == "student" else 1
    names = [name for name, _ in layers.converted.values()]
    handed = 2 * streams if names.count("rwkv7") > 1 else 0  # kept in fp32 where borders are as computed
    return {
        "hidden states": math.ceil(2 * streams * positions * g.hidden_size * each),
        "v_first": math.ceil(handed * positions * g.inner_size * _PER_VALUE.get(stream.borders, 4)),
        "batches": _BATCH * positions,
        "checkpoints": 2 * 4 * sum(mixer_sizes(teacher, layers).values()),
    }


def calibrate_memory(
    whole: dict[str, int],
    stream: StreamSection,
    settings: dict[str, Any],
    teacher: TeacherConfig,
    layers: LayerMap,
    counts: Counts,
    dtype: str,
) -> dict[str, int]:
    """`memory` for the calibrate stage before a streamed align, from `costs.calibrate_memory`."""
    made = memory(whole, stream, settings, teacher, layers, counts, dtype)
    return made | {"student": 4 * max(mixer_sizes(teacher, layers).values())}


def mixer_sizes(teacher: TeacherConfig, layers: LayerMap) -> dict[int, int]:
    """Parameters of each converted layer's mixer."""
    made = {}
    for layer, (name, options) in layers.converted.items():
        spec = registry.spec(name)
        first, position = layer == min(layers.layers_of(name)), layer / max(1, teacher.num_layers - 1)
        rows = spec.tensors(teacher.geometry(layer), spec.options.parse(options), first=first, position=position)
        made[layer] = sum(row.numel for row in rows)
    return made


def memory(
    whole: dict[str, int],
    stream: StreamSection,
    settings: dict[str, Any],
    teacher: TeacherConfig,
    layers: LayerMap,
    counts: Counts,
    dtype: str,
) -> dict[str, int]:
    """Bytes that a streamed align has in memory: those of the stage in memory, `whole`, with one layer at a time.

    Args:
        whole: from `costs.memory`.
        stream, settings, teacher, layers, dtype: as for `disk`.
        counts: parameters.
    """
    sizes = mixer_sizes(teacher, layers)
    share = max(sizes.values()) / sum(sizes.values())
    values = teacher.family.values(teacher.config)
    hidden = values["hidden_size"]
    layer = counts.attention + counts.ffn // counts.layers + teacher.family.norms * hidden
    each = hidden * settings["batch"] * settings["seq_len"]
    # A chunk as read, the next one, one put together and one being written; float8 is unpacked to 32 bits.
    buffers = 4 * each * (4 if stream.borders == "float8" else max(_SIZES[dtype], 2))
    made = {
        name: int(size * share) if name in ("student", "gradients", "optimizer", "average") else size
        for name, size in whole.items()
    }
    return made | {"teacher": _SIZES[dtype] * max(layer, hidden * values["vocab_size"]), "buffers": buffers}


def note(name: str, needs: dict[str, int], stream: StreamSection, align: str) -> str:
    """What `disk` found for a stage, in a sentence; `align` is the streamed one."""
    parts = ", ".join(f"{what} {format_bytes(size)}" for what, size in needs.items() if size)
    where = stream.dir or f"the run folder, in stream/{align}"
    return f"{name}: one layer at a time; up to {format_bytes(sum(needs.values()))} on the disk ({parts}); in {where}"
