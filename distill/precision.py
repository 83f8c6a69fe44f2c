"""bf16 as relinear means it: products in bfloat16, weights, optimizer and losses in fp32."""

from __future__ import annotations

import torch


def autocast(device: str, precision: str) -> torch.autocast:
    """The context for forward passes.

    Args:
        device: type of the device, `cpu` or `cuda`.
        precision: `bf16` switches autocast on, anything else off.
    """
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def no_autocast(device: str) -> torch.autocast:
    """The context for losses and backward passes inside an autocast region."""
    return torch.autocast(device, enabled=False)
