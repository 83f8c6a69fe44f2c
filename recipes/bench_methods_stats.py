"""What the curves and seeds of `bench methods` say: tokens to a target, means with errors, who is first. Torch-free.

Errors here are over seeds: a procedure that is run again gives another student, and that is what two procedures are
compared by. Errors over documents, which every run has too, are the same documents for all and cancel.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Curve = Sequence[dict[str, Any]]
TARGET = 1.10
"""Ratio to the teacher's perplexity that curves are read at."""

ONE_ERROR = 2 * (1 - statistics.NormalDist().cdf(1.0))
"""Two-sided probability of a difference of more than one standard error where there is none: 0.317."""


def tokens_to(curve: Curve, target: float = TARGET, what: str = "ratio") -> float | None:
    """Training tokens at which a curve first comes down to `target`; None where it does not.

    Between two evaluations the value is taken as linear in the logarithm of the tokens; from the untrained student,
    which has no logarithm, as linear in the tokens.

    Args:
        curve: points {"tokens": …, what: …} in order of tokens.
        target: value to be reached.
        what: the value looked at.
    """
    last: tuple[float, float] | None = None
    for point in curve:
        tokens, value = float(point["tokens"]), point[what]
        if value is None:
            continue
        if value <= target:
            if last is None or last[0] == tokens:
                return tokens
            share = (last[1] - target) / (last[1] - value)
            if last[0] == 0:
                return share * tokens
            return math.exp(math.log(last[0]) + share * (math.log(tokens) - math.log(last[0])))
        last = tokens, value
    return None


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: mean.
        stderr: its standard error over seeds; with one seed `fallback` of `mean`, or None.
        n: seeds.
    """

    value: float
    stderr: float | None
    n: int


def mean(values: Sequence[float], fallback: float | None = None) -> Mean:
    """Mean and standard error over seeds.

    Args:
        values: one per seed, at least one.
        fallback: standard error to give where a single seed has none of its own (over documents, say).
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else fallback
    return Mean(statistics.fmean(values), error, len(values))


@dataclass(frozen=True)
class Standing:
    """Where one arm stands against the best of its group.

    Attributes:
        name: of the arm.
        difference: its mean's distance to the best one's, in the worse direction; 0 for the best.
        errors: that distance in standard errors of the difference; None where there is no error to go by.
        needed: standard errors above which it counts as a difference, corrected for the number of comparisons.
        tied: it does not count as a difference. Without an error to go by nothing is tied.
    """

    name: str
    difference: float
    errors: float | None
    needed: float
    tied: bool


def standings(arms: dict[str, Mean], lower: bool = True) -> list[Standing]:
    """Arms against the best one, best first; ties by Holm's step-down procedure.

    One comparison asks for one standard error. Of m comparisons, the largest difference has to pass the threshold of
    probability 0.317 / m, the next that of 0.317 / (m - 1), and so on; from the first that does not pass on, all are
    tied with the best.

    Args:
        arms: mean over seeds of each.
        lower: smaller values are better.
    """
    sign = 1.0 if lower else -1.0
    order = sorted(arms, key=lambda name: sign * arms[name].value)
    best, others = arms[order[0]], order[1:]
    found: dict[str, tuple[float, float | None]] = {}
    for name in others:
        arm = arms[name]
        difference = sign * (arm.value - best.value)
        known = [e for e in (arm.stderr, best.stderr) if e is not None]
        error = math.sqrt(sum(e * e for e in known)) if len(known) == 2 else None
        found[name] = difference, _errors(difference, error) if known else None
    made = {order[0]: Standing(order[0], 0.0, 0.0, 0.0, True)}
    stopped = False  # at the first difference that does not count
    ranked = sorted(others, key=lambda name: (found[name][1] is None, -(found[name][1] or 0.0)))
    for place, name in enumerate(ranked):
        difference, errors = found[name]
        needed = corrected(len(ranked) - place)
        stopped = stopped or (errors is not None and errors <= needed)
        made[name] = Standing(name, difference, errors, needed, stopped and errors is not None)
    return [made[name] for name in order]


def _errors(difference: float, error: float | None) -> float:
    """A difference in standard errors; without any spread every difference counts."""
    return difference / error if error else (math.inf if difference > 0 else 0.0)


def corrected(comparisons: int) -> float:
    """Standard errors that a difference must pass so that `comparisons` of them together ask for one."""
    return statistics.NormalDist().inv_cdf(1 - ONE_ERROR / comparisons / 2)


def said(found: list[Standing], name: str) -> str:
    """One sentence on where `name` stands; empty where it took no part."""
    if name not in {standing.name for standing in found}:
        return ""
    if len(found) == 1:
        return f"{name}: nothing to compare with"
    tied = [standing.name for standing in found if standing.tied]
    place = [standing.name for standing in found].index(name) + 1
    if name in tied:
        others = [other for other in tied if other != name]
        return f"{name}: tied for first with {', '.join(others)}" if others else f"{name}: first of {len(found)}"
    ahead = [standing.name for standing in found[: place - 1]]
    own = next(standing for standing in found if standing.name == name)
    by = "" if own.errors is None or math.isinf(own.errors) else f", {own.errors:.1f} standard errors behind the first"
    return f"{name}: place {place} of {len(found)}, behind {', '.join(ahead)}{by}"
