"""The one place that chooses the form in which a recurrence runs."""

from __future__ import annotations

from typing import Any

import torch

from .base import MixerInputs, State
from .ops.op import Op

SHORT = 4
"""Up to so many tokens, going step by step costs less than cutting chunks."""


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


def run(
    op: Op, form: str, chunk: int | None, *inputs: Any, where: MixerInputs, state: State | None
) -> tuple[torch.Tensor, State]:
    """Run a recurrence in the form that `choose` says.

    Args:
        op: the recurrence, `OP` of its file in mixers/ops.
        form: the mixer's option.
        chunk: tokens per chunk; None for the recurrence's own choice.
        inputs: its arguments, as its forms take them; the first is a tensor (B, T, ...).
        where: padding and document borders.
        state: its tensors from the previous call. Without gradients a call of one token overwrites them.

    Returns:
        The output and the new state.
    """
    first = inputs[0]
    past = None if state is None else state[0] if len(state) == 1 else state
    if form == "auto" and past is not None and _one_step(first, state, where):
        return op.step(*inputs, past), state  # pyright: ignore[reportReturnType]
    name, _ = choose(form, first.device, first.shape[1])
    options = {"state": past, "padding": where.padding, "segments": where.segments}
    if name == "chunked":
        options |= {"chunk": chunk} if chunk is not None else {}
        out, new = op.chunked(*inputs, **options)
    else:
        out, new = op.recurrent(*inputs, **options)
    return out, new if isinstance(new, tuple) else (new,)


def _one_step(first: torch.Tensor, state: State | None, where: MixerInputs) -> bool:
    """One token of a running generation: its state can be overwritten."""
    if first.shape[1] != 1 or torch.is_grad_enabled() or where.padding is not None or where.segments is not None:
        return False
    return torch.is_inference_mode_enabled() or not any(part.is_inference() for part in state or ())
