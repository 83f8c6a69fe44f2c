"""Checks that students of every kind must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def checkpointing_keeps_gradients() -> Callable[[Any, torch.Tensor], None]:
    """check(model, ids): every parameter gets the same gradient with activation checkpointing as without."""

    def check(model: Any, ids: torch.Tensor) -> None:
        model.train()

        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        plain = gradients()
        model.activation_checkpointing_enable()
        again = gradients()
        assert plain.keys() == again.keys() == dict(model.named_parameters()).keys()
        for name, value in plain.items():
            torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6, msg=name)

    return check
