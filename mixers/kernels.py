"""The one place that chooses the form in which a recurrence runs."""

from __future__ import annotations

from typing import Any

import torch

from .ops.gated_delta import chunked as gated_delta_chunked
from .ops.gated_delta import recurrent as gated_delta_recurrent
from .ops.rwkv7 import chunked as rwkv7_chunked
from .ops.rwkv7 import recurrent as rwkv7_recurrent

SHORT = 4
"""Up to so many tokens, going step by step costs less than cutting chunks."""

_FORMS = {
    "gated_delta": {"recurrent": gated_delta_recurrent, "chunked": gated_delta_chunked},
    "rwkv7": {"recurrent": rwkv7_recurrent, "chunked": rwkv7_chunked},
}


def choose(form: str, device: torch.device, length: int) -> tuple[str, str]:
    """The form to run and why.

    Args:
        form: `auto`, or the form that the user asked for.
        device: where the tensors are.
        length: tokens in this call.

    Raises:
        ValueError: unknown form.
    """
    if form not in ("auto", "recurrent", "chunked"):
        raise ValueError(f"form {form!r} is none of auto, recurrent, chunked")
    if form != "auto":
        return form, "asked for"
    if length <= SHORT:
        return "recurrent", f"{length} tokens: steps cost less than chunks"
    return "chunked", f"plain torch on {device.type}"


def run(op: str, form: str, chunk: int, *inputs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence `op` of mixers/ops on `inputs` in the form that `choose` says; see there for the arguments."""
    name, _ = choose(form, inputs[0].device, inputs[0].shape[1])
    if name == "chunked":
        options["chunk"] = chunk
    return _FORMS[op][name](*inputs, **options)
