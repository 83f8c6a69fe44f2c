"""Recall: does a language model still find a fact that it read long ago?

A case is one document: some key -> value pairs of made-up words, filler prose, then queries that name a key and must be
answered with its value. The number of pairs and the distance (tokens of filler between the last pair and the query
block) vary independently, because linear mixers lose them independently. Every queried value is scored by arg-max in
one teacher-forced forward pass, so the measurement works for any Hugging Face causal language model.

    Remember: tabo kefi rula domi.
    Tom went to the mill. The goose slept all day ...
    Recall: rula domi tabo kefi.

(key, value) pairs are split by a hash: a document of the training split never shows a pair of the validation split.
This module holds the words and the format, so that texts for training (recipes) and cases for measuring agree.
"""

from __future__ import annotations

import inspect
import math
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

REMEMBER, END_OF_PAIRS, RECALL, END_OF_QUERIES = "Remember:", ".\n", "\nRecall:", ".\n"
HELD_OUT = 8  # one pair in so many belongs to the validation split

NAMES = ("Tom", "Mia", "Ben", "Lily", "Sam", "Anna", "Max", "Ruth", "Leo", "Nora", "Jack", "Ella", "Finn", "Rosa")
ANIMALS = ("cat", "dog", "goose", "fox", "horse", "mouse", "owl", "frog", "duck", "hen")
PLACES = ("mill", "barn", "river", "garden", "school", "market", "forest", "bridge", "tower", "kitchen", "hill", "lake")
THINGS = ("ball", "kite", "lamp", "book", "drum", "coat", "cup", "boat", "hat", "bell", "rope", "ring")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
WEATHER = ("sunny", "cold", "windy", "rainy", "quiet", "warm")
FOODS = ("bread", "soup", "apples", "cheese", "cake", "eggs", "honey", "rice")


KEYS = tuple(
    a + b
    for a in ["ba", "da", "ka", "la", "ma", "ra", "sa", "ta", "bi", "di", "ki", "li", "mi", "ri", "si", "ti"]
    for b in ["do", "ko", "lo", "mo", "no", "ro", "so", "to", "vo", "fo"]
)
VALUES = tuple(
    a + b
    for a in ["bu", "du", "ku", "lu", "mu", "ru", "su", "tu", "be", "de", "ke", "le", "me", "re", "se", "te"]
    for b in ["di", "ki", "li", "mi", "ni", "ri", "si", "ti", "vi", "fi"]
)


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


def is_held_out(key: str, value: str) -> bool:
    """Whether the pair belongs to the validation split (one in `HELD_OUT`, by a hash of the two words)."""
    return zlib.crc32(f"{key} {value}".encode()) % HELD_OUT == 0


def draw_pairs(rng: random.Random, count: int, split: str = "valid") -> list[tuple[str, str]]:
    """`count` pairs with different keys, every pair of the given split ("train" or "valid").

    Raises ValueError for an unknown split or a count outside 1..len(KEYS).
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split must be 'train' or 'valid', not {split!r}")
    if not 1 <= count <= len(KEYS):
        raise ValueError(f"pairs must be between 1 and {len(KEYS)}, not {count}")
    pairs = []
    for key in rng.sample(KEYS, count):
        value = rng.choice(VALUES)
        while is_held_out(key, value) != (split == "valid"):
            value = rng.choice(VALUES)
        pairs.append((key, value))
    return pairs


def filler_sentence(rng: random.Random) -> str:
    """One sentence of plain story prose, without a line break, that answers no query."""
    pick = rng.choice
    kind = rng.randrange(12)
    if kind == 0:
        return f"{pick(NAMES)} went to the {pick(PLACES)}."
    if kind == 1:
        return f"It was a {pick(WEATHER)} day."
    if kind == 2:
        return f"The {pick(ANIMALS)} slept near the {pick(PLACES)}."
    if kind == 3:
        first, second = rng.sample(NAMES, 2)
        return f"{first} and {second} played with a {pick(COLOURS)} {pick(THINGS)}."
    if kind == 4:
        return f"{pick(NAMES)} ate some {pick(FOODS)}."
    if kind == 5:
        return f"A {pick(COLOURS)} {pick(ANIMALS)} ran over the {pick(PLACES)}."
    if kind == 6:
        return f"Then {pick(NAMES)} gave {pick(FOODS)} to the {pick(ANIMALS)}."
    if kind == 7:
        return f"They found {pick(('two', 'three', 'four', 'five'))} {pick(COLOURS)} stones by the {pick(PLACES)}."
    if kind == 8:
        return f"{pick(NAMES)} was {pick(('happy', 'sad', 'tired', 'hungry', 'proud'))} and walked home."
    if kind == 9:
        return f"The {pick(ANIMALS)} and the {pick(ANIMALS)} were good friends."
    if kind == 10:
        return f"In the {pick(('morning', 'evening', 'night'))} the {pick(PLACES)} was {pick(WEATHER)}."
    return f"{pick(NAMES)} sang a song about a {pick(ANIMALS)}."


def recall_text(pairs: Sequence[tuple[str, str]], queries: Sequence[tuple[str, str]], filler: str) -> str:
    """The document as text, in the format that the cases have: pairs, filler prose, queries with their answers."""
    listed = "".join(f" {key} {value}" for key, value in pairs)
    asked = "".join(f" {key} {value}" for key, value in queries)
    return f"{REMEMBER}{listed}{END_OF_PAIRS}{filler}{RECALL}{asked}{END_OF_QUERIES}"


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
            ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
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


def recall(
    model: Any,
    tokenizer: Any,
    cells: Iterable[RecallCell] | None = None,
    n_per_cell: int = 128,
    seed: int = 0,
    batch_size: int = 8,
    window: int | None = None,
) -> dict[str, Any]:
    """Accuracy of recall per cell: the share of queried values whose every token is the model's arg-max.

    Args:
        model: any causal language model whose call takes input_ids, attention_mask, use_cache and returns `.logits`.
        tokenizer: its tokenizer.
        cells: what to measure; by default those of `DEFAULT_CELLS` that fit the model's max_position_embeddings.
        n_per_cell: at least so many answers per cell.
        seed: of the documents.
        batch_size: documents per forward pass, all of one cell.
        window: cut every attention layer to so many tokens, the current one included (for softmax-attention models
            that accept a 4-dimensional mask): shows what the same weights recall without their long reach.

    Returns:
        {"cells": [{"pairs", "distance", "accuracy", "stderr", "n"}], "by_distance": {str(distance): {"accuracy",
        "stderr", "n"}}, "accuracy", "stderr", "n"}; accuracies from 0 to 1, n counts answers, standard errors are
        clustered by document.

    Raises:
        ValueError: no cell fits the model, or an argument of `make_cases` is out of range.
    """
    import torch

    limit = getattr(model.config, "max_position_embeddings", None)
    chosen = list(DEFAULT_CELLS if cells is None else cells)
    by_cell: dict[RecallCell, list[RecallCase]] = {cell: [] for cell in chosen}
    for case in make_cases(tokenizer, by_cell, n_per_cell, seed):
        by_cell[case.cell].append(case)
    if cells is None and limit is not None:
        by_cell = {c: cases for c, cases in by_cell.items() if max(len(x.ids) for x in cases) <= limit}
    if not by_cell:
        raise ValueError(f"no recall cell fits this model's context of {limit} tokens; name shorter cells")
    rows, clusters = [], {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for cell, cases in by_cell.items():
                clusters[cell] = []
                for start in range(0, len(cases), batch_size):
                    clusters[cell] += score(model, cases[start : start + batch_size], window)
                rows.append({"pairs": cell.pairs, "distance": cell.distance, **clustered(clusters[cell])})
    finally:
        model.train(was_training)
    distances = sorted({cell.distance for cell in by_cell})
    by_distance = {
        str(d): clustered([x for cell in by_cell if cell.distance == d for x in clusters[cell]]) for d in distances
    }
    return {"cells": rows, "by_distance": by_distance, **clustered([x for c in clusters.values() for x in c])}


def score(model: Any, cases: Sequence[RecallCase], window: int | None = None) -> list[tuple[int, int]]:
    """(right, asked) for each case, from one forward pass over all of them, padded on the right. Needs no_grad."""
    import torch

    device = next(model.parameters()).device
    longest = max(len(case.ids) for case in cases)
    ids = torch.zeros(len(cases), longest, dtype=torch.long)
    padding = torch.zeros(len(cases), longest, dtype=torch.long)
    for row, case in enumerate(cases):
        ids[row, : len(case.ids)] = torch.tensor(case.ids)
        padding[row, : len(case.ids)] = 1
    mask = None if bool(padding.all()) else padding.to(device)
    if window is not None:
        mask = window_mask(longest, window, next(model.parameters()).dtype).to(
            device
        )  # causal: right padding is unseen
    first = min(case.answers[0][0] for case in cases) - 1
    keep = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep["logits_to_keep"] = longest - first
    out = model(input_ids=ids.to(device), attention_mask=mask, use_cache=False, **keep).logits
    best = out.argmax(-1).cpu()
    shift = longest - best.shape[1]
    results = []
    for row, case in enumerate(cases):
        right = sum(
            all(int(best[row, at - 1 - shift]) == case.ids[at] for at in range(start, end))
            for start, end in case.answers
        )
        results.append((right, len(case.answers)))
    return results


def window_mask(length: int, window: int, dtype: Any = None) -> Tensor:
    """Additive attention mask [1, 1, length, length]: each token sees itself and the window - 1 tokens before it."""
    import torch

    position = torch.arange(length)
    behind = position[:, None] - position[None, :]
    hidden = (behind < 0) | (behind >= window)
    dtype = dtype or torch.float32
    return torch.zeros(length, length, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def clustered(results: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """{"accuracy", "stderr", "n"} from (right, asked) per document; the error treats documents as clusters."""
    asked = sum(n for _, n in results)
    accuracy = sum(right for right, _ in results) / asked
    stderr = 0.0
    if len(results) > 1:
        spread = sum((right - accuracy * n) ** 2 for right, n in results)
        stderr = math.sqrt(spread * len(results) / (len(results) - 1)) / asked
    return {"accuracy": accuracy, "stderr": stderr, "n": asked}
