"""Problems whose answers can be checked, from a seed: `7 + 15 =`. Torch-free."""

from __future__ import annotations

import random
from typing import Any

from .schema import ArithmeticSection

WRONG = 10
"""How far off the rejected answer of a pair is at most."""


def problems(settings: ArithmeticSection, seed: int) -> list[tuple[int, str, int]]:
    """Distinct (operand, operation, operand), in random order: `settings.problems`, or all that there are."""
    rng = random.Random(f"arithmetic {seed}")
    span = settings.high - settings.low + 1
    operations = list(dict.fromkeys(settings.operations))
    count = min(settings.problems, len(operations) * span * span)
    chosen = rng.sample(range(len(operations) * span * span), count)
    return [
        (settings.low + index // span % span, operations[index // span // span], settings.low + index % span)
        for index in chosen
    ]


def solve(a: int, operation: str, b: int) -> int:
    """The answer."""
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


def examples(method: str, settings: ArithmeticSection, seed: int) -> list[dict[str, Any]]:
    """The problems as records of a method: {prompt, completion}, {prompt, chosen, rejected} or {prompt, answer}."""
    rng = random.Random(f"wrong {seed}")
    made = []
    for a, operation, b in problems(settings, seed):
        right = solve(a, operation, b)
        wrong = right + rng.choice([-1, 1]) * rng.randint(1, WRONG)
        task = f"{a} {operation} {b}"
        record: dict[str, Any] = {"prompt": _asked(task, settings.chat)}
        if method == "sft":
            record["completion"] = _said(task, right, settings.chat)
        elif method == "dpo":
            record["chosen"] = _said(task, right, settings.chat)
            record["rejected"] = _said(task, wrong, settings.chat)
        else:
            record["answer"] = str(right)
        made.append(record)
    return made


def _asked(task: str, chat: bool) -> Any:
    return [{"role": "user", "content": f"What is {task}?"}] if chat else f"{task} ="


def _said(task: str, answer: int, chat: bool) -> Any:
    return [{"role": "assistant", "content": f"{task} = {answer}."}] if chat else f" {answer}."
