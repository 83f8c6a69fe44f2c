"""The embedded teacher's text: short documents that cannot be predicted without attention, generated from a seed.

Kinds: `story` (facts about people, asked for later), `recall` (key -> value pairs, filler prose, queries; see
eval/recall.py), `chat` (questions about facts given turns ago, and sums), `sums` (digits, counting, additions) and
`copy` (a list of words, said again). Every document fits 1,024 tokens of the embedded tokenizer. Torch-free.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence

from ...eval.recall import (
    ANIMALS,
    COLOURS,
    FOODS,
    KEYS,
    NAMES,
    PLACES,
    THINGS,
    VALUES,
    draw_pairs,
    filler_sentence,
    is_held_out,
    recall_text,
)

CONTEXT = 1024  # tokens that a document may have, BOS and EOS included
SENTENCE = 11  # tokens of the longest filler sentence, a safe bound for planning lengths
ANSWER = re.compile(
    r"How old was \w+\? \w+ was (\d+)|Who [\w ]+\? It was (\w+)|The \w+ of \w+ was (\w+)|went home to the (\w+)"
    r"|was given (\w+), which|called the \w+: (\w+),|Your (?:\w+ )+is (?:called )?(\w+)|You live near the (\w+)"
    r"|You like (\w+)|You are (\d+)|= (\d+)\.|Again: ([\w ]+)\."
)
KINDS = {"story": 0.4, "recall": 0.3, "chat": 0.15, "sums": 0.1, "copy": 0.05}


def documents(seed: int, n: int, split: str = "train", kinds: dict[str, float] | None = None) -> Iterator[str]:
    """`n` documents; the i-th is a pure function of seed, split, kinds and i.

    Args:
        seed: any integer; other seeds give other documents.
        n: how many.
        split: "train" or "valid": other documents, and (key, value) pairs that the other split never shows.
        kinds: weights of the kinds; `KINDS` by default. Naming one kind alone gives documents of that kind.

    Raises:
        ValueError: unknown split or kind, when the first document is asked for.
    """
    weights = KINDS if kinds is None else kinds
    if split not in ("train", "valid"):
        raise ValueError(f"split must be 'train' or 'valid', not {split!r}")
    unknown = sorted(set(weights) - set(WRITERS))
    if unknown or not weights:
        raise ValueError(f"unknown kinds {unknown}; there are {sorted(WRITERS)}")
    for index in range(n):
        rng = random.Random(f"text {split} {seed} {index}")
        kind = rng.choices(list(weights), list(weights.values()))[0]
        yield WRITERS[kind](rng, split)


def held_out_recall(seed: int, n: int, pairs: int = 16, sentences: int = 12) -> Iterator[str]:
    """`n` recall documents of `pairs` held-out pairs with `sentences` filler sentences before the queries."""
    for index in range(n):
        rng = random.Random(f"held out {seed} {pairs} {sentences} {index}")
        yield recall(rng, "valid", pairs=pairs, sentences=sentences)


def answers(text: str) -> list[tuple[int, int]]:
    """Half-open character ranges of what follows from earlier text: facts asked for, sums, and words said again."""
    return [match.span(match.lastindex or 0) for match in ANSWER.finditer(text)]


def story(rng: random.Random, split: str) -> str:
    """A short story: who has what, lives where and is how old; then things happen; then the facts are needed."""
    people = rng.sample(NAMES, rng.randint(2, 5))
    colours, things = rng.sample(COLOURS, len(people)), rng.sample(THINGS, len(people))
    homes, foods = rng.sample(PLACES, len(people)), rng.sample(FOODS, len(people))
    pets, words = rng.sample(ANIMALS, len(people)), rng.sample(VALUES, len(people))
    ages = [rng.randint(2, 99) for _ in people]
    facts: list[tuple[str, list[str]]] = []
    for i, who in enumerate(people):
        facts += [
            (
                f"{who} had a {colours[i]} {things[i]}.",
                [f"Who had the {things[i]}? It was {who}.", f"The {things[i]} of {who} was {colours[i]}."],
            ),
            (
                f"{who} lived near the {homes[i]}.",
                [f"At last {who} went home to the {homes[i]}.", f"Who lived near the {homes[i]}? It was {who}."],
            ),
            (f"{who} was {ages[i]} years old.", [f"How old was {who}? {who} was {ages[i]}."]),
            (f"{who} liked {foods[i]} best.", [f"So {who} was given {foods[i]}, which {who} liked best."]),
            (
                f"{who} had a {pets[i]} called {words[i]}.",
                [f"{who} called the {pets[i]}: {words[i]}, come here!", f"The {pets[i]} {words[i]} ran to {who}."],
            ),
        ]
    chosen = rng.sample(facts, rng.randint(2, min(10, len(facts))))
    between = rng.choice((0, 2, 4, 8, 16, 32))
    lines = [rng.choice(("Once upon a time", "Long ago", "One day")) + f" there were {_list(people)}."]
    lines += [fact for fact, _ in chosen]
    lines += [filler_sentence(rng) for _ in range(between)]
    asked = rng.sample(chosen, len(chosen))
    for _, later in asked:
        lines.append(rng.choice(later))
        if rng.random() < 0.3:
            lines.append(filler_sentence(rng))
    lines.append(rng.choice(("The end.", "And so the day ended.", "They were all happy.")))
    return _paragraphs(rng, lines)


def recall(rng: random.Random, split: str, pairs: int | None = None, sentences: int | None = None) -> str:
    """Key -> value pairs, filler prose, queries. Pairs (2 to 128) and filler are drawn independently unless given."""
    pairs = pairs or round(2 ** rng.uniform(1, 7))
    queries = min(pairs, rng.choice((4, 8, 16, 32)))
    room = (CONTEXT - 24 - 2 * pairs - 2 * queries) // SENTENCE
    if sentences is None:
        sentences = 0 if rng.random() < 0.25 else rng.randint(0, room)
    drawn = draw_pairs(rng, pairs, split)
    filler = " ".join(filler_sentence(rng) for _ in range(sentences))
    return recall_text(drawn, rng.sample(drawn, queries), filler)


def chat(rng: random.Random, split: str) -> str:
    """A conversation in the form of the tokenizer's chat template: facts are told, asked for later; sums between."""
    who, other = rng.sample(NAMES, 2)
    colour, thing, place, food = rng.choice(COLOURS), rng.choice(THINGS), rng.choice(PLACES), rng.choice(FOODS)
    animal, word, age = rng.choice(ANIMALS), rng.choice(VALUES), rng.randint(2, 99)
    told = [
        (f"My name is {who}.", "What is my name?", f"Your name is {who}."),
        (f"I have a {colour} {thing}.", f"What colour is my {thing}?", f"Your {thing} is {colour}."),
        (f"I live near the {place}.", "Where do I live?", f"You live near the {place}."),
        (f"I like {food}.", "What do I like?", f"You like {food}."),
        (f"My {animal} is called {word}.", f"What is my {animal} called?", f"Your {animal} is called {word}."),
        (f"I am {age} years old.", "How old am I?", f"You are {age} years old."),
        (f"My friend is {other}.", "Who is my friend?", f"Your friend is {other}."),
    ]
    told = rng.sample(told, rng.randint(1, 5))
    turns = [(" ".join(fact for fact, _, _ in told), rng.choice(("Thank you.", "I will remember that.", "Good.")))]
    for _, question, answer in rng.sample(told, len(told)):
        if rng.random() < 0.4:
            a, b = rng.randint(0, 20), rng.randint(0, 20)
            turns.append((f"What is {a} + {b}?", f"{a} + {b} = {a + b}."))
        if rng.random() < 0.3:
            story_line = " ".join(filler_sentence(rng) for _ in range(rng.randint(1, 6)))
            turns.append(("Tell me a story.", story_line))
        turns.append((question, answer))
    return "".join(f"User: {user}\nAssistant: {assistant}\n" for user, assistant in turns)


def sums(rng: random.Random, split: str) -> str:
    """Lines of digits said again, counting, and additions up to 20 + 20."""
    lines = []
    for _ in range(rng.randint(4, 20)):
        kind = rng.randrange(3)
        if kind == 0:
            digits = " ".join(str(rng.randrange(10)) for _ in range(rng.randint(3, 8)))
            lines.append(f"Digits: {digits}. Again: {digits}.")
        elif kind == 1:
            start, step = rng.randint(0, 80), rng.randint(1, 3)
            lines.append("Count: " + ", ".join(str(start + step * i) for i in range(5)) + ".")
        else:
            a, b = rng.randint(0, 20), rng.randint(0, 20)
            lines.append(f"{a} + {b} = {a + b}.")
    return "\n".join(lines) + "\n"


def copy(rng: random.Random, split: str) -> str:
    """A list of random words, said again in the same order."""
    pool = KEYS + VALUES
    words = [rng.choice(pool)]
    for _ in range(rng.randint(3, 47)):
        word = rng.choice(pool)
        while word in VALUE_SET and words[-1] in KEY_SET and is_held_out(words[-1], word) != (split == "valid"):
            word = rng.choice(pool)
        words.append(word)
    said = " ".join(words)
    return f"Say: {said}.\nAgain: {said}.\n"


KEY_SET, VALUE_SET = frozenset(KEYS), frozenset(VALUES)
WRITERS: dict[str, Callable[[random.Random, str], str]] = {
    "story": story,
    "recall": recall,
    "chat": chat,
    "sums": sums,
    "copy": copy,
}


def _list(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]


def _paragraphs(rng: random.Random, lines: list[str]) -> str:
    text, left = lines[0], rng.randint(2, 6)
    for line in lines[1:]:
        text += ("\n" if left == 0 else " ") + line
        left = rng.randint(2, 6) if left == 0 else left - 1
    return text + "\n"
