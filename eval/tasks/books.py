"""Recall beyond needles: a phone book, chains of variables, and which of many words comes most often. Torch-free.

Tom bado: 48213                          Phone book (arXiv 2402.01032, section 4): the whole document is the book.
VAR bado = 48213. ... VAR kafo = bado.   Variable tracking (RULER, arXiv 2404.06654): follow the assignments.
Words: dibi suti dibi ...                Frequent words (RULER): count, roughly.
"""

from __future__ import annotations

import random

from .document import Ask, Document, TooShort, Writer
from .needles import RIVALS, draw_numbers, rivals
from .words import KEYS, NAMES, VALUES

CHAINS = 4
"""Chains of variables in a document; one is asked for."""


def phone_book(writer: Writer, rng: random.Random, length: int, depth: float) -> Document:
    """A list of names with numbers, 2,240 at most; one is asked for.

    Args:
        writer: of the documents.
        rng: of everything drawn.
        length: tokens of the document, exactly; what the last whole line leaves is filler after the book.
        depth: 0 asks for the first line, 1 for the last.

    Raises:
        TooShort: the length has no room for two lines.
        ValueError: the depth is outside 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, not {depth}")
    names = [f"{name} {key}" for name in NAMES for key in KEYS]
    rng.shuffle(names)
    numbers = draw_numbers(rng, len(names))
    # Every line may be the one asked for, which takes its tokens again, and any of them may be the longest.
    room = length - len(writer.first) - len(writer.encode("Phone book"))
    book: list[int] = []
    count = longest = 0
    for name, number in zip(names, numbers, strict=True):
        line = writer.encode(f"\n{name}:") + writer.encode(f" {number}")
        longest = max(longest, len(line))
        if len(book) + len(line) + longest > room:
            break
        count += 1
        book += line
    if count < 2:
        raise TooShort(f"length must have room for two lines of a phone book, not {length}")
    chosen = round(depth * (count - 1))
    number = numbers[chosen]
    wrong = rivals(writer, rng, rng.sample(numbers[:count], count), number, True)
    asking = writer.encode(f"\n{names[chosen]}:")
    ask = Ask(asking, writer.encode(f" {number}"), 1 / count, wrong, number=True)
    ids = [*writer.first, *writer.encode("Phone book"), *book]
    ids += writer.filler(rng, length - len(ids) - len(asking) - len(ask.answer))
    return writer.asked(ids, [ask])


def variables(writer: Writer, rng: random.Random, length: int, hops: int) -> Document:
    """The value of the last variable of a chain: a number, `hops` assignments before.

    Other chains of the same kind stand between; statements of a chain keep their order.

    Raises:
        TooShort: the length has no room for the statements.
    """
    names = rng.sample(KEYS, CHAINS * (hops + 1))
    numbers = draw_numbers(rng, CHAINS)
    inserts = []
    for chain, number in enumerate(numbers):
        own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        depths = sorted(rng.random() for _ in own)
        for place, (depth, name) in enumerate(zip(depths, own, strict=True)):
            value = f" {own[place - 1]}" if place else f" {number}"
            parts = (" VAR", f" {name}", " =", value, ".")
            inserts.append((depth, [i for part in parts for i in writer.encode(part)]))
    asking = [i for part in ("\nThe value of", f" {names[hops]}", " is") for i in writer.encode(part)]
    wrong = rivals(writer, rng, numbers, numbers[0], True)
    ask = Ask(asking, writer.encode(f" {numbers[0]}"), 1 / CHAINS, wrong, number=True)
    return writer.haystack(rng, length, inserts, [ask])


def common_word(writer: Writer, rng: random.Random, length: int, share: float) -> Document:
    """Which word of a list comes most often? The common one takes a share of the places, the others an even part.

    Args:
        writer: of the documents.
        rng: of everything drawn.
        length: tokens of the document, exactly; what the last whole word leaves is filler after the list.
        share: of the list's places, above 0 and below 1; the `4 * RIVALS` other words divide the rest.

    Raises:
        TooShort: the length has no room for every word.
    """
    common, *others = rng.sample(VALUES, 1 + 4 * RIVALS)
    ids = [*writer.first, *writer.encode("Words:")]
    asking = [i for part in (".\n", "The most common word is") for i in writer.encode(part)]
    answer = writer.encode(f" {common}")
    room = length - len(ids) - len(asking) - len(answer)
    words = {word: writer.encode(f" {word}") for word in (common, *others)}
    places = room // max(len(own) for own in words.values())
    rest = round(places * (1 - share))
    if rest < len(others) or places - rest < 2 or places - rest <= rest / len(others):
        raise TooShort(f"length must have room for every word of the list, not {length}")
    listed = [common] * (places - rest) + [others[i % len(others)] for i in range(rest)]
    rng.shuffle(listed)
    ids += [i for word in listed for i in words[word]]
    ids += writer.filler(rng, length - len(ids) - len(asking) - len(answer))
    wrong = tuple(tuple(words[word]) for word in rng.sample(others, RIVALS))
    return writer.asked(ids, [Ask(asking, answer, 1 / len(words), wrong)])
