"""Logits at chosen positions of a batch, for any causal language model, without holding those of all positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..distill.data.batch import Batch
from ..distill.families import FAMILIES
from ..distill.family import Head
from ..distill.modeling.cache import cache_keyword


class ChosenLogits:
    """The logits of one model at chosen positions of a batch, without holding those of all positions.

    The backbone runs once per batch and the head runs on chunks, with the scale or cap that the family is known to put
    on its logits, if that demonstrably is all that the model does: checked on the first tokens seen. Otherwise the
    whole model runs row by row, and the logits of one row are held.

    Attributes:
        by_head: the head runs on chunks.
        packs: the model's family is known to keep packed documents apart; otherwise a row is given one document.
    """

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model = model
        config = model.config
        self.packs = config.model_type in (*FAMILIES, "relinear")
        family = FAMILIES.get(getattr(config, "base_model_type", config.model_type))
        self._head = family.logits(config.to_dict()) if family else Head()
        self.by_head = self._head_is_all(batch)
        self._held: torch.Tensor | None = None

    def run(self, batch: Batch) -> None:
        """Forward over a batch."""
        if self.by_head:
            self._held = self._backbone(**self._inputs(batch)).last_hidden_state
        else:
            self._held = self.model(**self._inputs(batch)).logits

    def advance(self, ids: torch.Tensor, cache: Any) -> Any:
        """Forward over the next tokens of the same rows, after those in the model's own cache.

        Args:
            ids: (B, n) token ids, one document per row and no padding. `at` counts columns from the first of them.
            cache: what the last call returned, None at the beginning.

        Returns:
            The cache with these tokens in it.

        Raises:
            ValueError: the model returns no cache.
        """
        run = self._backbone if self.by_head else self.model
        keyword = cache_keyword(run)
        out = run(input_ids=ids, use_cache=True, **{keyword: cache})
        self._held = out.last_hidden_state if self.by_head else out.logits
        cache = getattr(out, keyword, None)
        if cache is None:
            raise ValueError(f"{type(self.model).__name__} returned no {keyword} although use_cache=True")
        return cache

    def at(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """(n, V) fp32 logits at n positions of the batch that was run last."""
        assert self._held is not None
        held = self._held[rows, columns]
        return (self._logits(held) if self.by_head else held).float()

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        # With one document per row, padded on the right, positions are what every model assumes by itself.
        return {**inputs, "position_ids": batch.position_ids} if self.packs else inputs

    @property
    def _backbone(self) -> Any:
        return getattr(self.model, "base_model", None) or getattr(self.model, "model", None)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of its last hidden states: the head, and what its family does after it."""
        logits = self.model.get_output_embeddings()(hidden)
        scale, softcap = self._head
        if scale != 1.0:
            logits = logits * scale
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def _head_is_all(self, batch: Batch) -> bool:
        if self._backbone in (None, self.model) or not callable(getattr(self.model, "get_output_embeddings", None)):
            return False
        inputs = {"input_ids": batch.input_ids[:1, :16], "use_cache": False}
        hidden = self._backbone(**inputs).last_hidden_state
        return torch.equal(self._logits(hidden), self.model(**inputs).logits)


def parts(batch: Batch, documents: torch.Tensor, sources: list[ChosenLogits]) -> Iterable[tuple[Batch, torch.Tensor]]:
    """The batch in the largest pieces that every model can take."""
    pieces = [(batch, documents)] if all(source.packs for source in sources) else _unpacked(batch, documents)
    for piece, numbers in pieces:
        if all(source.by_head for source in sources):
            yield piece, numbers
        else:
            for row in range(piece.shape[0]):
                yield piece.rows(row, row + 1), numbers[row : row + 1]


def _unpacked(batch: Batch, documents: torch.Tensor) -> Iterable[tuple[Batch, torch.Tensor]]:
    """The segments of a batch that hold targets, one per row, padded on the right; as many rows as before at a time."""
    spans = []
    for row in range(batch.shape[0]):
        _, lengths = torch.unique_consecutive(batch.segments[row], return_counts=True)
        stop = 0
        for length in lengths.tolist():
            start, stop = stop, stop + length
            if bool(batch.targets[row, start:stop].any()):
                spans.append((row, start, stop))
    spans.sort(key=lambda span: span[2] - span[1], reverse=True)
    for first in range(0, len(spans), batch.shape[0]):
        group = spans[first : first + batch.shape[0]]

        def stacked(values: torch.Tensor, group: list[tuple[int, int, int]] = group) -> torch.Tensor:
            pieces = [values[row, start:stop] for row, start, stop in group]
            return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)

        yield batch.each(stacked), stacked(documents)
