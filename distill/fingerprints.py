"""Hashes of tensors: what must not change is compared byte for byte."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def fingerprints(tensors: dict[str, Any]) -> dict[str, str]:
    """A hash of every tensor's bytes."""
    return {name: tensor_fingerprint(tensor) for name, tensor in tensors.items()}


def tensor_fingerprint(tensor: Tensor) -> str:
    """A hash of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=12).hexdigest()


def different(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names whose hashes differ, or that one side lacks."""
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
