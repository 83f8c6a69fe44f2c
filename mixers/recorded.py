"""The states after each of the last tokens of a call, for a caller that may take tokens back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import MixerInputs, State
from .ops.short_conv import short_conv


def recorded(
    call: Callable[..., tuple[torch.Tensor, State]], inputs: tuple, where: MixerInputs, state: State | None
) -> tuple[torch.Tensor, State]:
    """Mix all tokens but the last `where.record` at once, then those one by one, and note every state on the way.

    Args:
        call: call(*inputs, where=, state=) gives the output, (B, T, ...), and the new state. It may overwrite the state
            that it is given, with one token.
        inputs: its arguments; tensors of three dimensions and more are (B, T, ...), any other is passed as it is.
        where: padding, and where the states are noted.
        state: of the previous call; left as it is.

    Returns:
        The output for all tokens and the state after the last.

    Raises:
        ValueError: documents packed in a row: a call for one token knows no border before it.
    """
    if where.segments is not None:
        raise ValueError("states are recorded for one document in a row, not for packed ones")
    length = inputs[0].shape[1]
    alone = max(0, length - where.record)
    outputs, states = [], []
    for start, stop in [(0, alone)] * (alone > 0) + [(t, t + 1) for t in range(alone, length)]:
        if state is not None and stop - start == 1:
            state = tuple(part.clone() for part in state)
        cut = inputs
        if stop - start < length:
            cut = (x[:, start:stop] if isinstance(x, torch.Tensor) and x.dim() > 2 else x for x in inputs)
        here = MixerInputs(None if where.padding is None else where.padding[:, start:stop])
        output, state = call(*cut, where=here, state=state)
        outputs.append(output)
        if start >= alone:
            states.append(state)
    for versions in zip(*states, strict=True):
        where.note(list(versions))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), states[-1]


def convolve(
    x: torch.Tensor, taps: torch.Tensor, buffer: torch.Tensor | None, where: MixerInputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """`short_conv` under the padding and borders of `where`, which notes the buffers if they are to be recorded."""
    if not where.record:
        return short_conv(x, taps, buffer, where.padding, where.segments)
    if where.padding is None:
        out, kept = short_conv(x, taps, buffer, None, where.segments)
        past, length = kept.shape[1], x.shape[1]
        before = torch.zeros_like(kept) if buffer is None else buffer.to(kept.dtype)
        line = torch.cat([before, x.to(kept.dtype)], 1)
        ends = range(max(0, length - where.record) + 1, length)
        where.note([*(line[:, end : end + past].clone() for end in ends), kept])
        return out, kept

    def call(x: torch.Tensor, where: MixerInputs, state: State | None) -> tuple[torch.Tensor, State]:
        out, kept = short_conv(x, taps, None if state is None else state[0], where.padding, where.segments)
        return out, (kept,)

    out, (kept,) = recorded(call, (x,), where, None if buffer is None else (buffer,))
    return out, kept
