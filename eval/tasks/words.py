"""Words, filler prose and the split of held-out pairs that every recall task and the embedded text share. Torch-free.

(key, value) pairs are split by a hash: a document of the training split never shows a pair of the validation split.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

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
