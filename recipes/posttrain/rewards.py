"""Rewards that are computed, not learnt: what of a completion counts as its answer, and whether it is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from .schema import GrpoSection

_NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")


def text_of(completion: Any) -> str:
    """A completion's text; of chat messages the last one's."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def number(text: str) -> Decimal | None:
    """A text that is one number: `1,024`, `-3`, `2.50`; None where it is something else, the word `infinity` too."""
    try:
        found = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def answer_of(text: str, right: str, read: str) -> str | None:
    """What of a completion is taken for its answer; None where nothing is.

    Args:
        text: the completion.
        right: the right answer; where it is a number, an answer is one too.
        read: see `GrpoSection.read`.
    """
    if read == "line":
        text = next((line for line in text.splitlines() if line.strip()), "")
    if number(right) is None:
        return text.strip() or None
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def reward(text: str, right: str, settings: GrpoSection) -> float:
    """Of one completion, from 0 to 1; see `GrpoSection.reward`."""
    given = answer_of(text, right, settings.read)
    if given is None:
        return 0.0
    wanted, found = number(right), number(given)
    if wanted is None or found is None:
        return float(given == right.strip())
    if wanted == found:
        return 1.0
    return 0.0 if settings.reward == "exact" else float(Decimal("0.5") / (1 + abs(wanted - found)))


def reward_function(settings: GrpoSection) -> Callable[..., list[float | None]]:
    """`reward` as TRL's GRPO calls it."""

    def answers(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
        return [reward(text_of(given), str(right), settings) for given, right in zip(completions, answer, strict=True)]

    answers.__name__ = settings.reward
    return answers
