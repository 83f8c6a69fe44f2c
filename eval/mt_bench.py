"""MT-Bench: two-turn answers to 80 questions, marked by a judge behind an OpenAI-compatible endpoint.

Answers and verdicts are kept line by line in FastChat's forms (`model_answer`, `model_judgment`), so that its tools
read them, and a stopped run goes on where it was. Sampling follows the benchmark: temperature by category, here from a
seed per question and turn. How answers are judged: judge_prompts.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..distill.errors import RunFailed, UserError
from . import judge_prompts
from .completions import end_ids, estimate, until_end
from .endpoint import Endpoint, Unanswered
from .fidelity import versions
from .identity import model_id
from .lines import Lines, Memory
from .meter import Meter, Progress
from .tasks.generation import continued, padding_id, plain_greedy

MAX_NEW_TOKENS = 1024
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of sampling, by category; all others are greedy."""
ASKS = 3
"""How often a judge is asked for a verdict that has no mark."""


def mt_bench_suite(
    model: Any,
    tokenizer: Any,
    teacher: Any | None = None,
    *,
    questions: str | Path,
    endpoint: str | None = None,
    judge: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    progress: Progress | None = None,
    folder: str | Path | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """Answer the questions, and have the answers marked where an endpoint is given.

    Args:
        model: any Hugging Face causal language model.
        tokenizer: of both models, with a chat template.
        teacher: another one with the same vocabulary, or None.
        questions: FastChat's question.jsonl: `question_id`, `category`, `turns`, optionally `reference`.
        endpoint: url of an OpenAI-compatible server. None: answers only.
        judge: name of the judging model there.
        api_key_env: environment variable with the key, where the server wants one.
        progress: called with (answers and verdicts made, in all).
        folder: where answers and verdicts are kept; None: nowhere.
        max_new_tokens: of one answer; no more than the model's context has room for.
        seed: of the sampling.

    Returns:
        {"suite": "mt_bench", "judge" (None without endpoint), "student": {"score" (mean of the marks), "stderr"
        (clustered by question), "n" (marks), "turns": {"1", "2"}} or None, "teacher": likewise, "categories": {name:
        {"student": {"score", "stderr", "n"}, "teacher"}}, "answers": {model: {"questions", "cut" (no room for the
        answer), "unmarked" (verdicts without a mark), "file", "judgments"}}, "max_new_tokens", "seed", "notes",
        "versions"}.

    Raises:
        UserError: no chat template, questions that are none, an endpoint without a judge or one that refuses.
        RunFailed: the endpoint stops answering; what was made is kept in `folder`.
    """
    asked = read_questions(questions)
    template = check_template(tokenizer)
    if endpoint is not None and not judge:
        raise UserError("--endpoint: which model judges? Name it as the server does: --judge MODEL")
    there = Endpoint(endpoint, judge, api_key_env) if endpoint is not None and judge else None
    models = {"student": model} if teacher is None else {"student": model, "teacher": teacher}
    settings = {"seed": seed, "max_new_tokens": max_new_tokens, "template": template}
    meter = Meter(progress, sum(len(one["turns"]) for one in asked) * len(models) * (1 if there is None else 2))
    place = None if folder is None else Path(folder)
    made: dict[str, dict[str, Any]] = {}
    try:
        for name, one in models.items():
            label = f"{name}-{model_id(one, **settings)}"
            path = None if place is None else place / "model_answer" / f"{label}.jsonl"
            with _open(path) as lines:
                answers = _answer(one, tokenizer, asked, lines, label, max_new_tokens, seed, meter)
            made[name] = {"label": label, "answers": answers, "file": path, "judgments": None, "marks": []}
        for one in made.values():
            if there is None:
                break
            path = None if place is None else place / "model_judgment" / f"{_plain(str(judge))}_{one['label']}.jsonl"
            with _open(path) as lines:
                one["judgments"] = path
                one["marks"] = _judge(there, asked, one["answers"], lines, one["label"], meter)
    finally:
        if there is not None:
            there.close()
    return _result(asked, made, judge if there is not None else None, place, there) | {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "versions": versions(),
    }


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """FastChat's question.jsonl.

    Raises:
        UserError: it cannot be read, or a line is no question.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"--questions {path}: cannot be read ({reason}). Give MT-Bench's question.jsonl") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            if not (isinstance(one["question_id"], int | str) and isinstance(one["category"], str)):
                raise TypeError
            if not (1 <= len(one["turns"]) <= 2 and all(isinstance(turn, str) for turn in one["turns"])):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number}: no question; expected question_id, category and turns (one or two texts)"
            ) from None
        found.append(one)
    if not found or len({one["question_id"] for one in found}) < len(found):
        raise UserError(f"{path}: no question, or two with one question_id; give MT-Bench's question.jsonl")
    return found


def check_template(tokenizer: Any) -> str:
    """A hash of the tokenizer's chat template.

    Raises:
        UserError: it has none.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, and MT-Bench is a conversation. Convert an "
            "instruction-tuned teacher, or put chat_template.jinja beside the tokenizer; what a base model says by "
            "itself is measured with --suite generation"
        )
    return hashlib.sha256(str(template).encode()).hexdigest()[:8]


def _answer(
    model: Any,
    tokenizer: Any,
    questions: list[dict[str, Any]],
    lines: Lines,
    label: str,
    count: int,
    seed: int,
    meter: Meter,
) -> dict[Any, dict[str, Any]]:
    """{question_id: model_answer record}: those kept, and all others made."""
    kept = {record["question_id"]: record for record in lines.records}
    training = model.training
    model.eval()
    try:
        for question in questions:
            number = question["question_id"]
            if number not in kept:
                turns, cut = [], 0
                for _ in question["turns"]:
                    text, whole = _say(model, tokenizer, question, turns, count, seed)
                    turns.append(text)
                    cut += not whole
                kept[number] = {
                    "question_id": number,
                    "answer_id": hashlib.sha256(f"{label} {number} {turns}".encode()).hexdigest()[:22],
                    "model_id": label,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                    "cut": cut,
                }
                lines.append(kept[number])
            meter.add(len(question["turns"]))
    finally:
        model.train(training)
    return {question["question_id"]: kept[question["question_id"]] for question in questions}


@torch.no_grad()
def _say(
    model: Any, tokenizer: Any, question: dict[str, Any], before: list[str], count: int, seed: int
) -> tuple[str, bool]:
    """(the answer to the next turn, whether there was room for it)."""
    turn = len(before)
    messages: list[dict[str, str]] = []
    for asked, answer in zip(question["turns"], [*before, None], strict=False):
        messages.append({"role": "user", "content": asked})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    limit = getattr(model.config, "max_position_embeddings", None)
    room = count if limit is None else min(count, limit - len(ids))
    if room < 1:
        return "", False
    ends = end_ids(model, tokenizer)
    temperature = TEMPERATURES.get(question["category"], 0.0)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        drawn = hashlib.sha256(f"{seed} {question['question_id']} {turn}".encode()).digest()[:6]
        torch.manual_seed(int.from_bytes(drawn))
        with plain_greedy(model, padding_id(tokenizer), ends, temperature):
            (said,) = continued(model, [ids], room, padding_id(tokenizer))
    said = until_end(said, ends)
    whole = room == count or len(said) < room or said[-1] in ends
    return tokenizer.decode(said, skip_special_tokens=True).strip(), whole


def _judge(
    endpoint: Any,
    questions: list[dict[str, Any]],
    answers: dict[Any, dict[str, Any]],
    lines: Lines,
    label: str,
    meter: Meter,
) -> list[dict[str, Any]]:
    """model_judgment records, one per question and turn: those kept that have a mark, and all others made."""
    kept = {(r["question_id"], r["turn"], r["answer_id"]): r for r in lines.records if r["score"] > 0}
    made = []
    for question in questions:
        answer = answers[question["question_id"]]
        for turn in range(1, len(question["turns"]) + 1):
            key = (question["question_id"], turn, answer["answer_id"])
            if key not in kept:
                try:
                    kept[key] = _verdict(endpoint, question, answer, turn, label)
                except Unanswered as error:
                    raise RunFailed(
                        f"{error}. {len(lines.records)} verdicts on {label} are kept: run the same command again"
                    ) from None
                lines.append(kept[key])
            made.append(kept[key])
            meter.add(1)
    return made


def _verdict(endpoint: Any, question: dict[str, Any], answer: dict[str, Any], turn: int, label: str) -> dict[str, Any]:
    """One judgment; its score is -1 where the judge gives no mark, however often it is asked."""
    turns = answer["choices"][0]["turns"][:turn]
    name, messages = judge_prompts.messages(question, turns, turn)
    said, mark = "", None
    for _ in range(ASKS):
        said = endpoint.ask(messages)
        mark = judge_prompts.rating(said)
        if mark is not None:
            break
    return {
        "question_id": question["question_id"],
        "answer_id": answer["answer_id"],
        "model": label,
        "judge": [endpoint.model, name],
        "user_prompt": messages[-1]["content"],
        "judgment": said,
        "score": -1 if mark is None else mark,
        "turn": turn,
        "tstamp": time.time(),
    }


def _result(
    questions: list[dict[str, Any]],
    made: dict[str, dict[str, Any]],
    judge: str | None,
    place: Path | None,
    endpoint: Any,
) -> dict[str, Any]:
    category = {question["question_id"]: question["category"] for question in questions}
    names = list(dict.fromkeys(category.values()))

    def score(model: str, keep: Callable[[dict[str, Any]], bool] = lambda mark: True) -> dict[str, Any] | None:
        marks = [mark for mark in made.get(model, {"marks": []})["marks"] if mark["score"] > 0 and keep(mark)]
        if not marks:
            return None
        one = estimate([mark["score"] for mark in marks], [1] * len(marks), [mark["question_id"] for mark in marks])
        return {"score": one["value"], "stderr": one["stderr"], "n": len(marks)}

    models: dict[str, Any] = {}
    for model in ("student", "teacher"):
        whole = score(model)
        turns = {str(turn): score(model, lambda mark, turn=turn: mark["turn"] == turn) for turn in (1, 2)}
        models[model] = None if whole is None else {**whole, "turns": turns}
    answers = {
        name: {
            "questions": len(one["answers"]),
            "cut": sum(record.get("cut", 0) for record in one["answers"].values()),
            "unmarked": sum(mark["score"] <= 0 for mark in one["marks"]),
            "file": None if one["file"] is None else str(one["file"]),
            "judgments": None if one["judgments"] is None else str(one["judgments"]),
        }
        for name, one in made.items()
    }
    notes = [
        f"{name}: {one['cut']} answers were cut by the model's context" for name, one in answers.items() if one["cut"]
    ]
    notes += [
        f"{name}: {one['unmarked']} verdicts have no mark and do not count"
        for name, one in answers.items()
        if one["unmarked"]
    ]
    if endpoint is None:
        notes.append("no endpoint: answers only. To have them marked, repeat with --endpoint URL --judge MODEL")
    else:
        notes += endpoint.notes
    if place is None:
        notes.append("no folder: nothing was kept")
    return {
        "suite": "mt_bench",
        "judge": judge,
        **models,
        "categories": {
            name: {
                model: score(model, lambda mark, name=name: category[mark["question_id"]] == name)
                for model in ("student", "teacher")
            }
            for name in names
        },
        "answers": answers,
        "notes": notes,
    }


def _open(path: Path | None) -> Lines:
    return Memory() if path is None else Lines(path)


def _plain(name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
