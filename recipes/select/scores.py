"""Scores of all layers by one method: the ranking, how sure it is, the file that `layers.keep` reads. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .methods import METHODS


@dataclass
class Scores:
    """What one method says of every layer.

    Attributes:
        method: a name in `METHODS`.
        values: by layer.
        errors: standard errors of the values, None where there are none.
        gaps: for each place r of the ranking but the last, by how much the layer there beats the next one, and the
            standard error of that difference (paired, where both were measured on the same documents), or None.
        keep: how many layers the method was told to choose, where that changes its scores (uniform, greedy-kl).
        notes: what a reader must know of these scores.
        signal: False where the scores are most likely noise.
        details: what else the method found, plain values.
        seconds: spent, what other methods measured before left out.
        cpu_seconds: of the process in that time, over all its threads.
        passes: forward passes over the text or the recall documents, likewise.
    """

    method: str
    values: list[float]
    errors: list[float] | None = None
    gaps: list[tuple[float, float | None]] = field(default_factory=list)
    keep: int | None = None
    notes: list[str] = field(default_factory=list)
    signal: bool = True
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    passes: int = 0

    @property
    def higher_is(self) -> str:
        """What a high score speaks for, `keep` or `convert`."""
        return METHODS[self.method].higher_is

    @property
    def order(self) -> list[int]:
        """Layers from the first to keep to the last; equal scores go to the lower layer."""
        return ranked(self.values, self.higher_is)

    def chosen(self, keep: int) -> list[int]:
        """The layers to keep, ascending."""
        return sorted(self.order[:keep])

    def close_call(self, keep: int) -> str | None:
        """A sentence where the last layer chosen is not told apart from the first one left out, None otherwise."""
        if not 0 < keep <= len(self.gaps):
            return None
        difference, error = self.gaps[keep - 1]
        inside, outside = self.order[keep - 1], self.order[keep]
        if difference == 0:
            return f"layers {inside} and {outside} have the same score; the lower one was taken"
        if error is not None and difference < error:
            return f"layers {inside} and {outside} differ by {difference:.2g}, less than a standard error ({error:.2g})"
        return None

    def to_dict(self, keep: int) -> dict[str, Any]:
        """The scores file: `scores` and `higher_is` for `layers.keep`, the rest for readers."""
        return {
            "scores": {str(layer): value for layer, value in enumerate(self.values)},
            "higher_is": self.higher_is,
            "method": self.method,
            "what": METHODS[self.method].what,
            "stderr": None if self.errors is None else {str(i): value for i, value in enumerate(self.errors)},
            "order": self.order,
            "gaps": [list(gap) for gap in self.gaps],
            "keep": keep,
            "chosen": self.chosen(keep),
            "close_call": self.close_call(keep),
            "told_keep": self.keep,
            "signal": self.signal,
            "notes": self.notes,
            "details": self.details,
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "passes": self.passes,
        }

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Scores:
        """What `to_dict` wrote."""
        layers = [str(layer) for layer in range(len(value["scores"]))]
        errors = value["stderr"]
        return Scores(
            value["method"],
            [value["scores"][layer] for layer in layers],
            None if errors is None else [errors[layer] for layer in layers],
            [(gap[0], gap[1]) for gap in value["gaps"]],
            value["told_keep"],
            value["notes"],
            value["signal"],
            value["details"],
            value["seconds"],
            value["cpu_seconds"],
            value["passes"],
        )


def ranked(values: Sequence[float], higher_is: str) -> list[int]:
    """Layers from the first to keep to the last, as `layers.keep: {scores, top}` takes them."""
    sign = -1.0 if higher_is == "keep" else 1.0
    return sorted(range(len(values)), key=lambda layer: (sign * values[layer], layer))


def mean_ranks(values: Sequence[float], higher_is: str) -> list[float]:
    """Each layer's place in the ranking, 0 for the first to keep; equal scores share the mean of their places."""
    order = ranked(values, higher_is)
    places = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for layer in order[start:stop]:
            places[layer] = (start + stop - 1) / 2
        start = stop
    return places


def kendall(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings given as places: 1 the same order, -1 reversed; None where one is all ties."""
    concordant = ties_first = ties_second = pairs = 0
    for i in range(len(first)):
        for j in range(i):
            a, b = _sign(first[i] - first[j]), _sign(second[i] - second[j])
            pairs += 1
            concordant += a * b
            ties_first += a == 0
            ties_second += b == 0
    scale = math.sqrt((pairs - ties_first) * (pairs - ties_second))
    return concordant / scale if scale else None


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two rankings given as places; None where one is all ties."""
    n = len(first)
    mean = (n - 1) / 2
    left, right = [a - mean for a in first], [b - mean for b in second]
    scale = math.sqrt(sum(a * a for a in left) * sum(b * b for b in right))
    return sum(a * b for a, b in zip(left, right, strict=True)) / scale if scale else None


def agreement(all_scores: Sequence[Scores], keep: int) -> list[dict[str, Any]]:
    """Every pair of methods: rank correlations of all layers, and how many of the chosen ones they share."""
    rows = []
    places = [mean_ranks(scores.values, scores.higher_is) for scores in all_scores]
    for j, second in enumerate(all_scores):
        for i, first in enumerate(all_scores[:j]):
            shared = sorted(set(first.chosen(keep)) & set(second.chosen(keep)))
            rows.append(
                {
                    "methods": [first.method, second.method],
                    "kendall": kendall(places[i], places[j]),
                    "spearman": spearman(places[i], places[j]),
                    "shared": shared,
                    "overlap": len(shared) / keep,
                }
            )
    return rows


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
