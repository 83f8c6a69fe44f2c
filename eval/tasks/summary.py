"""Means over answers, with standard errors that treat documents as the independent draws. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def clustered(results: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """{"accuracy", "stderr", "n"} from (right, asked) per document; the error treats documents as clusters.

    The formula is that of eval/fidelity.py; with one document the error is 0. "right" may count shares of answers.
    """
    asked = sum(n for _, n in results)
    accuracy = sum(right for right, _ in results) / asked
    stderr = 0.0
    if len(results) > 1:
        spread = sum((right - accuracy * n) ** 2 for right, n in results)
        stderr = math.sqrt(spread * len(results) / (len(results) - 1)) / asked
    return {"accuracy": accuracy, "stderr": stderr, "n": asked}
