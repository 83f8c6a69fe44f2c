"""Scoring by log-likelihood: what the model would say next at every answer, and how likely it finds the wrong ones."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ...distill.modeling.cache import cache_keyword
from .document import Answer, Document
from .summary import Score


@torch.no_grad()
def score(model: Any, tokenizer: Any, documents: Sequence[Document], choices: bool = True) -> list[list[Score]]:
    """Scores of every answer of documents, teacher-forced: each answer is read with the true ones before it.

    Documents with one answer and rivals of several tokens are read up to the answer, whose options then go on from the
    model's cache. All others take one forward pass, padded on the right; of these, answers get a choice only where
    they and their rivals are single tokens.

    Args:
        model: any causal language model whose call takes input_ids, attention_mask, use_cache and returns `.logits`.
        tokenizer: of the documents; digits are read with it.
        documents: one batch.
        choices: score rivals.
    """
    branching = [row for row, document in enumerate(documents) if choices and _branches(document)]
    straight = [row for row in range(len(documents)) if row not in set(branching)]
    scores: dict[int, list[Score]] = {}
    if straight:
        chosen = [documents[row] for row in straight]
        scores |= dict(zip(straight, _forced(model, tokenizer, chosen, choices), strict=True))
    groups: dict[tuple[int, int], list[int]] = {}
    for row in branching:
        answer = documents[row].answers[0]
        groups.setdefault((answer.start, len(answer.also) + len(answer.rivals)), []).append(row)
    for rows in groups.values():
        scores |= {row: [one] for row, one in zip(rows, _branched(model, tokenizer, documents, rows), strict=True)}
    return [scores[row] for row in range(len(documents))]


def _branches(document: Document) -> bool:
    answer = document.answers[0]
    options = (*answer.also, *answer.rivals)
    several = answer.end - answer.start > 1 or any(len(option) > 1 for option in options)
    return len(document.answers) == 1 and bool(answer.rivals) and several


def _forced(model: Any, tokenizer: Any, documents: Sequence[Document], choices: bool) -> list[list[Score]]:
    logits, first = answer_logits(model, documents)
    best = logits.argmax(-1).cpu()
    scores: list[list[Score]] = []
    for row, document in enumerate(documents):
        scores.append([])
        for answer in document.answers:
            at = slice(answer.start - 1 - first, answer.end - 1 - first)
            ids = document.ids[answer.start : answer.end]
            logprobs = logits[row, at].float().log_softmax(-1).cpu()
            logprob = float(logprobs.gather(-1, torch.tensor(ids)[:, None]).sum())
            choice = rank = None
            right = (ids, *answer.also)
            if choices and answer.rivals and all(len(option) == 1 for option in (*right, *answer.rivals)):
                here = logprobs[0].tolist()
                choice, rank = choose([here[i] for (i,) in right], [here[i] for (i,) in answer.rivals])
            exact, credit = read_off(tokenizer, answer, ids, best[row, at].tolist())
            scores[row].append(Score(exact, credit, logprob, choice, rank))
    return scores


def _branched(model: Any, tokenizer: Any, documents: Sequence[Document], rows: Sequence[int]) -> list[Score]:
    """Documents whose single answers start at the same token and have as many options each."""
    answers = [documents[row].answers[0] for row in rows]
    prefixes = torch.tensor([documents[row].ids[: answers[0].start] for row in rows])
    options = [
        (tuple(documents[row].ids[answer.start : answer.end]), *answer.also, *answer.rivals)
        for row, answer in zip(rows, answers, strict=True)
    ]
    longest = max(len(option) for own in options for option in own)
    ids = torch.tensor([[(*option, *[0] * (longest - len(option))) for option in own] for own in options])
    logits = option_logits(model, prefixes, ids)
    best = logits[:, 0].argmax(-1).cpu()
    device = logits.device
    taken = logits.float().log_softmax(-1).gather(-1, ids.to(device)[..., None])[..., 0]
    lengths = torch.tensor([[len(option) for option in own] for own in options], device=device)
    inside = torch.arange(longest, device=device) < lengths[..., None]
    sums = (taken * inside).sum(-1).tolist()
    scores = []
    for place, (answer, own, values) in enumerate(zip(answers, options, sums, strict=True)):
        right = 1 + len(answer.also)
        exact, credit = read_off(tokenizer, answer, own[0], best[place, : len(own[0])].tolist())
        scores.append(Score(exact, credit, values[0], *choose(values[:right], values[right:])))
    return scores


def option_logits(model: Any, prefixes: torch.Tensor, options: torch.Tensor) -> torch.Tensor:
    """What predicts each token of each option after its prefix.

    The prefixes are read once and the options go on from the cache; a model without a cache that can be repeated reads
    every prefix with every option.

    Args:
        model: as in `score`.
        prefixes: (B, P) token ids.
        options: (B, R, n) token ids, padded on the right with anything.

    Returns:
        Logits (B, R, n, V).
    """
    batch, count, length = options.shape
    device = next(model.parameters()).device
    prefixes, options = prefixes.to(device), options.to(device)
    keep = kept(model, 1)
    out = model(input_ids=prefixes, use_cache=True, **keep)
    first = out.logits[:, -1:, None].transpose(1, 2).expand(-1, count, -1, -1)
    if length == 1:
        return first
    keyword = cache_keyword(model)
    cache: Any = getattr(out, keyword, None)
    if hasattr(cache, "batch_repeat_interleave"):
        cache.batch_repeat_interleave(count)
        later = model(input_ids=options[..., :-1].flatten(0, 1), use_cache=True, **{keyword: cache}).logits
    else:
        whole = [torch.cat([row.expand(count, -1), own[:, :-1]], 1) for row, own in zip(prefixes, options, strict=True)]
        read = [model(input_ids=ids, use_cache=False, **kept(model, length)).logits for ids in whole]
        later = torch.cat([logits[:, 1 - length :] for logits in read])
    return torch.cat([first, later.unflatten(0, (batch, count))], 2)


def kept(model: Any, positions: int) -> dict[str, int]:
    """The argument that has a model give the logits of its last positions only, where it takes one."""
    return {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def choose(right: list[float], wrong: list[float]) -> tuple[bool, int]:
    """(a right answer is likelier than every wrong one, 1 + how many wrong ones are at least as likely)."""
    rank = 1 + sum(value >= max(right) for value in wrong)
    return rank == 1, rank


def read_off(tokenizer: Any, answer: Answer, ids: Sequence[int], said: Sequence[int]) -> tuple[bool, float]:
    """(whether it is right, partial credit) of what was said where `ids` was the answer.

    Where another right answer begins alike and was said instead, the rest of it counts as right: reading with the
    answer given cannot tell (generation can).
    """
    matched = next((n for n, (x, y) in enumerate(zip(said, ids, strict=False)) if x != y), min(len(said), len(ids)))
    if matched == len(ids):
        return True, 1.0
    turned = tuple(said[: matched + 1])
    if any(turned == other[: matched + 1] for other in answer.also):
        return True, 1.0
    if not answer.number or matched == len(said):
        return False, matched / len(ids)
    truth = tokenizer.decode(list(ids)).strip()
    guess = tokenizer.decode([*ids[:matched], said[matched]]).strip()
    alike = next((n for n, (x, y) in enumerate(zip(guess, truth, strict=False)) if x != y), min(len(guess), len(truth)))
    return False, alike / len(truth)


def answer_logits(model: Any, documents: Sequence[Document], **inputs: Any) -> tuple[torch.Tensor, int]:
    """Logits (B, n, V) of documents padded on the right, and the position of the first of them.

    They begin where the first answer is predicted, or earlier. `inputs` replace what the model is called with.
    """
    device = next(model.parameters()).device
    longest = max(len(document.ids) for document in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    padding = torch.zeros(len(documents), longest, dtype=torch.long)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        padding[row, : len(document.ids)] = 1
    mask = None if bool(padding.all()) else padding.to(device)
    keep = kept(model, longest - min(document.answers[0].start for document in documents) + 1)
    given = {"input_ids": ids.to(device), "attention_mask": mask, "use_cache": False, **keep, **inputs}
    logits = model(**given).logits
    return logits, longest - logits.shape[1]
