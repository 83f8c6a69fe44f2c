"""The learning rate as a pure function of how far a stage is."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "quarter_cosine", "linear", "constant", "wsd")
WARMUP_START = 0.01
"""Fraction of the rate at which a warm-up begins (RADLADS: 1 %)."""


def learning_rate(
    position: float,
    total: float,
    *,
    lr: float,
    lr_final: float = 0.0,
    schedule: str = "cosine",
    warmup: float = 0.0,
    decay: float = 0.2,
) -> float:
    """The learning rate of the step that starts at `position`.

    Args:
        position: what is done before this step: steps or tokens, the same unit as `total` and `warmup`.
        total: what the stage will have done at its end.
        lr: the rate after the warm-up.
        lr_final: the rate at the end; not read by `constant`.
        schedule: after the warm-up, with p going from 0 to 1:
            `cosine`: final + (lr - final) (1 + cos πp) / 2;
            `quarter_cosine`: final + (lr - final) cos(πp / 2), which RADLADS calls cosine;
            `linear`: straight from lr to final;
            `constant`: lr;
            `wsd`: lr, then straight to final over the last `decay` of the stage.
        warmup: length of the straight climb from 1 % of lr to lr.
        decay: fraction of the stage that `wsd` spends going down.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}. Available: {', '.join(SCHEDULES)}")
    if position < warmup:
        return lr * (WARMUP_START + (1 - WARMUP_START) * position / warmup)
    rest = total - warmup
    p = min(1.0, (position - warmup) / rest) if rest > 0 else 1.0
    if schedule == "constant":
        left = 1.0
    elif schedule == "cosine":
        left = (1 + math.cos(math.pi * p)) / 2
    elif schedule == "quarter_cosine":
        left = math.cos(math.pi * p / 2)
    elif schedule == "linear":
        left = 1 - p
    else:
        start = max(warmup, total * (1 - decay))
        down = total - start
        left = 1 - max(0.0, min(1.0, (position - start) / down)) if down > 0 else 1.0
    return lr_final + (lr - lr_final) * left
