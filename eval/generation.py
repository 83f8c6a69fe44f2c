"""What a model says when left to itself: completions beside the teacher's, repetition, exact-match tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..distill.data.documents import Fields, read_documents
from ..distill.data.tokenise import tokenise
from ..distill.errors import UserError
from . import fidelity
from .completions import agreement, complete, repetition
from .exact import MADE, file_task, made_task, read_task
from .meter import Meter, Progress

SAMPLES = 64
NEW_TOKENS = 64
PROMPT = 32
"""Tokens of a prompt, BOS included."""
BATCH_TOKENS = 8192
EXAMPLES = 3


def generation_suite(
    model: Any,
    tokenizer: Any,
    teacher: Any | None = None,
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what a model generates, greedily, beside its teacher if one is given.

    Args:
        model: any Hugging Face causal language model.
        tokenizer: of both models.
        teacher: another one with the same vocabulary, or None.
        text: held-out text to cut prompts from: a file, folder or glob, or several. None: no completions.
        samples: prompts, and questions of each task; `SAMPLES` by default.
        max_new_tokens: of a completion and of an answer to a .jsonl task; `NEW_TOKENS` by default.
        tasks: names out of `exact.MADE`, and .jsonl files (see eval/exact.py); those made from the seed by default.
        seed: of made tasks, and of which records are asked.
        progress: called with (prompts answered, in all), over both models.

    Returns:
        {"suite": "generation", "samples", "max_new_tokens", "prompt_tokens", "seed", "text": files, "tasks": {name:
        {"metric": "exact_match", "form", "n", "too_long", "shots", "chance", "student": {"value", "stderr"}, "teacher":
        likewise or None}}, "completion": {"common_prefix", "agreement", "identical" (each {"value", "stderr"}), "n",
        "new_tokens"} or None without a teacher or text, "repetition": {"student", "teacher", "text" (what the document
        itself goes on with): see `completions.repetition`} or None without text, "examples": [{"prompt", "text",
        "student", "teacher"}], "notes", "versions"}.

    Raises:
        UserError: an unknown task, a text without a long enough document, lengths beyond the context.
    """
    models = {"student": model} if teacher is None else {"student": model, "teacher": teacher}
    limits = [getattr(one.config, "max_position_embeddings", None) for one in models.values()]
    limit = min((n for n in limits if n), default=None)
    count, asked = max_new_tokens or NEW_TOKENS, samples or SAMPLES
    if limit is not None and PROMPT + count > limit:
        raise UserError(
            f"--max-new-tokens {count}: with a prompt of {PROMPT} that exceeds the models' context of {limit} tokens; "
            f"at most {limit - PROMPT}"
        )
    names = list(dict.fromkeys(MADE if tasks is None else tasks))
    files = {name: read_task(name) for name in names if name not in MADE}
    prompts = _Prompts(text, tokenizer, asked, count) if text is not None else None
    size = max(1, BATCH_TOKENS // (PROMPT + count))
    meter = Meter(progress, len(models) * (asked * len(names) + (len(prompts.ids) if prompts else 0)))
    training = [one.training for one in models.values()]
    try:
        for one in models.values():
            one.eval()
        said = (
            {name: complete(one, tokenizer, prompts.ids, count, size, meter.add) for name, one in models.items()}
            if prompts
            else {}
        )
        made = {}
        for name in names:
            before = meter.done
            if name in files:
                task = files[name]
                label = task.name if task.name not in made else name
                made[label] = file_task(task, models, tokenizer, asked, seed, limit, count, size, meter.add)
            else:
                made[name] = made_task(name, models, tokenizer, asked, seed, limit, size)
            meter.reach(before + len(models) * asked)
    finally:
        for one, mode in zip(models.values(), training, strict=True):
            one.train(mode)
    return {
        "suite": "generation",
        "samples": asked,
        "max_new_tokens": count,
        "prompt_tokens": PROMPT,
        "seed": seed,
        "text": [str(path) for path in prompts.paths] if prompts else [],
        "tasks": {name: {"teacher": None, **task} for name, task in made.items()},
        **_completions(prompts, said, tokenizer),
        "notes": _notes(prompts, asked, made),
        "versions": fidelity.versions(),
    }


class _Prompts:
    """Prompts out of documents, and what the documents go on with.

    Attributes:
        ids: token ids, `PROMPT` each.
        rest: the document's next tokens.
        documents: number of each prompt's document.
        paths: files read.
    """

    def __init__(self, text: str | Path | Sequence[str | Path], tokenizer: Any, samples: int, count: int) -> None:
        sources = [str(text)] if isinstance(text, (str, Path)) else [str(source) for source in text]
        self.paths = fidelity._files(sources)
        tokens = tokenise(read_documents(self.paths, Fields()), tokenizer)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        step = PROMPT + count
        pieces = [
            (number, document, at)
            for document, length in enumerate(tokens.lengths.tolist())
            for number, at in enumerate(range(len(bos), length - step + len(bos) + 1, step))
        ]
        if not pieces:
            raise UserError(
                f"--text {', '.join(sources)}: no document of {step} tokens (prompt and completion) among "
                f"{len(tokens)}; give longer text, or fewer --max-new-tokens"
            )
        # The beginning of every document before any document's second piece, so that as many as can be are different.
        chosen = _spread(sorted(pieces), samples)
        self.ids, self.rest, self.documents = [], [], []
        for _, document, at in chosen:
            ids: np.ndarray = tokens.document(document)
            stop = at + PROMPT - len(bos)
            self.ids.append([*bos, *ids[at:stop].tolist()])
            self.rest.append(ids[stop : stop + count].tolist())
            self.documents.append(document)


def _spread(pieces: list[tuple[int, int, int]], samples: int) -> list[tuple[int, int, int]]:
    """`samples` pieces: all of the first numbers that fit whole, and an even spread of the next."""
    chosen: list[tuple[int, int, int]] = []
    for number in range(pieces[-1][0] + 1):
        same = [piece for piece in pieces if piece[0] == number]
        room = samples - len(chosen)
        if len(same) >= room:
            return chosen + [same[at * len(same) // room] for at in range(room)]
        chosen += same
    return chosen


def _completions(prompts: _Prompts | None, said: dict[str, list[list[int]]], tokenizer: Any) -> dict[str, Any]:
    """The result's "completion", "repetition" and "examples"."""
    if prompts is None:
        return {"completion": None, "repetition": None, "examples": []}
    completion = None
    if "teacher" in said:
        parts = agreement(said["student"], said["teacher"], prompts.documents)
        tokens = sum(map(len, said["student"])) / len(prompts.ids)
        completion = {**parts, "n": len(prompts.ids), "new_tokens": tokens}
    texts = {**said, "text": prompts.rest}
    examples = [
        {"prompt": tokenizer.decode(prompt, skip_special_tokens=True)}
        | {name: tokenizer.decode(own[number], skip_special_tokens=True) for name, own in texts.items()}
        for number, prompt in enumerate(prompts.ids[:EXAMPLES])
    ]
    measured = {name: repetition(own, prompts.documents) for name, own in texts.items()}
    return {"completion": completion, "repetition": {"teacher": None, **measured}, "examples": examples}


def _notes(prompts: _Prompts | None, asked: int, made: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know, in words."""
    notes = []
    if prompts is None:
        notes.append("no text was given: no completions, no repetition")
    elif len(prompts.ids) < asked:
        notes.append(f"the text gave {len(prompts.ids)} prompts of the {asked} asked for")
    for name, task in made.items():
        if task["too_long"]:
            notes.append(f"{name}: {task['too_long']} questions do not fit the models' context and were not asked")
    return notes
