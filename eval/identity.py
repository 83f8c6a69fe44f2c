"""Which model a kept figure or answer is of."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

SAMPLE = 2048
"""Elements of every tensor that are looked at, at its beginning and at its end."""


def model_id(model: Any, **settings: Any) -> str:
    """Eight hexadecimal digits that tell models apart which were made apart, and the same model under other settings.

    From the names, shapes, types and some values of all parameters; where the weights lie does not matter. Not a
    checksum: a single changed value in the middle of a tensor is not seen.

    Args:
        model: whose parameters are looked at.
        settings: plain values that count too.
    """
    made = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in model.named_parameters():
        made.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().reshape(-1)
        ends = torch.cat([flat[:SAMPLE], flat[-SAMPLE:]]).double().cpu()
        made.update(ends.numpy().tobytes())
    return made.hexdigest()[:8]
