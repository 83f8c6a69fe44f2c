"""Multi-query associative recall: key -> value pairs, filler prose, queries that name a key. Torch-free.

    Remember: bado dibi kafo suti.
    Tom went to the mill. The goose slept all day ...
    Recall: kafo suti bado dibi.

The number of pairs and the distance (tokens of filler between the last pair and the query block) vary independently,
because linear mixers lose them independently. The task is that of Zoology (arXiv 2312.04927) in prose.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .document import Answer, Document
from .words import END_OF_PAIRS, END_OF_QUERIES, KEYS, RECALL, REMEMBER, VALUES, draw_pairs, filler_sentence


@dataclass(frozen=True)
class RecallCell:
    """One point of the measurement: `pairs` to remember, `distance` tokens of filler before the query block."""

    pairs: int
    distance: int


@dataclass(frozen=True)
class RecallCase:
    """One document. `ids` are its token ids (BOS first where the tokenizer has one); `answers` are the half-open
    token ranges (start, end) of the queried values in `ids`."""

    cell: RecallCell
    ids: list[int]
    answers: list[tuple[int, int]]


DEFAULT_CELLS = tuple(RecallCell(p, d) for p in (4, 16, 64, 128) for d in (0, 128, 384, 640))


class CaseMaker:
    """Builds cases for one tokenizer; words and frame are encoded once.

    Words are encoded one by one (each with its leading space) and ids are concatenated, so pairs and queries carry
    the same ids for the same word under any tokenizer, and the filler can be cut to an exact number of tokens.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        texts = [REMEMBER, END_OF_PAIRS, RECALL, END_OF_QUERIES, *(" " + word for word in KEYS + VALUES)]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if not all(encoded):
            raise ValueError("this tokenizer encodes some recall words to nothing; recall cannot be measured with it")
        self.frame = [list(ids) for ids in encoded[:4]]
        self.words = dict(zip(KEYS + VALUES, (list(ids) for ids in encoded[4:]), strict=True))
        self.first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def filler(self, rng: random.Random, distance: int) -> list[int]:
        """Exactly `distance` token ids of filler prose."""
        ids: list[int] = []
        while len(ids) < distance:
            text = (" " if ids else "") + " ".join(filler_sentence(rng) for _ in range(distance // 8 + 2))
            ids += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[:distance]

    def case(self, rng: random.Random, cell: RecallCell, queries: int = 16, split: str = "valid") -> RecallCase:
        """One document of this cell with at most `queries` queries, all for different keys."""
        pairs = draw_pairs(rng, cell.pairs, split)
        before, after, ask, end = self.frame
        ids = [*self.first, *before]
        for key, value in pairs:
            ids += self.words[key] + self.words[value]
        ids += [*after, *self.filler(rng, cell.distance), *ask]
        answers = []
        for key, value in rng.sample(pairs, min(queries, len(pairs))):
            ids += self.words[key]
            answers.append((len(ids), len(ids) + len(self.words[value])))
            ids += self.words[value]
        return RecallCase(cell, ids + end, answers)


def make_cases(
    tokenizer: Any,
    cells: Iterable[RecallCell],
    n_per_cell: int = 128,
    seed: int = 0,
    queries: int = 16,
    split: str = "valid",
) -> list[RecallCase]:
    """Documents for every cell, enough to ask at least `n_per_cell` values in each.

    Args:
        tokenizer: any Hugging Face tokenizer; its BOS is put first where it has one.
        cells: the cells, pairs between 1 and `len(KEYS)`, distance at least 0 tokens.
        n_per_cell: answers (not documents) per cell; a document asks min(queries, pairs) values.
        seed: with the cell it determines the documents; other cells do not change them.
        queries: the most values asked in one document.
        split: "valid" (held-out pairs) or "train".

    Raises:
        ValueError: a count that is out of range, an unknown split, or words that encode to nothing.
    """
    if n_per_cell < 1 or queries < 1:
        raise ValueError(f"n_per_cell and queries must be at least 1, not {n_per_cell} and {queries}")
    maker = CaseMaker(tokenizer)
    cases = []
    for cell in cells:
        if cell.distance < 0:
            raise ValueError(f"distance must be at least 0 tokens, not {cell.distance}")
        documents = math.ceil(n_per_cell / max(1, min(queries, cell.pairs)))
        for index in range(documents):
            rng = random.Random(f"recall {split} {seed} {cell.pairs} {cell.distance} {index}")
            cases.append(maker.case(rng, cell, queries, split))
    return cases


def document(case: RecallCase) -> Document:
    """The case with what scoring by choice needs: the values of its other queries are the wrong answers."""
    said = [tuple(case.ids[start:end]) for start, end in case.answers]
    answers = (
        Answer(start, end, 1 / case.cell.pairs, tuple(dict.fromkeys(value for value in said if value != own)))
        for (start, end), own in zip(case.answers, said, strict=True)
    )
    return Document(case.ids, tuple(answers))
