"""Loss spikes: a step whose loss jumps above what was usual before it, and what is done with its batch. Torch-free.

A spike's batch is left out, as PaLM did (https://arxiv.org/abs/2204.02311, section 5.1: training went on from a
checkpoint before the spike with the batches around it left out, and the same batches at another state of the weights
made no spike). Here the decision is a pure function of the losses before, which commits hold: a resumed run decides
the same.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SpikeSettings:
    """When a loss is a spike.

    Attributes:
        factor: times the median of the last losses.
        window: how many; nothing is judged before so many steps.
        action: `skip` leaves the batch out; `rollback` also takes weights and optimizer back to the last commit, so
            that the batches since then are left out with it.
    """

    factor: float
    window: int
    action: Literal["skip", "rollback"] = "skip"


class Spikes:
    """The losses so far, as far as they count."""

    def __init__(self, settings: SpikeSettings) -> None:
        self.settings = settings
        self.losses: list[float] = []
        self.row = 0

    def judge(self, loss: float) -> float | None:
        """Take note of a step's loss.

        Returns:
            The median that it is too far above, None where it is not.
        """
        if len(self.losses) >= self.settings.window:
            median = statistics.median(self.losses)
            if loss > self.settings.factor * median:
                self.row += 1
                return median
        self.row = 0
        self.losses = [*self.losses, loss][-self.settings.window :]
        return None

    @property
    def hopeless(self) -> bool:
        """So many spikes in a row that the loss has changed its level: leaving out batches does not help."""
        return self.row >= self.settings.window

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"losses": self.losses, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.losses, self.row = list(state["losses"]), int(state["row"])
