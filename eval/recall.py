"""Recall: does a language model still find a fact that it read long ago?

`recall` asks for key -> value pairs over number of pairs and distance, `needles` for sentences in a haystack over
length and depth; both are scored by arg-max in teacher-forced forward passes, so they work for any Hugging Face causal
language model. All tasks, with partial credit, choices among wrong answers and generation: eval/suite.py.

(key, value) pairs are split by a hash: a document of the training split never shows a pair of the validation split.
What texts for training (recipes) and documents for measuring share is in eval/tasks/words.py. No torch before a model
is measured.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from .tasks.document import Writer
from .tasks.needles import needle
from .tasks.pairs import DEFAULT_CELLS, CaseMaker, RecallCase, RecallCell, document, make_cases
from .tasks.summary import clustered
from .tasks.words import (
    ANIMALS,
    COLOURS,
    END_OF_PAIRS,
    END_OF_QUERIES,
    FOODS,
    HELD_OUT,
    KEYS,
    NAMES,
    PLACES,
    RECALL,
    REMEMBER,
    THINGS,
    VALUES,
    WEATHER,
    draw_pairs,
    filler_sentence,
    is_held_out,
    recall_text,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ANIMALS",
    "COLOURS",
    "DEFAULT_CELLS",
    "END_OF_PAIRS",
    "END_OF_QUERIES",
    "FOODS",
    "HELD_OUT",
    "KEYS",
    "NAMES",
    "PLACES",
    "RECALL",
    "REMEMBER",
    "THINGS",
    "VALUES",
    "WEATHER",
    "CaseMaker",
    "RecallCase",
    "RecallCell",
    "clustered",
    "draw_pairs",
    "filler_sentence",
    "is_held_out",
    "make_cases",
    "needles",
    "recall",
    "recall_text",
    "score",
    "window_mask",
]


def recall(
    model: Any,
    tokenizer: Any,
    cells: Iterable[RecallCell] | None = None,
    n_per_cell: int = 128,
    seed: int = 0,
    batch_size: int = 8,
    window: int | None = None,
) -> dict[str, Any]:
    """Accuracy of recall per cell: the share of queried values whose every token is the model's arg-max.

    Args:
        model: any causal language model whose call takes input_ids, attention_mask, use_cache and returns `.logits`.
        tokenizer: its tokenizer.
        cells: what to measure; by default those of `DEFAULT_CELLS` that fit the model's max_position_embeddings.
        n_per_cell: at least so many answers per cell.
        seed: of the documents.
        batch_size: documents per forward pass, all of one cell.
        window: cut every attention layer to so many tokens, the current one included (for softmax-attention models
            that accept a 4-dimensional mask): shows what the same weights recall without their long reach.

    Returns:
        {"cells": [{"pairs", "distance", "accuracy", "stderr", "n"}], "by_distance": {str(distance): {"accuracy",
        "stderr", "n"}}, "accuracy", "stderr", "n"}; accuracies from 0 to 1, n counts answers, standard errors are
        clustered by document.

    Raises:
        ValueError: no cell fits the model, or an argument of `make_cases` is out of range.
    """
    import torch

    limit = getattr(model.config, "max_position_embeddings", None)
    chosen = list(DEFAULT_CELLS if cells is None else cells)
    by_cell: dict[RecallCell, list[RecallCase]] = {cell: [] for cell in chosen}
    for case in make_cases(tokenizer, by_cell, n_per_cell, seed):
        by_cell[case.cell].append(case)
    if cells is None and limit is not None:
        by_cell = {c: cases for c, cases in by_cell.items() if max(len(x.ids) for x in cases) <= limit}
    if not by_cell:
        raise ValueError(f"no recall cell fits this model's context of {limit} tokens; name shorter cells")
    rows, clusters = [], {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for cell, cases in by_cell.items():
                clusters[cell] = []
                for start in range(0, len(cases), batch_size):
                    clusters[cell] += score(model, cases[start : start + batch_size], window)
                rows.append({"pairs": cell.pairs, "distance": cell.distance, **clustered(clusters[cell])})
    finally:
        model.train(was_training)
    distances = sorted({cell.distance for cell in by_cell})
    by_distance = {
        str(d): clustered([x for cell in by_cell if cell.distance == d for x in clusters[cell]]) for d in distances
    }
    return {"cells": rows, "by_distance": by_distance, **clustered([x for c in clusters.values() for x in c])}


def score(model: Any, cases: Sequence[RecallCase], window: int | None = None) -> list[tuple[int, int]]:
    """(right, asked) for each case, from one forward pass over all of them, padded on the right. Needs no_grad."""
    from .tasks.likelihood import answer_logits

    inputs = {}
    if window is not None:  # causal: padding on the right is unseen
        weight = next(model.parameters())
        longest = max(len(case.ids) for case in cases)
        inputs["attention_mask"] = window_mask(longest, window, weight.dtype).to(weight.device)
    logits, shift = answer_logits(model, [document(case) for case in cases], **inputs)
    best = logits.argmax(-1).cpu()
    results = []
    for row, case in enumerate(cases):
        right = sum(
            all(int(best[row, at - 1 - shift]) == case.ids[at] for at in range(start, end))
            for start, end in case.answers
        )
        results.append((right, len(case.answers)))
    return results


def needles(
    model: Any,
    tokenizer: Any,
    lengths: Iterable[int] = (256, 512, 1024),
    depths: Iterable[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    n_per_cell: int = 16,
    seed: int = 0,
    batch_size: int = 8,
    number: bool = False,
    others: int = 0,
) -> dict[str, Any]:
    """Needle in a haystack: a sentence at a depth of a document, asked for at its end.

    Args:
        model: any causal language model whose call takes input_ids, attention_mask, use_cache and returns `.logits`.
        tokenizer: its tokenizer.
        lengths: tokens of whole documents, exactly.
        depths: from 0 (the needle stands first) to 1 (just before the question).
        n_per_cell: documents per length and depth; each asks one value.
        seed: with length, depth and kind it determines the documents; other cells do not change them.
        batch_size: documents per forward pass, all of one cell.
        number: the value is a number of five digits instead of a word.
        others: further needles, with other keys, beside the one that is asked for.

    Returns:
        {"cells": [{"length", "depth", "accuracy", "stderr", "n", "credit", "credit_stderr"}], the same figures over all
        cells, and "documents": [(right, asked)] in the order of the cells}. accuracy counts answers whose every token
        is the arg-max; credit is the share of leading tokens (of a number: digits) that are right.

    Raises:
        ValueError: a length that a document's parts exceed, or a depth outside 0 to 1.
    """
    from .tasks.likelihood import score as score_documents

    writer = Writer(tokenizer)
    rows, right, credit = [], [], []
    was_training = model.training
    model.eval()
    try:
        for length, depth in product(lengths, depths):
            documents = [
                needle(
                    writer,
                    random.Random(f"needle {seed} {length} {depth} {number} {others} {i}"),
                    length,
                    depth,
                    number,
                    others,
                )
                for i in range(n_per_cell)
            ]
            scores = []
            for start in range(0, n_per_cell, batch_size):
                scores += score_documents(model, tokenizer, documents[start : start + batch_size], choices=False)
            right.append([(int(one.exact), 1) for (one,) in scores])
            credit.append([(one.credit, 1) for (one,) in scores])
            rows.append({"length": length, "depth": depth, **_with_credit(right[-1], credit[-1])})
    finally:
        model.train(was_training)
    documents = [one for cell in right for one in cell]
    return {"cells": rows, **_with_credit(documents, [one for cell in credit for one in cell]), "documents": documents}


def _with_credit(right: Sequence[tuple[int, int]], credit: Sequence[tuple[float, int]]) -> dict[str, Any]:
    partial = clustered(credit)
    return {**clustered(right), "credit": partial["accuracy"], "credit_stderr": partial["stderr"]}


def window_mask(length: int, window: int, dtype: Any = None) -> Tensor:
    """Additive attention mask [1, 1, length, length]: each token sees itself and the window - 1 tokens before it."""
    import torch

    position = torch.arange(length)
    behind = position[:, None] - position[None, :]
    hidden = (behind < 0) | (behind >= window)
    dtype = dtype or torch.float32
    return torch.zeros(length, length, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]
