"""Learning rates at known places."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from relinear.distill.schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_climbs_in_a_straight_line_from_one_percent(schedule: str) -> None:
    rates = [
        learning_rate(step, 1000, lr=1e-3, lr_final=1e-5, schedule=schedule, warmup=50) for step in (0, 10, 25, 50)
    ]
    assert rates == pytest.approx([1e-5, 1e-5 + 0.2 * 0.99e-3, 1e-5 + 0.5 * 0.99e-3, 1e-3])


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [
        ("cosine", 5.05e-4, 1e-5),
        ("quarter_cosine", 1e-5 + 9.9e-4 * math.cos(math.pi / 4), 1e-5),
        ("linear", 5.05e-4, 1e-5),
        ("constant", 1e-3, 1e-3),
        ("wsd", 1e-3, 1e-5),
    ],
)
def test_middle_and_end(schedule: str, middle: float, end: float) -> None:
    def at(position: float) -> float:
        return learning_rate(position, 1100, lr=1e-3, lr_final=1e-5, schedule=schedule, warmup=100)

    assert at(600) == pytest.approx(middle)
    assert at(1100) == pytest.approx(end)
    assert at(2000) == pytest.approx(end)  # padding can make a stage a step longer than planned


def test_wsd_goes_down_over_the_last_fifth() -> None:
    rates = [learning_rate(p, 100, lr=1.0, schedule="wsd") for p in (0, 79, 80, 90, 100)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_never_up_after_the_warm_up_and_never_negative(schedule: str) -> None:
    rates = [learning_rate(p, 200, lr=1e-3, lr_final=1e-6, schedule=schedule, warmup=20) for p in range(20, 201)]
    assert all(a >= b > 0 for a, b in pairwise(rates))


def test_a_warm_up_longer_than_the_stage_is_no_error() -> None:
    assert learning_rate(5, 10, lr=1.0, warmup=50) == pytest.approx(0.01 + 0.99 * 0.1)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule 'cosin'\. Available: cosine"):
        learning_rate(0, 1, lr=1.0, schedule="cosin")
