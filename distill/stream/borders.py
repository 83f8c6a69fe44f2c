"""What lies on the disk between two layers: a folder of chunks, one for each optimizer step's batch.

FOLDER/train-000012.safetensors   tensors of batch 12; its metadata hold a hash of names, types, shapes and bytes
FOLDER/valid-000000.safetensors   likewise of a held-out batch
FOLDER/border.json                written when every chunk is there: `key`, and how many chunks of each part

A chunk appears whole or not at all where the machine stays up, and is known by its hash where it did not. Until
border.json is there a chunk that does not fit its hash is made again; afterwards it is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..errors import MachineError, RunFailed, UserError

FORMATS = ("compute", "bfloat16", "float8")
"""How hidden states are kept: as they are computed; rounded; in float8 (e4m3) with a scale for each 128 channels."""
PARTS = ("train", "valid")
GROUP = 128
_DONE = "border.json"
_LARGEST = 448.0  # of e4m3


class Border:
    """Tensors of every batch, by part and number."""

    def __init__(self, folder: Path, key: str, kind: str = "compute", source: Path | None = None) -> None:
        """Open it; the folder is made when first written to.

        Args:
            folder: of its own.
            key: what the contents depend on; a finished border of another key is refused.
            kind: of `FORMATS`, for floating-point tensors.
            source: what else to remove if a chunk is damaged, for the contents to be made again.

        Raises:
            UserError: the folder holds a finished border of another key.
        """
        self.folder, self.key, self.kind, self.source = folder, key, kind, source
        self._written: set[Path] = set()
        self.counts: dict[str, int] | None = None
        done = folder / _DONE
        if done.exists():
            held = json.loads(done.read_text(encoding="utf-8"))
            if held["key"] != key:
                raise UserError(
                    f"{folder}: holds hidden states of another teacher, other data or other settings. Give the run "
                    "another folder (stages.align.stream.dir=DIR), or remove this one"
                )
            self.counts = held["counts"]

    @property
    def finished(self) -> bool:
        """Every chunk is there."""
        return self.counts is not None or (self.folder / _DONE).exists()

    def path(self, part: str, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{part}-{number:06}.safetensors"

    def write(self, part: str, number: int, tensors: dict[str, Tensor], *, durable: bool = False) -> None:
        """Write a chunk.

        Args:
            part: of `PARTS`.
            number: of the batch.
            tensors: by name; floating-point ones are kept as `kind` says.
            durable: wait until the disk has it, for what cannot be computed again.

        Raises:
            MachineError: no room.
        """
        path = self.path(part, number)
        packed = {key: t for name, tensor in tensors.items() for key, t in _pack(name, tensor, self.kind).items()}
        needed = sum(t.numel() * t.element_size() for t in packed.values())
        temporary = path.with_name(f"{path.name}{files.TEMPORARY}{os.getpid()}")
        with files.disk_guard(path, needed):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(packed, temporary, metadata={"hash": _hash(packed)})
                if durable:
                    files.sync(temporary)
                temporary.replace(path)
                self._written.add(path)
            except SafetensorError as error:
                if any(f"os error {code}" in str(error) for code in (27, 28, 122)):
                    raise MachineError(files.full_disk(path, needed)) from error
                raise
            finally:
                temporary.unlink(missing_ok=True)

    def read(self, part: str, number: int) -> dict[str, Tensor]:
        """A chunk's tensors, mapped from the file where they are kept as they are.

        Raises:
            UserError: the file is missing, or not as it was written.
        """
        path = self.path(part, number)
        packed, problem = _load(path)
        if packed is None:
            also = "" if self.source is None else f" and {self.source}"
            raise UserError(
                f"{path}: {problem}. Remove the folder {self.folder}{also}, then run the same command with --resume: "
                "what was there is computed again"
            )
        return _unpack(packed)

    def has(self, part: str, number: int) -> bool:
        """The chunk is there and fits its hash, which is not looked at again where this process wrote it."""
        if self.path(part, number) in self._written:
            return self.path(part, number).exists()
        return _load(self.path(part, number))[0] is not None

    def finish(self, counts: dict[str, int]) -> None:
        """Mark it finished.

        Raises:
            RunFailed: a chunk is missing.
        """
        missing = [self.path(part, i) for part, count in counts.items() for i in range(count)]
        missing = [path for path in missing if not path.exists()]
        if missing:
            raise RunFailed(f"{missing[0]}: was not written ({len(missing)} chunks are missing). Run it with --resume")
        self.folder.mkdir(parents=True, exist_ok=True)
        files.clean_temporaries(self.folder)
        files.write_json(self.folder / _DONE, {"key": self.key, "format": self.kind, "counts": counts})
        self.counts = counts

    def remove(self) -> None:
        """Remove the folder: first the mark, so that what a kill leaves is not taken for a whole border."""
        (self.folder / _DONE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.counts = None
        self._written.clear()


class Ahead:
    """Reads chunks in their order, one ahead of what is asked for."""

    def __init__(self, borders: Iterable[Border], part: str, count: int) -> None:
        self.borders, self.part, self.count = list(borders), part, count
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[dict[str, Tensor]]]] | None = None

    def read(self, number: int) -> list[dict[str, Tensor]]:
        """That chunk of every border; the next one is read meanwhile."""
        known = self._next is not None and self._next[0] == number
        found = self._next[1].result() if self._next is not None and known else self._read(number)
        after = number + 1
        self._next = (after, self._pool.submit(self._read, after)) if after < self.count else None
        return found

    def _read(self, number: int) -> list[dict[str, Tensor]]:
        return [border.read(self.part, number) for border in self.borders]

    def close(self) -> None:
        """Wait for the last read."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next = None


def bytes_per_value(kind: str, compute: int) -> float:
    """Bytes that one number of a hidden state takes on the disk.

    Args:
        kind: of `FORMATS`.
        compute: bytes of a number as it is computed.
    """
    return {"compute": compute, "bfloat16": 2, "float8": 1 + 4 / GROUP}[kind]


def _pack(name: str, tensor: Tensor, kind: str) -> dict[str, Tensor]:
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point() or kind == "compute":
        return {name: tensor}
    if kind == "bfloat16":
        return {name: tensor.bfloat16()}
    width = tensor.shape[-1]
    group = GROUP if width % GROUP == 0 else width
    groups = tensor.float().unflatten(-1, (width // group, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    packed = (groups / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return {f"{name}/values": packed.flatten(-2), f"{name}/scale": scale.squeeze(-1)}


def _unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for key, tensor in packed.items():
        name, _, what = key.partition("/")
        if not what:
            made[name] = tensor
        elif what == "values":
            scale = packed[f"{name}/scale"]
            made[name] = (tensor.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)
    return made


def _load(path: Path) -> tuple[dict[str, Tensor] | None, str]:
    """What a file holds, or what is wrong with it."""
    try:
        with safe_open(path, "pt") as file:
            wanted = (file.metadata() or {}).get("hash")
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = _hash(packed)
    except FileNotFoundError:
        return None, "is not there"
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        return None, f"cannot be read ({str(error).splitlines()[0]})"
    if found != wanted:
        return None, f"is not as it was written (its hash is {found}, and was {wanted})"
    return packed, ""


def _hash(packed: dict[str, Tensor]) -> str:
    made = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(packed.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        data: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        made.update(data.data)
    return made.hexdigest()
