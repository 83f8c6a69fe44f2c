"""The batches of a stage on the disk, and a `Source` that gives them with a layer's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.source import Source
from ..errors import UserError
from .borders import Ahead, Border

TENSORS = ("input_ids", "position_ids", "segments", "real", "targets")


@dataclass
class BorderBatch(Batch):
    """A batch, or rows of it, with what comes to a layer.

    Attributes:
        hidden: (B, T, D) of the border below the layer; empty where there is none yet.
        shared: what lower layers handed on (`MixerInputs.shared`), (B, T, …) each.
        part: of `borders.PARTS`.
        number: of the whole batch.
        size: rows of the whole batch.
    """

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    shared: dict[str, Tensor] = field(default_factory=dict)
    part: str = "train"
    number: int = 0
    size: int = 0

    def to(self, device: torch.device | str) -> BorderBatch:
        """The same batch on `device`."""
        return self.each(lambda value: value.to(device), self.index)

    def rows(self, start: int, stop: int) -> BorderBatch:
        """Rows start..stop of the batch."""
        return self.each(lambda value: value[start:stop], None if self.index is None else self.index[start:stop])

    def each(self, change: Callable[[Tensor], Tensor], index: Tensor | None = None) -> BorderBatch:
        """See the base class; what comes to the layer is changed too."""
        plain = {name: change(getattr(self, name)) for name in TENSORS}
        shared = {name: change(value) for name, value in self.shared.items()}
        hidden = change(self.hidden) if self.hidden.numel() else self.hidden
        return BorderBatch(
            **plain, index=index, hidden=hidden, shared=shared, part=self.part, number=self.number, size=self.size
        )


class Batches:
    """All batches of a stage, and the held-out ones: read from the data once, then the same for every layer."""

    def __init__(self, border: Border) -> None:
        self.border = border

    @property
    def counts(self) -> dict[str, int]:
        """Batches in each part."""
        assert self.border.counts is not None
        return self.border.counts

    def write(self, source: Source, tokens: int, valid: Iterable[Batch], stopped: Callable[[], bool]) -> bool:
        """Take batches from `source` until `tokens` non-padding tokens are there, as the training loop does.

        Returns:
            False where it was stopped.

        Raises:
            UserError: a batch of nothing but padding.
        """
        if self.border.finished:
            return True
        number = seen = 0
        while seen < tokens:
            if stopped():
                return False
            batch = source.next_batch()
            if batch.tokens == 0:
                raise UserError(f"align: step {number + 1} got a batch of nothing but padding: check the data")
            self._write("train", number, batch)
            number, seen = number + 1, seen + batch.tokens
        held = 0
        for batch in valid:
            self._write("valid", held, batch)
            held += 1
        self.border.finish({"train": number, "valid": held})
        return True

    def _write(self, part: str, number: int, batch: Batch) -> None:
        held = {name: getattr(batch, name) for name in TENSORS}
        small = {name: t if t.dtype == torch.bool else t.to(torch.int32) for name, t in held.items()}
        self.border.write(part, number, small)

    def read(self, part: str, number: int, *borders: Border) -> BorderBatch:
        """A batch with what the first border holds as its hidden states, and the others as what is shared."""
        return assemble(part, number, [self.border.read(part, number), *(b.read(part, number) for b in borders)])


def assemble(part: str, number: int, chunks: list[dict[str, Tensor]]) -> BorderBatch:
    """A batch from a chunk of the batches, one of a border, and those of what is shared."""
    plain = {name: t if t.dtype == torch.bool else t.to(torch.int64) for name, t in chunks[0].items()}
    hidden = chunks[1]["hidden"] if len(chunks) > 1 else torch.empty(0)
    shared = {name: tensor for chunk in chunks[2:] for name, tensor in chunk.items()}
    size = plain["real"].shape[0]
    return BorderBatch(
        *(plain[name] for name in TENSORS), hidden=hidden, shared=shared, part=part, number=number, size=size
    )


class BorderSource:
    """A `Source` of the training batches in their order, with what comes to one layer."""

    def __init__(self, batches: Batches, borders: list[Border]) -> None:
        """Start at the first batch; `borders` as for `Batches.read`."""
        self.count, self.number, self.key = batches.counts["train"], 0, batches.border.key
        self._ahead = Ahead([batches.border, *borders], "train", self.count)

    def next_batch(self) -> BorderBatch:
        """The next batch."""
        chunks = self._ahead.read(self.number)
        self.number += 1
        return assemble("train", self.number - 1, chunks)

    def state_dict(self) -> dict[str, Any]:
        """The number of the next batch, and of what data."""
        return {"batch": self.number, "key": self.key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            UserError: the state is of other data.
        """
        if state["key"] != self.key:
            raise UserError(
                "data: the layer's checkpoint was made with other batches; restore the data and settings of the run, "
                "or start a new one in another save.dir"
            )
        self.number = int(state["batch"])

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close()
