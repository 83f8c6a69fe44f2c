"""Scoring by generation: greedy, with the model's own cache, batches padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .document import Answer, Document
from .likelihood import read_off
from .summary import Score

GENERATED = 4
"""Answers of one document that are generated, the first ones: each is a prompt of its own."""


@torch.no_grad()
def generated(model: Any, tokenizer: Any, documents: Sequence[Document], batch_size: int = 8) -> list[list[Score]]:
    """Scores of what the model says when left to itself, for the first `GENERATED` answers of each document.

    A prompt ends where the answer would begin and holds the true answers to earlier questions. An answer is right if
    the generated text begins with it, however it is cut into tokens.

    Args:
        model: a causal language model with transformers' `generate`.
        tokenizer: of the documents.
        documents: of one cell.
        batch_size: prompts at once.
    """
    prompts = [(row, answer) for row, document in enumerate(documents) for answer in document.answers[:GENERATED]]
    order = sorted(range(len(prompts)), key=lambda number: prompts[number][1].start)
    scores: list[list[Score]] = [[] for _ in documents]
    found: dict[int, Score] = {}
    padding = padding_id(tokenizer)
    with plain_greedy(model, padding):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            texts = [documents[row].ids[: answer.start] for row, answer in (prompts[n] for n in batch)]
            count = max(_longest(prompts[n][1]) for n in batch)
            for number, ids in zip(batch, continued(model, texts, count, padding), strict=True):
                row, answer = prompts[number]
                found[number] = judge(tokenizer, answer, documents[row].ids[answer.start : answer.end], ids)
    for number, (row, _) in enumerate(prompts):
        scores[row].append(found[number])
    return scores


def judge(tokenizer: Any, answer: Answer, ids: Sequence[int], said: Sequence[int]) -> Score:
    """The score of generated ids where `ids` was the answer."""
    text = tokenizer.decode(list(said)).strip()
    right = [tokenizer.decode(list(option)).strip() for option in (ids, *answer.also)]
    if any(text.startswith(option) for option in right):
        return Score(True, 1.0)
    alone = replace(answer, also=())
    return Score(False, max(read_off(tokenizer, alone, option, said)[1] for option in (ids, *answer.also)))


def _longest(answer: Answer) -> int:
    return max(answer.end - answer.start, *(len(option) for option in answer.also), 1)


def padding_id(tokenizer: Any) -> int:
    """A token to pad with; its place is masked."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def continued(model: Any, prompts: list[list[int]], count: int, padding: int) -> list[list[int]]:
    """`count` token ids after each prompt, as the model's generation_config says; see `plain_greedy`.

    Needs no_grad. Where all rows end earlier, there are fewer.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=count)
    return out[:, longest:].tolist()


@contextmanager
def plain_greedy(model: Any, padding: int, ends: Sequence[int] = (), temperature: float = 0.0) -> Iterator[None]:
    """Without the sampling, penalties and limits that a checkpoint's generation_config may ask for.

    Args:
        model: whose generation_config is replaced inside.
        padding: token to pad with.
        ends: tokens after which a row is complete; what follows there is padding.
        temperature: above 0, sample after all, from the whole vocabulary.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    plain: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        plain = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig(
        pad_token_id=padding, eos_token_id=list(ends) or None, use_cache=True, **plain
    )
    try:
        yield
    finally:
        model.generation_config = before
