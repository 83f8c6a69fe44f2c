"""Scores that need no model: by place, and the mean rank of other methods' scores. Torch-free."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

from .scores import Scores, mean_ranks, ranked

DRAWS = 400
"""Redrawings of scores from which the error of a mean rank comes."""


def by_place(method: str, num_layers: int, keep: int) -> Scores:
    """`uniform`, `lower` or `upper`, choosing what `layers.keep: {ratio, place}` chooses for `keep` layers."""
    if method == "uniform":
        chosen = [(2 * i + 1) * num_layers // (2 * keep) for i in range(keep)]
        values = [float(layer in chosen) for layer in range(num_layers)]
        note = f"its scores hold for top: {keep} only"
        return Scores(method, values, keep=keep, notes=[note])
    sign = -1.0 if method == "lower" else 1.0
    return Scores(method, [sign * layer for layer in range(num_layers)])


def combined(parts: Sequence[Scores], left_out: Sequence[str] = ()) -> Scores:
    """The mean of each layer's places in several rankings; lower is better.

    Errors come from drawing every method's scores anew, each layer's from a normal distribution with its standard
    error, and ranking again (`DRAWS` times, seeded). Methods measured on the same documents err together, which this
    leaves out: errors are rather too large.

    Args:
        parts: of at least one method.
        left_out: sentences on the methods that were left out.
    """
    places = [mean_ranks(part.values, part.higher_is) for part in parts]
    values = _mean(places)
    rng = random.Random(0)
    draws = [
        _mean([mean_ranks(_redrawn(part, rng), part.higher_is) for part in parts])
        for _ in range(DRAWS if any(part.errors for part in parts) else 0)
    ]
    order = ranked(values, "convert")
    errors = [_spread([draw[layer] for draw in draws]) for layer in range(len(values))] if draws else None
    gaps: list[tuple[float, float | None]] = []
    for one, other in pairwise(order):
        error = _spread([draw[other] - draw[one] for draw in draws]) if draws else None
        gaps.append((values[other] - values[one], error))
    names = [part.method for part in parts]
    notes = [f"mean rank over {', '.join(names)}", *left_out]
    return Scores("combined", values, errors, gaps, notes=notes, details={"methods": names})


def _mean(places: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(places) for column in zip(*places, strict=True)]


def _redrawn(part: Scores, rng: random.Random) -> list[float]:
    if part.errors is None:
        return part.values
    return [rng.gauss(value, error) for value, error in zip(part.values, part.errors, strict=True)]


def _spread(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
