"""Recovery and its errors, against many drawn evaluations."""

from __future__ import annotations

import numpy as np
import pytest

from relinear.eval import recovery


def drawn(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong of student and teacher on n questions: the student misses a fifth of what the teacher knows."""
    teacher = rng.random(n) < 0.7
    student = np.where(teacher, rng.random(n) < 0.8, rng.random(n) < 0.3)
    return student.astype(float), teacher.astype(float)


def entry(student: np.ndarray, teacher: np.ndarray, chance: float | None) -> dict:
    sides = [recovery.estimate(float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)) for x in (student, teacher)]
    cov = recovery.covariance(student.tolist(), teacher.tolist())
    return {
        "n": len(student),
        "chance": chance,
        "student": sides[0],
        "teacher": sides[1],
        **recovery.recoveries(sides[0], sides[1], cov, chance, True),
        "cov": cov,
    }


@pytest.mark.parametrize("name", ["recovery", "recovery_above_chance"])
def test_the_error_is_the_spread_over_many_evaluations(name):
    rng = np.random.default_rng(5)
    made = [entry(*drawn(rng, 400), chance=0.25) for _ in range(1500)]
    spread = np.std([one[name]["value"] for one in made], ddof=1)
    told = np.mean([one[name]["stderr"] for one in made])
    assert told == pytest.approx(spread, rel=0.06)
    unpaired = recovery.ratio(made[0]["student"], made[0]["teacher"], None, 0.25 if "chance" in name else 0.0)
    assert unpaired is not None and unpaired["stderr"] > made[0][name]["stderr"]


def test_the_error_of_the_mean_over_tasks():
    rng = np.random.default_rng(6)
    means = []
    for _ in range(1000):
        tasks = [entry(*drawn(rng, 300), chance=0.25) for _ in range(3)]
        means.append(recovery.mean(tasks, [task["cov"] for task in tasks]))
    for name in ("student", "recovery", "recovery_above_chance"):
        spread = np.std([one[name]["value"] for one in means], ddof=1)
        assert np.mean([one[name]["stderr"] for one in means]) == pytest.approx(spread, rel=0.08)
    assert means[0]["tasks"] == 3 and means[0]["n"] == 900 and means[0]["chance"] == 0.25


def test_where_a_figure_means_nothing_it_is_none():
    same = recovery.estimate(0.5, 0.1)
    assert recovery.recoveries(same, same, 0.01, 0.5, True)["recovery_above_chance"] is None
    assert recovery.recoveries(same, None, None, 0.2, True) == {"recovery": None, "recovery_above_chance": None}
    assert recovery.recoveries(same, recovery.estimate(0.0, 0.0), None, None, True)["recovery"] is None
    # The same answers have no error at all; of a perplexity the teacher's stands above.
    alike = recovery.recoveries(same, same, 0.01, None, True)["recovery"]
    assert alike == {"value": 1.0, "stderr": pytest.approx(0.0, abs=1e-7)}
    lower = recovery.recoveries(recovery.estimate(20.0, None), recovery.estimate(10.0, None), None, None, False)
    assert lower == {"recovery": {"value": 0.5, "stderr": None}, "recovery_above_chance": None}
    assert recovery.mean([], []) is None and recovery.covariance([1.0], [1.0]) is None
