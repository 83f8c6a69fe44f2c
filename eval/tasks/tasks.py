"""The tasks of the recall suite: what each asks, over which two axes, and its documents. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product

from .books import common_word, phone_book, variables
from .document import Document, TooShort, Writer
from .needles import all_needles, all_values, needle
from .pairs import DEFAULT_CELLS, RecallCell, document, make_cases

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWERS_PER_SAMPLE = 16
"""Of key -> value pairs: a cell asks so many values for each document that a cell of the other tasks has."""

Cell = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as the command line takes it.
        about: what is asked, in one line.
        axes: names of a cell's two coordinates.
        seconds: default values of the second coordinate (the first is the length, or the distance).
        make: one document of a cell from (writer, rng, first coordinate, second); None for pairs, which are made whole.
    """

    name: str
    about: str
    axes: tuple[str, str]
    seconds: tuple[float, ...]
    make: Callable[[Writer, random.Random, int, float], Document] | None = None


def _whole(make: Callable[[Writer, random.Random, int, int], Document]) -> Callable[..., Document]:
    return lambda writer, rng, length, count: make(writer, rng, length, int(count))


TASKS = {
    task.name: task
    for task in (
        Task("needle", "a word told once, at a depth of the text", ("length", "depth"), DEPTHS, needle),
        Task(
            "needle-number",
            "a number told once, at a depth of the text",
            ("length", "depth"),
            DEPTHS,
            lambda writer, rng, length, depth: needle(writer, rng, length, depth, number=True),
        ),
        Task(
            "multi-key",
            "one of four needles",
            ("length", "depth"),
            DEPTHS[::2],
            lambda writer, rng, length, depth: needle(writer, rng, length, depth, others=3),
        ),
        Task("multi-query", "every one of several needles", ("length", "needles"), (2, 8), _whole(all_needles)),
        Task("multi-value", "all values of one key", ("length", "values"), (2, 4), _whole(all_values)),
        Task("pairs", "values of keys in a list of pairs, then filler", ("distance", "pairs"), (4, 16, 64, 128)),
        Task("phone-book", "a number from a phone book", ("length", "depth"), DEPTHS[::2], phone_book),
        Task("variables", "a variable's value through a chain", ("length", "hops"), (1, 3), _whole(variables)),
        Task("common-word", "the most frequent word of a list", ("length", "share"), (0.2, 0.5), common_word),
    )
}


def task_documents(
    task: Task, writer: Writer, lengths: Sequence[int], samples: int, seed: int = 0, limit: int | None = None
) -> dict[Cell, list[Document]]:
    """The documents of every cell of a task, cells in order; each is a pure function of seed, cell and its number.

    Args:
        task: one of `TASKS`.
        writer: with tokenizer and filler. Pairs always have the made-up filler.
        lengths: tokens of whole documents. Pairs take the cells of `DEFAULT_CELLS` that fit the longest, and for
            lengths beyond 1,024 the distances that leave 384 tokens for pairs and queries.
        samples: documents in each cell; of pairs, a sixteenth of the answers in each cell.
        seed: of the documents.
        limit: leave out cells with a longer document (tokens).

    Returns:
        (first, second coordinate) -> documents; cells whose length has no room for the task are left out.
    """
    if task.make is None:
        distances = sorted({cell.distance for cell in DEFAULT_CELLS} | {n - 384 for n in lengths if n > 1024})
        cells = [RecallCell(int(pairs), distance) for pairs in task.seconds for distance in distances]
        made: dict[Cell, list[Document]] = {(cell.distance, cell.pairs): [] for cell in cells}
        for case in make_cases(writer.tokenizer, cells, ANSWERS_PER_SAMPLE * samples, seed):
            made[case.cell.distance, case.cell.pairs].append(document(case))
        longest = min(max(lengths), limit or max(lengths))
        return {cell: own for cell, own in made.items() if max(len(one.ids) for one in own) <= longest}
    made = {}
    for length, second in product(lengths, task.seconds):
        name = f"{task.name} {seed} {length} {second}"
        with suppress(TooShort):
            if limit is None or length <= limit:
                made[length, second] = [
                    task.make(writer, random.Random(f"{name} {i}"), length, second) for i in range(samples)
                ]
    return made
