"""Making a cache of logits: the teacher reads the stage's batches once, in their order."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from ..data.batch import Batch
from ..data.source import Source
from ..engine.world import World
from ..errors import MachineError, UserError
from ..lock import RunLock, holder
from ..losses import CHUNK_ELEMENTS, teacher_logits
from ..precision import autocast
from ..teacher import Teacher
from ..topk_loss import TopK, outcomes
from ..watchdog import beat
from . import sizes
from .key import MANIFEST
from .store import LogitCache, check_key, read_manifest, read_record, row_tokens, write_shard


def make_cache(
    teacher: Teacher,
    source: Source,
    folder: Path,
    key: dict[str, Any],
    *,
    micro_batch: int | None = None,
    world: World | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    should_stop: Callable[[], bool] = lambda: False,
    shard_bytes: int = sizes.SHARD_BYTES,
) -> LogitCache | None:
    """The cache at `folder`, made where it is not complete; shards that lie there already are kept.

    Of several ranks each makes every size-th shard; all must call it, with a source that gives the whole batches.

    Args:
        teacher: whole, on the device that it runs on.
        source: the stage's batches from the first one on; it is read to the stage's end.
        folder: of this cache alone.
        key: from `cache_key`.
        micro_batch: rows per forward pass; None takes a whole batch.
        world: the processes.
        progress: called with the tokens read so far.
        should_stop: asked before every batch; True ends the making, to be gone on with later.
        shard_bytes: of one file, at most.

    Returns:
        The cache, or None where it was stopped.

    Raises:
        UserError: the folder holds another cache, or another process makes this one.
        MachineError: not enough disk space; every finished shard stays.
    """
    world = world or World()
    locks: list[RunLock] = []
    try:
        begun = world.first(lambda: _begin(folder, key, teacher.model.config.vocab_size, shard_bytes, locks))
        if not begun["complete"]:
            work = _Making(teacher, folder, key, begun["rows_per_shard"], micro_batch, world)
            if not all(world.outcomes(lambda: work.run(source, progress, should_stop))):
                return None
            world.first(lambda: _finish(folder, begun, work.rows, work.steps))
    finally:
        for lock in locks:
            lock.release()
    return LogitCache(folder, key)


def bytes_needed(folder: Path, key: dict[str, Any], vocab: int) -> tuple[int, int]:
    """Bytes of the whole cache, at most, and of what lies there already."""
    total = sizes.cache_bytes(key["tokens"], key["data.batch"], key["data.seq_len"], key["top_k"], key["dtype"], vocab)
    made = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors")) if folder.is_dir() else 0
    return total, made


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        MachineError: fewer bytes are free than `needed`.
    """
    parent = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise MachineError(
            f"{folder}: the cache of logits needs {needed:,} bytes more, {free:,} are free there. Free some, name "
            "another folder (teacher_logits.dir), or keep fewer tokens (teacher_logits.top_k)"
        )


def _begin(folder: Path, key: dict[str, Any], vocab: int, shard_bytes: int, locks: list[RunLock]) -> dict[str, Any]:
    """cache.json as it is, or of a cache to be made, locked; `complete` only where every shard is there."""
    found = read_manifest(folder)
    if found is not None:
        check_key(folder, found, key)
        if found["complete"] and all(read_record(folder, n) == record for n, record in enumerate(found["shards"])):
            return found
    total, made = bytes_needed(folder, key, vocab)
    check_disk(folder, total - made)
    with files.disk_guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    locks.append(_lock(folder))
    files.clean_temporaries(folder)
    per_position = sizes.position_bytes(key["top_k"], key["dtype"], vocab)
    per = sizes.rows_per_shard(key["data.seq_len"], per_position, shard_bytes)
    manifest = {"key": key, "vocab": vocab, "rows_per_shard": per, **(found or {}), "complete": False}
    files.write_json(folder / MANIFEST, manifest)
    return manifest


def _lock(folder: Path) -> RunLock:
    try:
        return RunLock(folder)
    except UserError:
        busy = holder(folder) or {}
        raise UserError(
            f"{folder}: is being made by process {busy.get('pid')} on {busy.get('host')}, since {busy.get('since')}. "
            "Wait for it, then type the same command again"
        ) from None


def _finish(folder: Path, begun: dict[str, Any], rows: int, steps: int) -> None:
    records = [read_record(folder, number) for number in range(-(-rows // begun["rows_per_shard"]))]
    held = [record for record in records if record is not None]
    positions = sum(record["positions"] for record in held)
    if len(held) < len(records) or sum(record["rows"] for record in held) != rows:
        raise MachineError(f"{folder}: a shard is missing that had been written. Type the same command again")
    summary = {
        "rows": rows,
        "steps": steps,
        "positions": positions,
        "bytes": sum(record["bytes"] for record in held),
        "tail_mass": sum(record["tail_mass"] for record in held) / max(1, positions),
    }
    files.write_json(folder / MANIFEST, {**begun, **summary, "shards": held, "complete": True})


@dataclass
class _Making:
    """One rank's work: every size-th shard."""

    teacher: Teacher
    folder: Path
    key: dict[str, Any]
    per: int
    micro_batch: int | None
    world: World
    rows: int = 0
    steps: int = 0
    held: list[dict[str, np.ndarray]] = field(default_factory=list)  # parts of the shard under way
    number: int = 0

    def run(self, source: Source, progress: Callable[[int], None], should_stop: Callable[[], bool]) -> bool:
        """All steps of the stage; False where it was stopped."""
        tokens = 0
        while tokens < self.key["tokens"]:
            if should_stop():
                return False
            batch = source.next_batch()
            tokens += batch.tokens
            start = 0
            while start < batch.shape[0]:
                # As far as the shard that the row is in reaches.
                number, within = divmod(self.rows, self.per)
                stop = min(batch.shape[0], start + self.per - within)
                if number % self.world.size == self.world.rank and read_record(self.folder, number) is None:
                    self._take(batch.rows(start, stop), number)
                self.rows += stop - start
                start = stop
                if self.rows % self.per == 0:
                    self._write()
            self.steps += 1
            beat("teacher's logits")
            progress(tokens)
        self._write()
        return True

    def _take(self, batch: Batch, number: int) -> None:
        self.number = number
        size = self.micro_batch or batch.shape[0]
        device = next(self.teacher.model.parameters()).device
        for start in range(0, batch.shape[0], size):
            part = batch.rows(start, min(start + size, batch.shape[0]))
            made = predicted(
                self.teacher, part.to(device), self.key["top_k"], self.key["temperature"], self.key["precision"]
            )
            small = sizes.id_bytes(self.teacher.model.config.vocab_size) == 2
            self.held.append(
                {
                    "ids": made.ids.cpu().numpy().astype(np.uint16 if small else np.int32),
                    "log_probs": made.log_probs.cpu().numpy().astype(self.key["dtype"]),
                    "log_tail": made.log_tail.float().cpu().numpy(),
                    "begins": part.targets[:, 1:].sum(1).cpu().numpy(),
                    "tokens": row_tokens(part),
                }
            )

    def _write(self) -> None:
        """The shard under way, if it is this rank's."""
        if not self.held:
            return
        tensors = {name: np.concatenate([part[name] for part in self.held]) for name in self.held[0]}
        self.held = []
        tensors["begins"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(tensors["begins"], dtype=np.int64)])
        try:
            write_shard(self.folder, self.number, tensors)
        except MachineError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
            if not full:
                raise
            free = shutil.disk_usage(self.folder).free
            raise MachineError(
                f"{self.folder}: no space left on the disk ({free:,} bytes free); {self.number} shards are made and "
                "stay. Free some space, then type the same command again: it goes on from there"
            ) from error


@torch.no_grad()
def predicted(teacher: Teacher, batch: Batch, k: int, temperature: float = 1.0, precision: str = "fp32") -> TopK:
    """The teacher's k + 1 outcomes at a batch's counted positions, row after row, as glue would see its logits.

    Args:
        teacher: frozen.
        batch: on the teacher's device.
        k: likeliest tokens.
        temperature: τ.
        precision: of the forward pass.
    """
    device = batch.input_ids.device.type
    head, shape = teacher.model.get_output_embeddings(), teacher.head
    with autocast(device, precision):
        hidden = teacher.backbone(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    flat = hidden[:, :-1][batch.targets[:, 1:]]
    exact = torch.promote_types(flat.dtype, torch.float32)
    size = max(1, CHUNK_ELEMENTS.get(device, 2**26) // head.weight.shape[0])
    parts = [
        outcomes(
            teacher_logits(
                flat, head.weight, head.bias, slice(start, start + size), exact, shape.scale, shape.softcap, compute
            ),
            k,
            temperature,
        )
        for start in range(0, len(flat), size)
    ]
    if not parts:
        return TopK(flat.new_zeros((0, k), dtype=torch.int64), flat.new_zeros((0, k)), flat.new_zeros(0))
    return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_probs", "log_tail")))
