"""Needles in a haystack: sentences `Remember: KEY VALUE.` somewhere in filler prose, asked for at the end. Torch-free.

    Tom went to the mill. Remember: bado dibi. The goose slept ...
    Recall: bado dibi

The variants are those of RULER (arXiv 2404.06654, section 3): a single needle, one of several (multi-key), all of
several (multi-query), and one key with several values (multi-value). Values are words or numbers; (key, word) pairs
are of the held-out split, so that a model trained on the embedded text never saw them.
"""

from __future__ import annotations

import random

from .document import Ask, Document, Ids, Writer
from .words import KEYS, VALUES, draw_pairs, is_held_out

DIGITS = 5
"""Of a number that must be remembered."""

RIVALS = 7
"""Wrong answers beside the right one: chance is one in eight."""


def draw_numbers(rng: random.Random, count: int) -> list[str]:
    """`count` different numbers of `DIGITS` digits, none with a leading zero."""
    return [str(n) for n in rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)]


def rivals(writer: Writer, rng: random.Random, said: list[str], right: str, number: bool) -> tuple[Ids, ...]:
    """`RIVALS` wrong answers' ids: the document's other values first, then made-up ones that it does not hold."""
    others = [value for value in dict.fromkeys(said) if value != right][:RIVALS]
    pool = draw_numbers(rng, 2 * RIVALS + len(said)) if number else rng.sample(VALUES, len(VALUES))
    others += [value for value in pool if value not in said and value != right][: RIVALS - len(others)]
    return tuple(tuple(writer.encode(" " + value)) for value in others)


def needle(
    writer: Writer, rng: random.Random, length: int, depth: float, number: bool = False, others: int = 0
) -> Document:
    """One needle is asked for.

    Args:
        writer: of the documents.
        rng: of everything drawn.
        length: tokens of the document, exactly.
        depth: 0 puts the needle at the beginning, 1 at the end of the filler.
        number: the value is a number of `DIGITS` digits, otherwise a word.
        others: further needles with other keys, at any depth (RULER's multi-key).

    Raises:
        TooShort: the length has no room for the needles.
        ValueError: the depth is outside 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, not {depth}")
    pairs = draw_pairs(rng, 1 + others)
    values = draw_numbers(rng, len(pairs)) if number else [value for _, value in pairs]
    depths = [depth, *(rng.random() for _ in range(others))]
    inserts = [(at, _sentence(writer, key, value)) for at, (key, _), value in zip(depths, pairs, values, strict=True)]
    chance = 1 / len(values) if others else 1 / (9 * 10 ** (DIGITS - 1) if number else len(VALUES))
    wrong = rivals(writer, rng, values, values[0], number)
    ask = Ask(_question(writer, pairs[0][0]), writer.encode(" " + values[0]), chance, wrong, number=number)
    return writer.haystack(rng, length, inserts, [ask])


def all_needles(writer: Writer, rng: random.Random, length: int, count: int) -> Document:
    """`count` needles at any depth, every one asked for in another order (RULER's multi-query)."""
    pairs = draw_pairs(rng, count)
    inserts = [(rng.random(), _sentence(writer, key, value)) for key, value in pairs]
    said = [value for _, value in pairs]
    asks = []
    for place, (key, value) in enumerate(rng.sample(pairs, count)):
        asking = writer.encode(f" {key}") if place else _question(writer, key)
        asks.append(Ask(asking, writer.encode(" " + value), 1 / count, rivals(writer, rng, said, value, False)))
    return writer.haystack(rng, length, inserts, asks)


def all_values(writer: Writer, rng: random.Random, length: int, count: int) -> Document:
    """One key with `count` values, told at different depths, all asked for (RULER's multi-value).

    Any value not yet said is right at any place; the document says them in the order told.
    """
    key = rng.choice(KEYS)
    said = rng.sample([value for value in VALUES if is_held_out(key, value)], count)
    depths = sorted(rng.random() for _ in said)
    inserts = [(depth, _sentence(writer, key, value)) for depth, value in zip(depths, said, strict=True)]
    ids = [tuple(writer.encode(" " + value)) for value in said]
    made_up = rng.sample([value for value in VALUES if value not in said], RIVALS)
    wrong = tuple(tuple(writer.encode(" " + value)) for value in made_up)
    asks = []
    for place, answer in enumerate(ids):
        asking = writer.encode(f" {key}") if place else _question(writer, key)
        asks.append(Ask(asking, list(answer), (count - place) / len(VALUES), wrong, tuple(ids[place + 1 :])))
    return writer.haystack(rng, length, inserts, asks)


def _sentence(writer: Writer, key: str, value: str) -> list[int]:
    return writer.encode(" Remember:") + writer.encode(f" {key}") + writer.encode(f" {value}") + writer.encode(".")


def _question(writer: Writer, key: str) -> list[int]:
    return writer.encode("\nRecall:") + writer.encode(f" {key}")
