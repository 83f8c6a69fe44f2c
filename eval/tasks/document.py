"""A recall document: token ids, and the places in them where something said earlier must be said again.

Pieces of text are encoded one by one and their ids concatenated, so that a word has the same ids wherever it stands
and a document has exactly the length asked for, under any tokenizer. Torch-free.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...distill.errors import UserError
from .words import filler_sentence

Ids = tuple[int, ...]
SENTENCE_ENDS = (".", "!", "?")
LONGEST_FILLER = 2_000_000  # characters read of the user's own file


class TooShort(ValueError):
    """The length asked for has no room for the document's parts."""


@dataclass(frozen=True)
class Answer:
    """What is asked for.

    Attributes:
        start, end: its half-open token range in the document.
        chance: of being right by saying any value of this kind that the document holds, or that exists where it holds
            no wrong one.
        rivals: token ids of wrong answers of the same kind; the choice is between the answer and these.
        also: token ids of other answers that are right.
        number: partial credit counts leading digits instead of leading tokens.
    """

    start: int
    end: int
    chance: float
    rivals: tuple[Ids, ...] = ()
    also: tuple[Ids, ...] = ()
    number: bool = False


@dataclass(frozen=True)
class Document:
    """One document. `ids` are its token ids (BOS first where the tokenizer has one)."""

    ids: list[int]
    answers: tuple[Answer, ...]


class Ask(NamedTuple):
    """A question: token ids that ask, the answer's ids, and what `Answer` says of it."""

    asking: list[int]
    answer: list[int]
    chance: float
    rivals: tuple[Ids, ...] = ()
    also: tuple[Ids, ...] = ()
    number: bool = False


class Writer:
    """Writes documents for one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer.
        filler: a text file to take the filler from; made-up prose if None.

    Raises:
        UserError: the file cannot be read, is no text, or has no token.
    """

    def __init__(self, tokenizer: Any, filler: str | Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.first: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._encoded: dict[str, list[int]] = {}
        self._ends: dict[int, bool] = {}
        self._own = None if filler is None else self._read(Path(filler))

    def encode(self, text: str) -> list[int]:
        """The ids of a piece of text, without special tokens.

        Raises:
            ValueError: the text encodes to nothing.
        """
        ids = self._encoded.get(text)
        if ids is None:
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if not ids:
                raise ValueError(f"this tokenizer encodes {text!r} to nothing; recall cannot be measured with it")
            if not any(letter.isdigit() for letter in text):  # numbers hardly come twice
                self._encoded[text] = ids
        return list(ids)

    def filler(self, rng: random.Random, count: int) -> list[int]:
        """Exactly `count` token ids of filler: prose, or the user's text from the start of a sentence on."""
        if self._own is not None:
            start = self._sentence_start(self._own, rng.randrange(len(self._own)))
            turned = self._own[start:] + self._own[:start]
            return (turned * (count // len(turned) + 1))[:count]
        ids: list[int] = []
        while len(ids) < count:
            text = (" " if ids else "") + " ".join(filler_sentence(rng) for _ in range(count // 8 + 2))
            ids += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[:count]

    def haystack(
        self, rng: random.Random, length: int, inserts: Sequence[tuple[float, list[int]]], asks: Sequence[Ask]
    ) -> Document:
        """A document of exactly `length` tokens: filler with sentences put in, then questions with their answers.

        Args:
            rng: of the filler.
            length: tokens of the whole document, BOS and answers included.
            inserts: (depth, ids): depth from 0 (the beginning) to 1 (just before the questions), as a share of the
                filler, moved to the nearest end of a sentence.
            asks: the questions.

        Raises:
            TooShort: the document's parts alone are longer.
        """
        fixed = [*self.first, *(i for _, ids in inserts for i in ids)]
        room = length - len(fixed) - sum(len(ask.asking) + len(ask.answer) for ask in asks)
        if room < 0:
            raise TooShort(f"length must be at least {length - room} tokens for this document, not {length}")
        straw = self.filler(rng, room)
        ends = [0, *(i + 1 for i, token in enumerate(straw) if self.ends_sentence(token)), room]
        ids, done = list(self.first), 0
        for depth, needle in sorted(inserts, key=lambda insert: insert[0]):
            place = max(done, min(ends, key=lambda end: abs(end - depth * room)))
            ids += straw[done:place] + needle
            done = place
        return self.asked(ids + straw[done:], asks)

    def asked(self, ids: list[int], asks: Sequence[Ask]) -> Document:
        """The document that ends with these questions and their answers."""
        ids, answers = list(ids), []
        for ask in asks:
            ids += ask.asking
            answers.append(Answer(len(ids), len(ids) + len(ask.answer), *ask[2:]))
            ids += ask.answer
        return Document(ids, tuple(answers))

    def ends_sentence(self, token: int) -> bool:
        """Whether a token ends a sentence or a line."""
        if token not in self._ends:
            text = self.tokenizer.decode([token])
            self._ends[token] = "\n" in text or text.rstrip().endswith(SENTENCE_ENDS)
        return self._ends[token]

    def _sentence_start(self, ids: list[int], near: int) -> int:
        return next((i + 1 for i in range(near, len(ids) - 1) if self.ends_sentence(ids[i])), 0)

    def _read(self, path: Path) -> list[int]:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(LONGEST_FILLER)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"--filler {path}: cannot be read ({reason}). Give a plain text file") from None
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError(f"--filler {path}: has no text. Give a plain text file of a page or more")
        return list(ids)
