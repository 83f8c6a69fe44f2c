"""How much of the teacher's score a student keeps, with standard errors. Pure arithmetic.

With S and T the scores of student and teacher, c the score of guessing, all of the same documents:

    recovery               r = S / T                se² = (se(S)² - 2 r cov(S, T) + r² se(T)²) / T²      (delta method)
    recovery above chance  r = (S - c) / (T - c)    likewise, with T - c below the fraction; c has no error

cov is that of the documents' scores, divided by their number: both models answer the same questions, and a question
that is hard for both adds little to the ratio's error. Where a score is no mean over documents cov is taken as 0, which
overstates the error. Of figures where less is better (perplexity) the fraction is turned round: T / S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Estimate = dict[str, float | None]


def estimate(value: float, stderr: float | None) -> Estimate:
    """A value with its standard error, as result files spell it."""
    return {"value": value, "stderr": stderr}


def covariance(student: Sequence[float], teacher: Sequence[float]) -> float | None:
    """Covariance of two means over the same documents; None for fewer than two."""
    n = len(student)
    if n < 2:
        return None
    mean_s, mean_t = sum(student) / n, sum(teacher) / n
    return sum((s - mean_s) * (t - mean_t) for s, t in zip(student, teacher, strict=True)) / (n - 1) / n


def ratio(student: Estimate, teacher: Estimate, cov: float | None = None, chance: float = 0.0) -> Estimate | None:
    """(S - chance) / (T - chance) with its standard error; None where the teacher is at or below chance.

    A teacher no better than guessing has nothing that could be kept, and the fraction would be noise.
    """
    over, under = _value(student) - chance, _value(teacher) - chance
    if under <= 0:
        return None
    r = over / under
    se_s, se_t = student["stderr"], teacher["stderr"]
    if se_s is None or se_t is None:
        return estimate(r, None)
    variance = (se_s**2 - 2 * r * (cov or 0.0) + r**2 * se_t**2) / under**2
    return estimate(r, math.sqrt(max(variance, 0.0)))


def recoveries(
    student: Estimate, teacher: Estimate | None, cov: float | None, chance: float | None, higher_is_better: bool
) -> dict[str, Estimate | None]:
    """`recovery` and `recovery_above_chance` of one task; None where they mean nothing."""
    if teacher is None:
        return {"recovery": None, "recovery_above_chance": None}
    if not higher_is_better:
        return {"recovery": ratio(teacher, student, cov), "recovery_above_chance": None}
    above = None if chance is None else ratio(student, teacher, cov, chance)
    return {"recovery": ratio(student, teacher, cov), "recovery_above_chance": above}


def mean(tasks: Sequence[dict[str, Any]], covariances: Sequence[float | None]) -> dict[str, Any] | None:
    """The unweighted mean over tasks, in the shape of a task; the tasks are independent of each other.

    Args:
        tasks: entries of a result's `tasks` where more is better, at least one.
        covariances: of student and teacher, task by task.
    """
    if not tasks:
        return None
    k = len(tasks)
    chances = [task["chance"] for task in tasks]
    chance = None if None in chances else sum(chances) / k
    sides: dict[str, Estimate | None] = {"student": _mean([task["student"] for task in tasks]), "teacher": None}
    if all(task["teacher"] is not None for task in tasks):
        sides["teacher"] = _mean([task["teacher"] for task in tasks])
    cov = sum(value or 0.0 for value in covariances) / k**2
    student = sides["student"]
    if student is None:
        raise ValueError("a task without a student's score")
    return {
        "metric": "mean",
        "n": sum(task["n"] for task in tasks),
        "tasks": k,
        "higher_is_better": True,
        "chance": chance,
        **sides,
        **recoveries(student, sides["teacher"], cov, chance, True),
    }


def _mean(values: Sequence[Estimate]) -> Estimate:
    k = len(values)
    errors = [value["stderr"] for value in values]
    known = [error for error in errors if error is not None]
    spread = None if len(known) < k else math.sqrt(sum(error**2 for error in known)) / k
    return estimate(sum(_value(value) for value in values) / k, spread)


def _value(of: Estimate) -> float:
    value = of["value"]
    if value is None:
        raise ValueError("a score without a value")
    return value
