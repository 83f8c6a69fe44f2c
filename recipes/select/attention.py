"""Methods that look at what the teacher's own attention looks at; one pass, no mixer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...distill.attention import AttentionHeads, attention_heads
from ...distill.data.batch import Batch
from ...distill.data.packing import make_batch, padded_rows
from ...distill.data.windows import eval_batches
from ...distill.precision import autocast
from ...eval.tasks.document import Document
from .evaluate import BATCH, Evaluator, estimate
from .forward import recall_signal
from .scores import Scores, ranked

SINK = 4
"""First tokens of a text, on which attention rests when it looks for nothing (StreamingLLM, arXiv 2309.17453)."""
RECENT_SHARE = 16
"""The nearest tokens are a sixteenth of the window."""
QUERIES = 128
"""Queries whose attention weights are held at once."""
RETRIEVAL_HEAD = 0.1
"""Score from which the paper calls a head a retrieval head."""

Listener = Callable[[int, AttentionHeads], None]


@torch.no_grad()
def lazy(evaluator: Evaluator) -> Scores:
    """Share of the attention mass on the `SINK` first and the nearest tokens, mean over heads; high: convert.

    LightTransfer (arXiv 2410.13846) takes the last queries of a prompt; here every query counts that has more before it
    than these tokens. The nearest ones are the last sixteenth of the window, the query's own included.
    """
    recent = max(1, evaluator.window // RECENT_SHARE)
    sums = torch.zeros(len(evaluator.layers), len(evaluator.tokens), dtype=torch.float64)
    counts = torch.zeros(len(evaluator.tokens), dtype=torch.float64)
    first = SINK + recent
    for batch, documents in eval_batches(evaluator.tokens, evaluator.window, BATCH):
        if batch.shape[1] <= first:
            continue
        moved = batch.to(evaluator.device)
        counted = batch.real[:, first:]
        counts.index_add_(0, documents[:, first:][counted], torch.ones(int(counted.sum()), dtype=torch.float64))

        def hear(layer: int, heads: AttentionHeads, moved: Batch = moved, owners: Tensor = documents) -> None:
            place = torch.arange(moved.shape[1], device=evaluator.device)
            for start in range(first, moved.shape[1], QUERIES):
                stop = min(start + QUERIES, moved.shape[1])
                weights = heads.weights(moved, start, stop)
                back = place[start:stop, None] - place
                near = (back < recent) | (place < SINK)
                mass = (weights * near).sum(-1).mean(1).cpu().double()
                real = moved.real[:, start:stop].cpu()
                sums[layer].index_add_(0, owners[:, start:stop][real], mass[real])

        _listen(evaluator, moved, hear)
    if not bool(counts.any()):
        note = f"no text is longer than {first} tokens, so that every token is near: these scores say nothing"
        return Scores("lazy", [1.0] * len(evaluator.layers), notes=[note], signal=False)
    evaluator.passes += 1
    made = _ranked("lazy", sums[:, counts > 0], counts[counts > 0])
    made.details |= {"sink": SINK, "recent": recent}
    return made


@torch.no_grad()
def retrieval_heads(evaluator: Evaluator) -> Scores:
    """How often a layer's heads look at the token to be said, summed over its heads; high: keep.

    arXiv 2404.15574, section 2: a head is at work where its arg-max key is inside the needle and the token there is the
    one that comes next. Answers are teacher-forced instead of generated, and counted where the teacher gets every token
    of them right. A head's score is the share of such tokens; `heads` in the details names those above 0.1.
    """
    layers, shape = len(evaluator.layers), evaluator.hybrid.teacher.geometry(0)
    hits = torch.zeros(layers, shape.num_heads, len(evaluator.recall_documents), dtype=torch.float64)
    counts = torch.zeros(len(evaluator.recall_documents), dtype=torch.float64)
    for start in range(0, len(evaluator.recall_documents), BATCH):
        part = evaluator.recall_documents[start : start + BATCH]
        rows = [(np.array(d.ids, np.int32), np.ones(len(d.ids), bool)) for d in part]
        batch = make_batch(padded_rows(rows)).to(evaluator.device)
        said = [(row, *copy) for row, d in enumerate(part) for copy in copies(d)]
        if not said:
            continue
        heard: dict[int, Tensor] = {}

        def hear(layer: int, heads: AttentionHeads, batch: Batch = batch, said: Any = said, heard: Any = heard) -> None:
            heard[layer] = _hits(heads, batch, said)

        best = _listen(evaluator, batch, hear, want_best=True)
        right = [all(int(best[row, p - 1]) == part[row].ids[p] for p in whole) for row, _, _, whole in said]
        for number, (row, *_) in enumerate(said):
            if right[number]:
                counts[start + row] += 1
                hits[:, :, start + row] += torch.stack([heard[layer][number] for layer in range(layers)])
    evaluator.passes += 1
    used = counts > 0
    notes, signal = recall_signal(evaluator.recall(()), evaluator.recall_documents)
    if not bool(used.any()):
        return Scores("retrieval-heads", [0.0] * layers, notes=notes, signal=False)
    made = _ranked("retrieval-heads", hits.sum(1)[:, used], counts[used])
    made.notes, made.signal = notes, signal
    shares = hits.sum(-1) / counts.sum()
    made.details["heads"] = [
        {"layer": layer, "head": head, "score": float(shares[layer, head])}
        for layer, head in (shares > RETRIEVAL_HEAD).nonzero().tolist()
    ]
    made.details["answer tokens counted"] = int(counts.sum())
    return made


def copies(document: Document) -> list[tuple[int, range, range]]:
    """(place of an answer's token, the needle, the answer) for every answer's every token that was said before.

    The needle is where the same tokens stand before the first question; of several such places, the one that shares
    most tokens before it with the answer, so the one after the same key.
    """
    found = []
    first = document.answers[0].start
    for answer in document.answers:
        length = answer.end - answer.start
        wanted = document.ids[answer.start : answer.end]
        places = [i for i in range(1, first - length) if document.ids[i : i + length] == wanted]
        if places:
            place = max(places, key=lambda i: _shared_before(document.ids, i, answer.start))
            whole = range(answer.start, answer.end)
            found += [(at, range(place, place + length), whole) for at in whole]
    return found


def _shared_before(ids: list[int], first: int, second: int) -> int:
    """Equal tokens right before two places."""
    count = 0
    while count < first and ids[first - 1 - count] == ids[second - 1 - count]:
        count += 1
    return count


def _hits(heads: AttentionHeads, batch: Batch, said: list[tuple[int, int, range, range]]) -> Tensor:
    """(tokens said, H) fp64: 1 where the head that predicts the token looks at it inside the needle."""
    lowest = min(at for _, at, *_ in said) - 1
    highest = max(at for _, at, *_ in said)
    ids = batch.input_ids
    looked: dict[int, Tensor] = {}
    for start in range(lowest, highest, QUERIES):
        weights = heads.weights(batch, start, min(start + QUERIES, highest))
        looked |= {start + i: best for i, best in enumerate(weights.argmax(-1).unbind(2))}  # (B, H)
    rows = []
    for row, at, needle, _ in said:
        keys = looked[at - 1][row]
        inside = (keys >= needle.start) & (keys < needle.stop)
        rows.append((inside & (ids[row, keys] == ids[row, at])).double().cpu())
    return torch.stack(rows)


def _listen(evaluator: Evaluator, batch: Batch, hear: Listener, want_best: bool = False) -> Tensor:
    """A teacher forward in which `hear` is given every layer's queries and keys; its arg-maxes where wanted."""
    teacher = evaluator.hybrid.teacher
    with _hooks(evaluator, hear), autocast(evaluator.device.type, evaluator.precision):
        made = teacher.model if want_best else teacher.backbone
        out = made(input_ids=batch.input_ids, use_cache=False)
    return out.logits.argmax(-1).cpu() if want_best else torch.empty(0)


@contextmanager
def _hooks(evaluator: Evaluator, hear: Listener) -> Iterator[None]:
    teacher = evaluator.hybrid.teacher

    def listen(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            hear(layer, attention_heads(teacher, layer, hidden, kwargs.get("position_embeddings")))

        return hook

    with ExitStack() as stack:
        for layer in evaluator.layers:
            handle = teacher.attention(layer).register_forward_pre_hook(listen(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _ranked(method: str, sums: Tensor, counts: Tensor) -> Scores:
    """Scores from sums by layer and document."""
    pairs = [estimate(one, counts) for one in sums]
    errors = [error for _, error in pairs if error is not None]
    made = Scores(method, [value for value, _ in pairs], errors if len(errors) == len(pairs) else None)
    order = ranked(made.values, made.higher_is)
    for one, other in pairwise(order):
        gap, error = estimate(sums[other] - sums[one], counts)
        made.gaps.append((abs(gap), error))
    return made
