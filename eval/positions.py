"""Perplexity by position, to any length: does a model still gain from context where its teacher does, and beyond?

Documents are cut into windows of the greatest length, as for perplexity elsewhere; only whole windows are read, so that
every position is measured on the same text and the curve bends for no other reason than the context. Windows are read
in pieces with the models' own caches: memory grows with the cache, not with vocabulary times length.

Figures of a bucket of positions are means over its target tokens; standard errors treat documents as the independent
draws (formulas: eval/fidelity.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..distill.data.batch import Batch
from ..distill.data.documents import Fields, read_documents
from ..distill.data.tokenise import Tokens, tokenise
from ..distill.data.windows import eval_windows
from ..distill.errors import UserError
from . import fidelity
from .logits import ChosenLogits
from .meter import Meter, Progress

SHORTEST = 128
"""Where the buckets begin to double, if no lengths are given."""
WINDOWS = 32
"""Windows read, if `max_tokens` is not given."""
PIECE = 512
"""Tokens of a window read in one call."""
ROWS_TOKENS = 2**15
"""Windows of up to so many tokens together are read side by side."""


def long_suite(
    model: Any,
    tokenizer: Any,
    teacher: Any | None = None,
    *,
    text: str | Path | Sequence[str | Path],
    lengths: Sequence[int] | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, beside its teacher if one is given, by the position of the predicted token.

    Args:
        model: any Hugging Face causal language model with a cache.
        tokenizer: of both models.
        teacher: another one with the same vocabulary, or None.
        text: a file, folder or glob of plain text, jsonl or parquet, or several.
        lengths: where buckets end, the last one being the length of the windows; one number is halved down to
            `SHORTEST`. By default that from twice the models' context downwards which two documents reach.
        max_tokens: read so many tokens at most, whole windows, one of every document first; `WINDOWS` windows if None.
        progress: called with (tokens read, in all), over both models.

    Returns:
        {"suite": "long", "lengths", "positions": [{"from", "to" (exclusive), "tokens", "student": {"perplexity",
        "perplexity_stderr", "loss", "loss_stderr"}, "teacher": likewise or None where it cannot read so far, "kl",
        "kl_stderr", "top1_agreement", "top1_agreement_stderr" (None without teacher), "beyond_context"}], "windows",
        "documents", "tokens" (targets), "contexts": {model: tokens it was made for or None}, "too_short": {"documents",
        "tokens" (of them together), "longest"}, "text": files, "notes", "seed" (None: nothing is drawn), "versions"}.
        A position counts from 0 in its window, and is beyond the context where it is so for the teacher (alone: the
        model).

    Raises:
        UserError: lengths that are none, or text without a document of the greatest length.
        RunFailed: the model's loss is not finite.
    """
    models = {"student": model} if teacher is None else {"student": model, "teacher": teacher}
    contexts = {name: getattr(one.config, "max_position_embeddings", None) for name, one in models.items()}
    paths = fidelity._files([str(text)] if isinstance(text, (str, Path)) else [str(source) for source in text])
    tokens = tokenise(read_documents(paths, Fields()), tokenizer)
    edges = _edges(lengths, tokens, max((n for n in contexts.values() if n), default=None), paths[0])
    reach = {name: position_limit(one) for name, one in models.items()}
    if (limit := reach["student"]) is not None and edges[-1] > limit:
        raise UserError(f"--lengths {edges[-1]}: the model has {limit} learned positions and cannot read further")
    windows = _windows(tokens, edges[-1], max_tokens)
    sums = _Sums(edges, [document for document, _ in windows])
    against = None if teacher is None else (teacher, reach["teacher"])
    _read(model, against, tokens, windows, edges[-1], sums, progress)
    short = tokens.lengths[tokens.lengths < edges[-1]]
    made_for = contexts.get("teacher") or contexts["student"]
    return {
        "suite": "long",
        "lengths": edges[1:],
        "positions": sums.rows(teacher is not None, reach.get("teacher"), made_for),
        "windows": len(windows),
        "documents": len(set(sums.documents)),
        "tokens": int(sums.values[..., fidelity._TOKENS].sum()),
        "contexts": contexts,
        "too_short": {
            "documents": len(short),
            "tokens": int(short.sum()),
            "longest": int(short.max()) if len(short) else None,
        },
        "text": [str(path) for path in paths],
        "notes": _notes(models, edges[-1], reach, len(set(sums.documents))),
        "seed": None,
        "versions": fidelity.versions(),
    }


def position_limit(model: Any) -> int | None:
    """The most tokens that a model can read at all: None unless its positions are a learned table."""
    ids = model.get_input_embeddings()
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return None
    tables = (one for one in model.modules() if isinstance(one, torch.nn.Embedding) and one is not ids)
    # Some families keep two places more than they use (OPT).
    return context if any(context <= table.num_embeddings <= context + 2 for table in tables) else None


def _edges(lengths: Sequence[int] | None, tokens: Tokens, context: int | None, path: Path) -> list[int]:
    """0 and the ascending ends of the buckets."""
    found = sorted(tokens.lengths.tolist(), reverse=True)
    longest = found[0] if found else 0
    if lengths is None:
        # Two documents at least, where there are two: with one there is no standard error.
        reached = found[1] if len(found) > 1 else longest
        greatest = 2 * (context or 2048)
        while greatest > reached and greatest > 2 * SHORTEST:
            greatest //= 2
    else:
        if not lengths or min(lengths) < 2:
            raise UserError(f"--lengths {','.join(map(str, lengths))}: expected numbers of tokens, 2 or more")
        greatest = max(lengths)
    if greatest > longest:
        fits = f"; the longest that fits: --lengths {longest}" if longest >= 2 else ""
        raise UserError(
            f"{path}: no document of {greatest} tokens among {len(found)} (the longest has {longest}). Position needs "
            f"long documents, such as books{fits}"
        )
    if lengths is not None and len(set(lengths)) > 1:
        return [0, *sorted(set(lengths))]
    edges = [greatest]
    while edges[0] // 2 >= SHORTEST:
        edges.insert(0, edges[0] // 2)
    return [0, *edges]


def _windows(tokens: Tokens, length: int, max_tokens: int | None) -> list[tuple[int, int]]:
    """(document, start in `tokens.ids`) of the whole windows to read, one of every document before any second one."""
    count = WINDOWS if max_tokens is None else max_tokens // length
    if count < 1:
        raise UserError(f"--max-tokens {max_tokens}: less than one window of {length} tokens; give that at least")
    document, start, size = eval_windows(tokens, length)
    whole = size == length
    document, start = document[whole], start[whole]
    _, first = np.unique(document, return_index=True)
    number = np.arange(len(document)) - np.repeat(first, np.diff([*first, len(document)]))
    order = np.lexsort((document, number))[:count]
    return list(zip(document[order].tolist(), start[order].tolist(), strict=True))


@torch.no_grad()
def _read(
    model: Any,
    against: tuple[Any, int | None] | None,
    tokens: Tokens,
    windows: list[tuple[int, int]],
    length: int,
    sums: _Sums,
    progress: Progress | None,
) -> None:
    """Run both models over all windows, side by side and piece by piece, into `sums`."""
    models = [model] if against is None else [model, against[0]]
    reach = length if against is None or against[1] is None else min(length, against[1])
    meter = Meter(progress, len(windows) * (length + (0 if against is None else reach)))
    training = [one.training for one in models]
    device = next(model.parameters()).device
    try:
        for one in models:
            one.eval()
        for first, ids, scored in _batches(tokens, windows, length, device):
            readers = [_Reader(one, ids) for one in models]
            for start, stop in pairwise(_borders(sums.edges)):
                there = [readers[0]]
                if against is not None and stop <= reach:
                    there.append(readers[1])
                for reader in there:
                    reader.read(ids[:, start:stop])
                    meter.add(ids.shape[0] * (stop - start))
                _score(there, ids, scored, start, stop, first, sums)
    finally:
        for one, mode in zip(models, training, strict=True):
            one.train(mode)
    meter.reach(meter.total)


def _batches(
    tokens: Tokens, windows: list[tuple[int, int]], length: int, device: torch.device
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(number of the first window, ids (B, length), whether each may be a target (B, length))."""
    rows = max(1, ROWS_TOKENS // length)
    for first in range(0, len(windows), rows):
        starts = [start for _, start in windows[first : first + rows]]
        ids = np.stack([tokens.ids[start : start + length] for start in starts]).astype(np.int64)
        scored = np.stack([tokens.scored[start : start + length] for start in starts])
        yield first, torch.from_numpy(ids).to(device), torch.from_numpy(scored).to(device)


def _borders(edges: list[int]) -> list[int]:
    """Where pieces begin and end: none lies in two buckets, so that a teacher reads whole buckets."""
    return sorted({*edges, *range(0, edges[-1], PIECE)})


class _Reader:
    """One model going through a batch of windows; keeps the hidden states of the piece before its next one's first
    token, which they predict."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        like = torch.zeros_like(ids)
        whole = torch.ones_like(ids, dtype=torch.bool)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.logits = ChosenLogits(model, Batch(ids, positions, like, whole, whole))
        self.cache: Any = None
        self.last: torch.Tensor | None = None
        self.size = 0

    def read(self, ids: torch.Tensor) -> None:
        """The next piece, (B, n)."""
        if self.size:  # logits (B, V) that predict this piece's first token
            rows = torch.arange(ids.shape[0], device=ids.device)
            self.last = self.logits.at(rows, torch.full_like(rows, self.size - 1))
        self.cache = self.logits.advance(ids, self.cache)
        self.size = ids.shape[1]

    def before(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """(n, V) fp32 logits that predict these columns of the piece."""
        found = self.logits.at(rows, (columns - 1).clamp_min(0))
        if self.last is not None:
            found = torch.where((columns == 0)[:, None], self.last[rows], found)
        return found


def _score(
    readers: list[_Reader],
    ids: torch.Tensor,
    scored: torch.Tensor,
    start: int,
    stop: int,
    first: int,
    sums: _Sums,
) -> None:
    """Add a piece's targets to the sums, for a few tokens' logits at a time."""
    wanted = scored[:, start:stop].clone()
    if start == 0:
        wanted[:, 0] = False  # nothing predicts it
    rows, columns = wanted.nonzero(as_tuple=True)
    limit = fidelity._CHUNK_ELEMENTS.get(ids.device.type, 2**24)
    size = max(1, limit // readers[0].logits.model.get_output_embeddings().out_features)
    for at in range(0, rows.numel(), size):
        chunk = slice(at, at + size)
        logits = [reader.before(rows[chunk], columns[chunk]) for reader in readers]
        labels = ids[rows[chunk], columns[chunk] + start]
        values = fidelity._per_token(logits[0], logits[1] if len(logits) > 1 else None, labels)
        sums.add(first + rows[chunk].cpu(), columns[chunk].cpu() + start, values)


class _Sums:
    """Sums per window and bucket.

    Attributes:
        documents: of the windows.
        values: (windows, buckets, figures of `fidelity._per_token`) fp64.
    """

    def __init__(self, edges: list[int], documents: list[int]) -> None:
        self.edges, self.documents = edges, documents
        self.values = torch.zeros(len(documents), len(edges) - 1, 5, dtype=torch.float64)

    def add(self, windows: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
        """Figures (n, 5) of the targets at these positions of these windows."""
        bucket = torch.bucketize(positions, torch.tensor(self.edges[1:]), right=True)
        self.values.index_put_((windows, bucket), values, accumulate=True)

    def rows(self, against: bool, reach: int | None, context: int | None) -> list[dict[str, Any]]:
        """The result's "positions"."""
        found = []
        for bucket, (low, high) in enumerate(pairwise(self.edges)):
            per_document: dict[int, torch.Tensor] = {}
            for document, value in zip(self.documents, self.values[:, bucket], strict=True):
                per_document[document] = per_document.get(document, torch.zeros_like(value)) + value
            read = against and (reach is None or high <= reach)
            made = fidelity._summary(per_document, read)
            empty = dict.fromkeys(("teacher", "kl", "kl_stderr", "top1_agreement", "top1_agreement_stderr"))
            row = {"from": low, "to": high, "tokens": made["tokens"], "student": made["student"], **empty}
            row |= {name: made[name] for name in empty if name in made}
            found.append(row | {"beyond_context": context is not None and high > context})
        return found


def _notes(models: dict[str, Any], length: int, reach: dict[str, int | None], documents: int) -> list[str]:
    """What a reader of the figures should know, in words."""
    notes = []
    for name, one in models.items():
        context = getattr(one.config, "max_position_embeddings", None)
        kinds = _rotary(one.config)
        if context and length > context:
            limit = reach[name]
            how = (
                f"its learned positions end at {limit}"
                if limit
                else f"it reads on with its rotary settings ({', '.join(kinds) or 'none'})"
            )
            notes.append(f"{name}: made for {context} tokens; beyond that {how}")
        if changing := [kind for kind in kinds if kind in ("dynamic", "longrope")]:
            notes.append(
                f"{name}: its rotary scale changes with the length ({changing[0]}); tokens in the cache keep the "
                "scale that they were read with, as in generation"
            )
    if documents < 2:
        notes.append("one document: no standard errors")
    return notes


def _rotary(config: Any) -> list[str]:
    """The kinds of rotary scaling of a model's layers; families with several have a setting for each type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return list(dict.fromkeys(value.get("rope_type", "default") for value in nested or ([given] if given else [])))
