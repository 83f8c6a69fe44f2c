"""What a judge is asked about one answer, and how its verdict is read. Torch-free.

The method is the single-answer grading of "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685):
one answer at a time, a mark from 1 to 10 behind a reason, a reference beside the questions of mathematics, reasoning
and coding, and for the second turn the whole conversation with the mark for its second answer alone. The wording is
ours: marks compare with others made with this wording and the same judge, not with published ones to a tenth.
"""

from __future__ import annotations

import re
from typing import Any

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose answers are right or wrong: the judge sees a reference, where the question has one."""

_SYSTEM = "You are a careful and impartial judge of answers that an AI assistant gives to its users."
_MARK = (
    "First write a short explanation. Be as objective as you can. Then give a mark on a scale from 1 (worst) to 10 "
    'strictly in this form: "[[rating]]", for example: "Rating: [[5]]".'
)
_QUALITY = (
    "Weigh how helpful, relevant, accurate, deep and creative the answer is, and whether it has the detail that the "
    "question calls for."
)
_REFERENCE = (
    "Weigh whether the answer is correct and helpful. A reference answer is given: compare the two first, and name and "
    "correct every mistake."
)
_STRICT = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]")
_LOOSE = re.compile(r"\[\s*(\d+(?:\.\d+)?)\s*\]")


def messages(question: dict[str, Any], answers: list[str], turn: int) -> tuple[str, list[dict[str, str]]]:
    """What to send for one turn's mark.

    Args:
        question: `category`, `turns` and optionally `reference` (one text per turn).
        answers: the assistant's, of this turn and those before.
        turn: 1 or 2.

    Returns:
        The prompt's name (`single`, `single-reference`, `multi`, `multi-reference`) and chat messages.
    """
    reference = question.get("reference") or []
    referred = question.get("category") in WITH_REFERENCE and len(reference) >= turn
    name = ("single" if turn == 1 else "multi") + ("-reference" if referred else "")
    parts = ["Judge the quality of the assistant's answer to the user's question below."]
    if turn > 1:
        parts = ["Judge the quality of the assistant's answer to the user's second question in the conversation below."]
    parts += [_REFERENCE if referred else _QUALITY, _MARK, ""]
    if turn == 1:
        parts += [f"[Question]\n{question['turns'][0]}", ""]
        if referred:
            parts += [f"[Start of the reference answer]\n{reference[0]}\n[End of the reference answer]", ""]
        parts += [f"[Start of the assistant's answer]\n{answers[0]}\n[End of the assistant's answer]"]
    else:
        if referred:
            told = zip(question["turns"][:turn], reference[:turn], strict=True)
            parts += [_conversation("reference conversation", "Reference answer", list(told)), ""]
        parts += [_conversation("conversation", "Assistant", list(zip(question["turns"][:turn], answers, strict=True)))]
    return name, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n".join(parts)}]


def _conversation(title: str, speaker: str, turns: list[tuple[str, str]]) -> str:
    said = "\n\n".join(f"### User:\n{asked}\n\n### {speaker}:\n{answer}" for asked, answer in turns)
    return f"<|start of the {title}|>\n\n{said}\n\n<|end of the {title}|>"


def rating(text: str) -> float | None:
    """The mark in a verdict, 1 to 10; None where there is none. The last one counts: the task may be quoted first."""
    found = _STRICT.findall(text) or _LOOSE.findall(text)
    value = float(found[-1]) if found else None
    return value if value is not None and 1 <= value <= 10 else None
