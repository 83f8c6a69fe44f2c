"""Means over answers, with standard errors that treat documents as the independent draws. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .document import Document


@dataclass(frozen=True)
class Score:
    """One answer's score.

    Attributes:
        exact: every token of the answer is the model's arg-max, given what stands before it.
        credit: share of the answer that is right from its beginning: digits of a number, tokens of anything else.
        logprob: natural log-probability of the answer; None if it was generated.
        choice: a right answer is likelier than every rival; None where rivals were not scored.
        rank: 1 + the number of rivals likelier than the best right answer; None likewise.
    """

    exact: bool
    credit: float
    logprob: float | None = None
    choice: bool | None = None
    rank: int | None = None


def clustered(results: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """{"accuracy", "stderr", "n"} from (right, asked) per document; the error treats documents as clusters.

    The formula is that of eval/fidelity.py; with one document the error is 0. "right" may count shares of answers.
    """
    asked = sum(n for _, n in results)
    accuracy = sum(right for right, _ in results) / asked
    stderr = 0.0
    if len(results) > 1:
        spread = sum((right - accuracy * n) ** 2 for right, n in results)
        stderr = math.sqrt(spread * len(results) / (len(results) - 1)) / asked
    return {"accuracy": accuracy, "stderr": stderr, "n": asked}


FIGURES = ("exact", "credit", "choice")
"""Shares from 0 to 1 that `summarised` gives, each with `NAME_stderr`."""


def summarised(scores: Sequence[Sequence[Score]]) -> dict[str, Any]:
    """Means over the answers of documents.

    Args:
        scores: of every document's answers.

    Returns:
        "exact", "credit" and, where rivals were scored, "choice", each with "NAME_stderr"; "logprob" (nats per answer)
        and "rank" (means) where they exist; "n" (answers) and "documents".
    """
    made: dict[str, Any] = {}
    for name in FIGURES:
        own = [[value for one in document if (value := getattr(one, name)) is not None] for document in scores]
        if any(own):
            share = clustered([(sum(values), len(values)) for values in own if values])
            made |= {name: share["accuracy"], f"{name}_stderr": share["stderr"]}
    flat = [one for document in scores for one in document]
    for name in ("logprob", "rank"):
        values = [value for one in flat if (value := getattr(one, name)) is not None]
        if values:
            made[name] = sum(values) / len(values)
    return {**made, "n": len(flat), "documents": len(scores)}


def chances(documents: Sequence[Document]) -> dict[str, float]:
    """What guessing gives, means over the answers: "exact" is `Answer.chance`; "choice" is one of the options, or
    `Answer.chance` where that is more (a model that says any value it has seen never takes a made-up rival)."""
    answers = [answer for document in documents for answer in document.answers]
    options = [max(a.chance, (1 + len(a.also)) / (1 + len(a.also) + len(a.rivals))) for a in answers]
    return {
        "exact": sum(answer.chance for answer in answers) / len(answers),
        "choice": sum(options) / len(answers),
    }


def above_chance(figures: dict[str, Any], chance: dict[str, float]) -> list[str]:
    """Those of "exact" and "choice" that lie more than two standard errors above chance.

    An error is taken as no smaller than that of guessing as many answers, so that few answers, all alike, show nothing
    that luck would.
    """
    found = []
    for name, guess in chance.items():
        if name in figures:
            least = math.sqrt(guess * (1 - guess) / figures["n"])
            if figures[name] - 2 * max(figures[f"{name}_stderr"], least) > guess:
                found.append(name)
    return found
