"""The converted model's weights from the teacher's shards and the mixers' commit, a part at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...mixers import registry
from ..checkpoint import Checkpoint
from ..errors import UserError
from ..modeling.config import is_first
from ..student import Plan
from .teacher import StreamedTeacher

PART = 500_000_000
"""Bytes of a shard at most, and so about what is in memory at once; one tensor may be larger."""


class StreamedWeights:
    """Every tensor of the student, the teacher's where it keeps them, without ever having all of them in memory."""

    def __init__(self, teacher: StreamedTeacher, plan: Plan, commit: Checkpoint, dtype: str, shard: int = PART) -> None:
        """Look up names and sizes.

        Args:
            teacher: whose shards are read.
            plan: layer -> (mixer, options).
            commit: of an align stage: all mixers.
            dtype: of the weights written; what must stay fp32 does.
            shard: bytes of a shard at most, where that is less than `PART`.

        Raises:
            UserError: a tensor of the teacher is in none of its shards, or the commit lacks one of a mixer.
        """
        self.teacher, self.dtype, self.part = teacher, getattr(torch, dtype), min(PART, shard)
        self.paths = {layer: teacher.attention_path(layer) + "." for layer in plan}
        self.mixers = commit.weights()
        self.fp32: set[str] = set()
        gone = tuple(self.paths.values())
        shapes = {name: value.shape for name, value in teacher.model.state_dict().items() if not name.startswith(gone)}
        kept = [name for name in shapes if name in teacher.shards.places]
        left = shapes.keys() - set(kept) - (set(teacher.model.all_tied_weights_keys) if _ties(teacher) else set())
        if left:
            raise UserError(f"{teacher.folder}: no shard holds {min(left)}. Fetch the files again")
        self.sizes = {name: shapes[name].numel() * self.dtype.itemsize for name in kept}
        for layer, (kind, options) in plan.items():
            spec = registry.spec(kind)
            position = layer / max(1, teacher.num_layers - 1)
            shape, parsed = teacher.geometry(layer), spec.options.parse(options)
            for row in spec.tensors(shape, parsed, first=is_first(plan, layer), position=position):
                name = self.paths[layer] + row.name
                if f"{layer}.{row.name}" not in self.mixers:
                    raise UserError(f"{commit.path}: lacks {layer}.{row.name}: it belongs to another recipe")
                if row.fp32:
                    self.fp32.add(name)
                self.sizes[name] = row.numel * (4 if row.fp32 else self.dtype.itemsize)
        self.origin = {self.paths[int(n.partition(".")[0])] + n.partition(".")[2]: n for n in self.mixers}

    @property
    def bytes(self) -> int:
        """Of all of it."""
        return sum(self.sizes.values())

    def write(self, folder: Path) -> None:
        """Shards with their index, as transformers writes them."""
        parts = list(self._parts())
        names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
        if len(parts) == 1:
            names = ["model.safetensors"]
        for part, file in zip(parts, names, strict=True):
            save_file({name: self._read(name) for name in part}, folder / file, metadata={"format": "pt"})
        if len(parts) > 1:
            places = {name: file for part, file in zip(parts, names, strict=True) for name in part}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(places.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _parts(self) -> Iterator[list[str]]:
        part: list[str] = []
        size = 0
        for name in sorted(self.sizes):
            if part and size + self.sizes[name] > self.part:
                yield part
                part, size = [], 0
            part.append(name)
            size += self.sizes[name]
        yield part

    def _read(self, name: str) -> Tensor:
        tensor = self.mixers[self.origin[name]] if name in self.origin else self.teacher.shards.read(name)
        return tensor if name in self.fp32 or not tensor.is_floating_point() else tensor.to(self.dtype)


def _ties(teacher: StreamedTeacher) -> bool:
    return bool(teacher.config.tie_word_embeddings)
