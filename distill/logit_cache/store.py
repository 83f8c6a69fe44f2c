"""The files of a cache: shards of whole rows, each written at once with a record of its checksum; reading by row.

FOLDER/cache.json            the key, how many rows a shard holds, and once it is complete all records
FOLDER/shard-00000.safetensors
FOLDER/shard-00000.json      its record: rows, positions, bytes, checksum

Row r of the stage, counted from its first batch on, lies in shard r // rows_per_shard. A shard holds, for its R rows
and the P positions that count in them, row after row:

    ids (P, k) uint16 or int32 · log_probs (P, k) · log_tail (P,) fp32 · begins (R + 1,) int64 · tokens (R,) uint32

`begins` says where a row's positions start, `tokens` is a checksum of what the row held when the teacher read it.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .. import files
from ..data.batch import Batch
from ..data.source import Source
from ..digest import checksum
from ..errors import MachineError, UserError
from ..topk_loss import TopK
from .key import MANIFEST, differences

_OPEN = 4
"""Shards held open at once; reading goes forward, so more would not be looked at again."""


def shard_path(folder: Path, number: int) -> Path:
    """Of a shard; its record lies beside it as .json."""
    return folder / f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """cache.json, None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Remove the folder; the cache is made again") from None


def check_key(folder: Path, manifest: dict[str, Any], key: dict[str, Any]) -> None:
    """Refuse a cache of something else.

    Raises:
        UserError: naming all that differs.
    """
    found = differences(manifest.get("key", {}), json.loads(json.dumps(key)))
    if found:
        raise UserError(
            f"{folder}: holds the logits of something else; {'; '.join(found)}. Set them back, or name another folder "
            "(teacher_logits.dir), where the right ones are then made"
        )


def write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """One shard and its record, each whole or not at all, the record last.

    Raises:
        MachineError: the disk is full; what was made before stays.
    """
    path = shard_path(folder, number)
    files.write_bytes(path, save(tensors, metadata={"format": "np"}))
    record = {
        "rows": len(tensors["tokens"]),
        "positions": len(tensors["log_tail"]),
        "bytes": path.stat().st_size,
        "blake2b": checksum(path),
        "tail_mass": float(np.exp(tensors["log_tail"].astype(np.float64)).sum()),
    }
    files.write_json(path.with_suffix(".json"), record)
    return record


def read_record(folder: Path, number: int) -> dict[str, Any] | None:
    """A shard's record, None where the shard is not there as it was written."""
    path = shard_path(folder, number)
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return record if path.stat().st_size == record["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def row_tokens(batch: Batch) -> np.ndarray:
    """(B,) uint32: a checksum of each row's tokens, positions and targets, the same however wide the batch is."""
    columns = [batch.input_ids, batch.position_ids, batch.targets]
    ids, positions, targets = (column.cpu().numpy() for column in columns)
    made = np.zeros(len(ids), np.uint32)
    for row, length in enumerate(batch.real.sum(1).tolist()):
        value = zlib.crc32(ids[row, :length].astype("<i4").tobytes())
        value = zlib.crc32(positions[row, :length].astype("<i4").tobytes(), value)
        made[row] = zlib.crc32(targets[row, :length].astype(np.uint8).tobytes(), value)
    return made


class LogitCache:
    """A complete cache, read by row: nothing here moves on, so a resumed run or any rank reads what it needs.

    Attributes:
        folder: where it lies.
        manifest: cache.json.
    """

    def __init__(self, folder: Path, key: dict[str, Any] | None = None) -> None:
        """Open it.

        Args:
            folder: of the cache.
            key: that it must have; None takes any.

        Raises:
            UserError: no cache, not complete, or of something else.
            MachineError: a shard is missing or cut short.
        """
        self.folder = folder
        found = read_manifest(folder)
        if found is None or not found.get("complete"):
            state = "no cache of logits" if found is None else "not complete"
            raise UserError(f"{folder}: {state}. Make it: relinear prepare RECIPE")
        if key is not None:
            check_key(folder, found, key)
        self.manifest = found
        for number, record in enumerate(found["shards"]):
            path = shard_path(folder, number)
            size = path.stat().st_size if path.exists() else None
            if size != record["bytes"]:
                what = "missing" if size is None else f"{size:,} bytes, written with {record['bytes']:,}"
                raise MachineError(f"{path}: {what}. It alone is made again by: relinear prepare RECIPE")
        self._verified: set[int] = set()
        self._shards: dict[int, tuple[Any, np.ndarray, np.ndarray]] = {}

    @property
    def name(self) -> str:
        """Of its folder's key: what a stage that resumes must find again."""
        from .key import cache_name

        return cache_name(self.manifest["key"])

    def check(self, batch: Batch) -> None:
        """Refuse a batch that the teacher did not read as these rows.

        Raises:
            UserError: naming the row.
        """
        assert batch.index is not None
        rows = batch.index.tolist()
        wanted = row_tokens(batch)
        for number, piece, places in self._by_shard(rows):
            tokens = self._shard(number)[2]
            for place, row in zip(places, piece, strict=True):
                if tokens[row] != wanted[place]:
                    raise UserError(
                        f"{self.folder}: row {rows[place]} of the data is not what the teacher read when the cache was "
                        "made: the text or its tokenizer changed since. Restore it, or remove the folder; the cache is "
                        "made again"
                    )

    def read(self, index: torch.Tensor) -> TopK:
        """The outcomes of some rows' counted positions, in the order given, on the CPU.

        Args:
            index: (B,) the rows' numbers in the stage (`Batch.index`).

        Raises:
            UserError: a row beyond the cache.
            MachineError: a shard that is not as it was written.
        """
        parts: list[list[np.ndarray]] = []
        for number, rows, _ in self._by_shard(index.tolist()):
            file, begins, _ = self._shard(number)
            slices = {name: file.get_slice(name) for name in ("ids", "log_probs", "log_tail")}
            for first, last in _runs(rows):
                begin, end = int(begins[first]), int(begins[last + 1])
                parts.append([slices[name][begin:end] for name in slices])
        ids, log_probs, log_tail = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return TopK(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(log_probs), torch.from_numpy(log_tail))

    def _by_shard(self, rows: list[int]) -> list[tuple[int, list[int], list[int]]]:
        """(shard, rows within it, their places in `rows`) for rows one after the other of one shard."""
        per, total = self.manifest["rows_per_shard"], self.manifest["rows"]
        made: list[tuple[int, list[int], list[int]]] = []
        for place, row in enumerate(rows):
            if not 0 <= row < total:
                raise UserError(
                    f"{self.folder}: holds {total} rows, row {row} was asked for. Remove it to make it anew"
                )
            number, within = divmod(row, per)
            if not made or made[-1][0] != number:
                made.append((number, [], []))
            made[-1][1].append(within)
            made[-1][2].append(place)
        return made

    def _shard(self, number: int) -> tuple[Any, np.ndarray, np.ndarray]:
        """A shard held open, with `begins` and `tokens`; checked against its checksum when it is first opened."""
        if number not in self._shards:
            path, record = shard_path(self.folder, number), self.manifest["shards"][number]
            mend = f"Remove it, and it alone is made again by: rm {path} && relinear prepare RECIPE"
            try:
                found = record["blake2b"] if number in self._verified else checksum(path)
                if found != record["blake2b"]:
                    raise MachineError(
                        f"{path}: changed since it was written (checksum {found}, expected {record['blake2b']}). {mend}"
                    )
                file = safe_open(path, "np")
                held = file, file.get_tensor("begins"), file.get_tensor("tokens")
            except (OSError, SafetensorError) as error:
                raise MachineError(f"{path}: cannot be read ({error}). {mend}") from None
            self._verified.add(number)
            self._shards[number] = held
            for old in list(self._shards)[:-_OPEN]:
                del self._shards[old]
        return self._shards[number]


class CheckedSource:
    """A stage's source, every batch of which is compared with what the teacher read."""

    def __init__(self, source: Source, cache: LogitCache) -> None:
        self.source, self.cache = source, cache

    def next_batch(self) -> Batch:
        """The next batch."""
        batch = self.source.next_batch()
        self.cache.check(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The source's."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The source goes on from there."""
        self.source.load_state_dict(state)


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """First and last of every run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], row
        else:
            runs.append((row, row))
    return runs
