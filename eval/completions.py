"""Text that a model goes on with: greedy completions of prompts, and how much they repeat themselves and agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .fidelity import clustered_mean
from .tasks.generation import continued, padding_id, plain_greedy

REPEATS = 3
"""A cycle counts as a loop from so many rounds on …"""
LOOP_TOKENS = 8
"""… that take so many tokens together, at least."""
DISTINCT = (1, 2, 4)
"""The n of distinct-n."""


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens with which a model ends its text: its generation_config's, and the tokenizer's EOS."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [named] if isinstance(named, int) else list(named or ())
    return list(dict.fromkeys([*found, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    count: int,
    batch_size: int = 8,
    done: Callable[[int], None] = lambda prompts: None,
) -> list[list[int]]:
    """Greedy completions of token-id prompts, each up to `count` tokens or its end token, which is included.

    Prompts of like length go together, padded on the left; the batch changes nothing about a completion.

    Args:
        model: a causal language model with transformers' `generate`, in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids, none empty.
        count: new tokens at most.
        batch_size: prompts at once.
        done: called with the number of prompts after every batch.
    """
    ends, padding = end_ids(model, tokenizer), padding_id(tokenizer)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: list[list[int]] = [[] for _ in prompts]
    with plain_greedy(model, padding, ends):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            texts = continued(model, [prompts[number] for number in numbers], count, padding)
            for number, ids in zip(numbers, texts, strict=True):
                found[number] = until_end(ids, ends)
            done(len(numbers))
    return found


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids up to the first end token, that included."""
    stop = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])


def agreement(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], documents: Sequence[int]
) -> dict[str, dict[str, float | None]]:
    """How far two models' completions of the same prompts agree.

    Args:
        ours, theirs: token ids.
        documents: where each prompt is from; standard errors are clustered by it.

    Returns:
        {"common_prefix" (tokens until they part; their length where they never do), "agreement" (share of the places
        of the longer one that hold the same token), "identical" (share of completions)}, each {"value", "stderr"}.
    """
    pairs = list(zip(ours, theirs, strict=True))
    prefix = [
        next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))) for a, b in pairs
    ]
    same = [sum(x == y for x, y in zip(a, b, strict=False)) for a, b in pairs]
    longer = [max(len(a), len(b)) for a, b in pairs]
    return {
        "common_prefix": estimate(prefix, [1] * len(pairs), documents),
        "agreement": estimate(same, longer, documents),
        "identical": estimate([list(a) == list(b) for a, b in pairs], [1] * len(pairs), documents),
    }


def repetition(texts: Sequence[Sequence[int]], documents: Sequence[int]) -> dict[str, Any]:
    """How much texts repeat themselves.

    Returns:
        {"distinct_1", "distinct_2", "distinct_4" (different n-grams over all n-grams of a text, mean over the texts
        that have any), "loops" (share of texts that end in a cycle: see `loops`), each with "NAME_stderr"}.
    """
    made: dict[str, Any] = {}
    for n in DISTINCT:
        long = [(text, document) for text, document in zip(texts, documents, strict=True) if len(text) >= n]
        shares = [distinct(text, n) for text, _ in long]
        if shares:
            one = estimate(shares, [1] * len(shares), [document for _, document in long])
            made |= {f"distinct_{n}": one["value"], f"distinct_{n}_stderr": one["stderr"]}
        else:
            made |= {f"distinct_{n}": None, f"distinct_{n}_stderr": None}
    one = estimate([loops(text) for text in texts], [1] * len(texts), documents)
    return made | {"loops": one["value"], "loops_stderr": one["stderr"]}


def distinct(ids: Sequence[int], n: int) -> float:
    """Different n-grams over all n-grams of one text of at least n tokens."""
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams)


def loops(ids: Sequence[int]) -> bool:
    """Whether a text ends in a cycle: its last tokens are one piece, `REPEATS` times over and `LOOP_TOKENS` in all."""
    for period in range(1, len(ids) // REPEATS + 1):
        tail = max(REPEATS * period, LOOP_TOKENS)
        if tail <= len(ids) and all(ids[at] == ids[at - period] for at in range(len(ids) - tail + period, len(ids))):
            return True
    return False


def estimate(sums: Sequence[float], counts: Sequence[float], documents: Sequence[int]) -> dict[str, float | None]:
    """{"value", "stderr"} of a mean Σ sums / Σ counts, clustered by document."""
    numbers = {document: place for place, document in enumerate(dict.fromkeys(documents))}
    index = torch.tensor([numbers[document] for document in documents])
    table = torch.zeros(len(numbers), 2, dtype=torch.float64)
    values = [[float(one) for one in sums], [float(one) for one in counts]]
    table.index_add_(0, index, torch.tensor(values, dtype=torch.float64).T.contiguous())
    value, stderr = clustered_mean(table[:, 0], table[:, 1])
    return {"value": value, "stderr": stderr}
