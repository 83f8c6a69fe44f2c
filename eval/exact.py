"""Exact-match tasks: made from a seed for any tokenizer, or read from .jsonl files.

Made: `copy` (a list of words said twice, begun a third time) and `key-recall` (a key told among others, asked for after
filler). Read, one record a line: the field `prompt`, `question` or `context`, the field `answer`, and optionally
`aliases`, which are right too:

- GSM8K's form, where answers hold `#### 72`: the gold answer is the number after the mark. The model's is the number
  after its own `####`, or the last number it says before it begins another question.
- numbers, where every answer is one: the last number of the model's first line that holds any.
- anything else: the model's first line against the answers, both lower-cased, without punctuation and articles, with
  single spaces (SQuAD's normalisation).
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ..distill.errors import UserError
from .completions import complete, estimate
from .tasks.document import Answer, Document, Writer
from .tasks.generation import generated
from .tasks.pairs import RecallCell, document, make_cases
from .tasks.words import KEYS

MADE = ("copy", "key-recall")
COPY_WORDS = 8
RECALL_CELL = RecallCell(4, 64)
SHOTS = 4
"""Records that are shown with their answers before the one asked for, where the context has room."""
_PROMPTS = ("prompt", "question", "context")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Record:
    """One line of a .jsonl task: the prompt, the answer as written, and everything that counts as right."""

    prompt: str
    answer: str
    right: tuple[str, ...]


@dataclass(frozen=True)
class FileTask:
    """A .jsonl file of records. `form` is `gsm8k`, `number` or `text`."""

    name: str
    form: str
    records: list[Record] = field(repr=False)


def read_task(path: str | Path) -> FileTask:
    """A task from a .jsonl file.

    Raises:
        UserError: it cannot be read, or a line is no record.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"--tasks {path}: cannot be read ({reason}). There are {', '.join(MADE)}, and any .jsonl file"
        ) from None
    records = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise UserError(f"{path}: no record; expected lines of JSON with prompt (or question, context) and answer")
    form = "text"
    if all("####" in record.answer for record in records):
        form = "gsm8k"
        records = [
            Record(one.prompt, one.answer, (one.answer.rpartition("####")[2].strip(), *one.right[1:]))
            for one in records
        ]
    elif all(_number(record.answer) is not None for record in records):
        form = "number"
    return FileTask(path.stem, form, records)


def _record(line: str, place: str) -> Record:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); correct the line") from None
    prompt = next((found[name] for name in _PROMPTS if name in found), None) if isinstance(found, dict) else None
    answer = found.get("answer") if isinstance(found, dict) else None
    if not isinstance(prompt, str) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise UserError(f"{place}: expected the fields {' or '.join(_PROMPTS)} and answer; correct the line")
    aliases = [str(alias) for alias in found.get("aliases") or () if str(alias).strip()]
    return Record(prompt.strip(), str(answer).strip(), tuple(dict.fromkeys([str(answer).strip(), *aliases])))


def is_right(form: str, right: Sequence[str], text: str) -> bool:
    """Whether what a model said is one of the right answers, by the rule of the form (see the top of this file)."""
    if form == "text":
        said = normalised(text.strip().split("\n")[0])
        return any(said == normalised(answer) for answer in right)
    said = said_number(form, text)
    return said is not None and any(_number(answer) == said for answer in right)


def said_number(form: str, text: str) -> Decimal | None:
    """The number that a model gives as its answer, None where it says none."""
    if form == "number":
        found = next((numbers for line in text.splitlines() if (numbers := _NUMBER.findall(line))), [])
    else:
        text = re.split(r"\n\s*Question:", text)[0]
        marked = re.search(r"####\s*(" + _NUMBER.pattern + ")", text)
        found = [marked[1]] if marked else _NUMBER.findall(text)
    return _number(found[-1]) if found else None


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip().replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def made_documents(name: str, tokenizer: Any, samples: int, seed: int) -> list[Document]:
    """Documents of one of the tasks `MADE`, one answer each."""
    if name == "key-recall":
        cases = make_cases(tokenizer, [RECALL_CELL], samples, seed, queries=1)
        return [document(case) for case in cases]
    writer, documents = Writer(tokenizer), []
    for number in range(samples):
        rng = random.Random(f"copy {seed} {number}")
        words = [writer.encode(" " + word) for word in rng.sample(KEYS, COPY_WORDS)]
        line = [token for word in words for token in word]
        end = writer.encode(".\n")
        start = [*writer.first, *line, *end, *line, *end, *words[0]]
        rest = line[len(words[0]) :]
        documents.append(Document([*start, *rest], (Answer(len(start), len(start) + len(rest), 0.0),)))
    return documents


def made_task(
    name: str, models: dict[str, Any], tokenizer: Any, samples: int, seed: int, limit: int | None, batch_size: int
) -> dict[str, Any]:
    """One of the tasks `MADE` for every model: the answer is generated, and right if the text begins with it."""
    documents = made_documents(name, tokenizer, samples, seed)
    fitting = [one for one in documents if limit is None or len(one.ids) <= limit]
    result = _task("made", len(fitting), len(documents) - len(fitting), 0)
    result["chance"] = sum(one.answers[0].chance for one in fitting) / len(fitting) if fitting else None
    for model_name, model in models.items():
        scores = generated(model, tokenizer, fitting, batch_size) if fitting else []
        result[model_name] = _share([float(one.exact) for (one,) in scores])
    return result


def file_task(
    task: FileTask,
    models: dict[str, Any],
    tokenizer: Any,
    samples: int,
    seed: int,
    limit: int | None,
    count: int,
    batch_size: int,
    done: Callable[[int], None] = lambda prompts: None,
) -> dict[str, Any]:
    """A .jsonl task for every model.

    Args:
        task: see `read_task`.
        models: name -> model.
        tokenizer: of all.
        samples: records asked at most, drawn by `seed`, as are the `SHOTS` shown before each, which are not asked.
        seed: of the draw.
        limit: tokens of prompt and answer together; of a prompt that is too long, shots are left out first, and
            where it does not fit without any, the record.
        count: new tokens.
        batch_size: prompts at once.
        done: called with the number of prompts answered.
    """
    order = list(range(len(task.records)))
    random.Random(f"{task.name} {seed}").shuffle(order)
    shots = [task.records[i] for i in order[: min(SHOTS, len(order) - 1)]]
    asked = [task.records[i] for i in order[len(shots) :][:samples]]
    prompts, kept, shown = [], [], len(shots)
    for record in asked:
        for number in range(len(shots), -1, -1):
            ids = _prompt(task, shots[:number], record, tokenizer)
            if limit is None or len(ids) + count <= limit:
                prompts.append(ids)
                kept.append(record)
                shown = min(shown, number)
                break
    result = _task(task.form, len(kept), len(asked) - len(kept), shown if kept else 0)
    for name, model in models.items():
        texts = complete(model, tokenizer, prompts, count, batch_size, done)
        said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]
        right = [float(is_right(task.form, one.right, text)) for one, text in zip(kept, said, strict=True)]
        result[name] = _share(right)
    return result


def _prompt(task: FileTask, shots: Sequence[Record], record: Record, tokenizer: Any) -> list[int]:
    """BOS, the shots with their answers, and the question."""

    def asked(one: Record) -> str:
        return f"Question: {one.prompt}\nAnswer:" if task.form != "text" else one.prompt

    text = "".join(f"{asked(shot)} {shot.answer}\n\n" for shot in shots) + asked(record)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _task(form: str, n: int, too_long: int, shots: int) -> dict[str, Any]:
    return {"metric": "exact_match", "form": form, "n": n, "too_long": too_long, "shots": shots, "chance": None}


def _share(values: Sequence[float]) -> dict[str, float | None] | None:
    return estimate(values, [1] * len(values), range(len(values))) if values else None
