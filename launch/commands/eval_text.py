"""Results of the suites as text for stdout. Torch-free."""

from __future__ import annotations

from typing import Any

from ...eval import core_table, recall_table
from ..output import table


def shown(suite: str, result: dict[str, Any]) -> str:
    """A suite's result as a table."""
    known = {"quick": fidelity_table, "recall": recall_table.to_text, "core": core_table.to_text}
    return known[suite](result)


def fidelity_table(result: dict[str, Any]) -> str:
    """Each figure of the suite quick with its standard error; without a teacher the model's own alone."""
    found: dict[str, tuple[float, float | None]] = {}
    for side in ("teacher", "student"):
        if side in result:
            found[f"{side} perplexity"] = result[side]["perplexity"], result[side].get("perplexity_stderr")
    for name in ("perplexity_ratio", "kl", "top1_agreement"):
        if name in result:
            found[name] = result[name], result.get(f"{name}_stderr")
    rows = [(name, f"{value:.4f}", "" if error is None else f"± {error:.4f}") for name, (value, error) in found.items()]
    return table([*rows, ("tokens", str(result["tokens"]), "")], ("figure", "value", "stderr"))
