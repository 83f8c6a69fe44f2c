"""A running average of the weights beside the ones that train: evaluated, saved and exported in their stead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

RAW = "raw"
"""What a commit's optimizer file calls the weights that train, where its weights file holds their average."""


class Average:
    """An exponential moving average of parameters: a <- d a + (1 - d) p with d = min(decay, (n + 1) / (n + 10)) at
    step n, so that the first steps are soon forgotten (as TensorFlow's ExponentialMovingAverage counts).

    A high learning rate can then be kept for longer: the average of its jumps lies where a low rate would end.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float) -> None:
        """Begin with the parameters as they are: whole, or what this rank holds of them."""
        self.parameters = parameters
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step` steps."""
        decay = min(self.decay, (step + 1) / (step + 10))
        get_ema_multi_avg_fn(decay)(list(self.values.values()), [p.detach() for p in self.parameters.values()], step)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange what the parameters hold and what the average holds."""
        for name, parameter in self.parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = held

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The parameters hold the average as long as this lasts, and `values` what trains."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def take(self) -> None:
        """The parameters were loaded, and hold the average."""
        for name, parameter in self.parameters.items():
            self.values[name] = parameter.detach().clone()
