"""A step that failed, kept for another look: its batch, the generators' state, and the place before it.

RUN/replay/STAGE-STEP/
    batch.safetensors   the whole batch, of all ranks: the fields of `data.batch.Batch`
    rng.safetensors     numpy's and torch's generators as the step began (rank 0's)
    replay.json         stage, step, tokens, what was not finite, losses, the checkpoint before it, python's generator

`relinear run RECIPE --resume` goes on from that checkpoint and carries out this very step again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from . import files
from .checkpoint import put_rng, take_rng
from .data.batch import Batch
from .data.source import Source
from .errors import UserError

FOLDER = "replay"
_BATCH, _RNG, _RECORD = "batch.safetensors", "rng.safetensors", "replay.json"


class Moment:
    """Where the data and the generators stood when the last step began.

    A source's state may be large (a stream's shuffle buffer), so it is not taken before every step: it is kept from the
    last commit, and the batches since then are counted.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._drawn = 0
        self._rng: tuple[Any, dict[str, Tensor]] | None = None

    def mark(self, state: dict[str, Any]) -> None:
        """The source stands where `state` says."""
        self._state, self._drawn = state, 0

    def begin(self) -> None:
        """A step begins, and is about to draw its batch."""
        self._rng = take_rng()
        self._drawn += 1

    def rewind(self, source: Source) -> None:
        """Put source and generators back to where the step began that is under way."""
        source.load_state_dict(self._state)
        self._drawn -= 1
        for _ in range(self._drawn):
            source.next_batch()
        if self._rng is not None:
            put_rng(*self._rng)

    def save(self, folder: Path, batch: Batch, record: dict[str, Any]) -> Path:
        """Write a replay folder.

        Args:
            folder: of the run.
            batch: the whole one.
            record: plain values for replay.json, `stage` and `step` among them.

        Returns:
            The folder made.

        Raises:
            MachineError: no room; nothing else is harmed.
        """
        python, tensors = self._rng if self._rng is not None else take_rng()
        path = folder / FOLDER / f"{record['stage']}-{record['step']}"
        fields = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        held = {name: value.detach().cpu().contiguous() for name, value in fields.items()}

        def write(made: Path) -> None:
            save_file(held, made / _BATCH, metadata={"format": "pt"})
            save_file(tensors, made / _RNG, metadata={"format": "pt"})
            text = json.dumps(files.finite(record) | {"python_rng": python}, indent=1)
            (made / _RECORD).write_text(text, encoding="utf-8")

        files.commit_directory(path, write, sum(t.numel() * t.element_size() for t in held.values()))
        return path


def read_replay(path: Path | str) -> tuple[Batch, dict[str, Any]]:
    """The batch and the record of a replay folder; python's, numpy's and torch's generators are put as they were.

    Raises:
        UserError: it is none, or cannot be read.
    """
    path = Path(path)
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        batch = Batch(**load_file(path / _BATCH))
        put_rng(record.pop("python_rng"), load_file(path / _RNG))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path}: not a replay folder ({reason}). A step that failed names its own: RUN/replay/STAGE-STEP"
        ) from error
    return batch, record
