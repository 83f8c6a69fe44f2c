"""Chunked recurrences with a backward of their own, a few chunks at a time, so that what is in work stays in cache.

A recurrence brings a `Kernel`: two plain functions for some chunks, one forward and one backward. `segmented` cuts the
inputs, walks over the row, hands states and their gradients on and keeps for the backward the inputs and what the
kernel asks to keep, nothing else: memory per token is constant, and so is the cost.

Layout of what a kernel sees (as in chunks.py): (N * B * H, C, ...) with the N chunks leading, states (B * H, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .chunks import Borders, borders, split

Tensors = tuple[torch.Tensor, ...]
Parts = tuple[Any, ...]  # tensors, or None where the caller gave None

WORKING_SET = 1 << 16
"""Numbers of one input that are in work at once (256 KiB in fp32): a dozen of such tensors fit a core's L2 and L3."""


class Kernel(NamedTuple):
    """What a recurrence does with N chunks. Neither function may write into its inputs.

    Attributes:
        forward: (parts, states, border) -> (output (N * B * H, C, dv), new states, what to keep for the backward).
            `parts` are the inputs: (N * B * H, C, ...) of those with tokens, as they are of those without. `states` is
            a tuple. `border` is None where no document ends.
        backward: (parts, kept, border, gradient of the output, gradients of the new states, needs) -> (gradients of the
            parts, gradients of the incoming states). `needs` says which parts want one; None will do for the others.
    """

    forward: Callable[[Parts, Tensors, Borders | None], tuple[torch.Tensor, Tensors, Tensors]]
    backward: Callable[[Parts, Tensors, Borders | None, torch.Tensor, Tensors, tuple[bool, ...]], tuple[Parts, Tensors]]


class _Plan(NamedTuple):
    """How a row is cut.

    Attributes:
        chunk: tokens per chunk; the last one may be shorter.
        tokens: first and last token (exclusive) and tokens per chunk of every piece of work.
        dtype: of the computation.
    """

    chunk: int
    tokens: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype


def segmented(
    kernel: Kernel,
    inputs: tuple[torch.Tensor | None, ...],
    states: Tensors,
    chunk: int,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Tensors]:
    """Run a kernel over whole rows.

    Args:
        kernel: the recurrence.
        inputs: (B, T, H, ...) each, or anything of fewer than three dimensions (per head, say), which is handed on as
            it is; None is handed on too. The first has tokens, the last is (B, T, H, dv) or None.
        states: (B, H, ...) each, in the dtype of the computation.
        chunk: tokens per chunk.
        segments: (B, T) document numbers, from `chunks.real_segments`.

    Returns:
        (B, T, H, dv) in the dtype of the computation, and the new states.
    """
    first = inputs[0]
    assert first is not None
    batch, length, heads = first.shape[:3]
    several = max(1, WORKING_SET // (batch * heads * chunk * first.shape[-1])) * chunk
    even = length - length % chunk
    tokens = [(start, min(start + several, even), chunk) for start in range(0, even, several)]
    if even < length:
        tokens.append((even, length, length - even))
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, *states))
    plan = _Plan(chunk, tuple(tokens), states[0].dtype)
    folded = tuple(state.flatten(0, 1) for state in states)
    out, *new = _Segmented.apply(kernel, plan, keep, segments, len(states), *folded, *inputs)  # pyright: ignore[reportGeneralTypeIssues]
    return out, tuple(state.unflatten(0, (batch, heads)) for state in new)


class _Segmented(torch.autograd.Function):
    """Pieces in order, then in reverse. Gradients go to the states and to every input that wants one."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        plan: _Plan,
        keep: bool,
        segments: torch.Tensor | None,
        count: int,
        *tensors: Any,
    ) -> Tensors:
        states, inputs = tensors[:count], tensors[count:]
        out: Any = None
        kept: list[torch.Tensor] = []
        saved: Tensors = ()
        for piece in plan.tokens:
            border = _border(segments, piece, inputs[0].shape[2], plan.dtype)
            o, states, saved = kernel.forward(_cut(inputs, piece, plan.dtype), states, border)
            if keep:
                kept.extend(saved)
            if out is None:
                out = o.new_empty(*inputs[0].shape[:3], o.shape[-1])
            _put(out, o, piece)
        ctx.kernel, ctx.plan, ctx.count, ctx.per_piece = kernel, plan, count, len(saved)
        ctx.save_for_backward(segments, *inputs, *kept)
        # Copies: what is kept must survive a caller that overwrites the state.
        return out, *(state.clone() for state in states)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grad_out, *grad_states = grads
        kernel, plan, per_piece = ctx.kernel, ctx.plan, ctx.per_piece
        tensors = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[5 + ctx.count :])
        segments, inputs, kept = tensors[0], tensors[1 : 1 + len(needs)], tensors[1 + len(needs) :]
        found: list[Any] = [
            torch.empty_like(x, memory_format=torch.contiguous_format) if need and x.dim() > 2 else None
            for x, need in zip(inputs, needs, strict=True)
        ]
        flow = tuple(grad_states)
        with torch.autocast(grad_out.device.type, enabled=False):
            for number in range(len(plan.tokens) - 1, -1, -1):
                piece = plan.tokens[number]
                saved = kept[number * per_piece : (number + 1) * per_piece]
                border = _border(segments, piece, inputs[0].shape[2], plan.dtype)
                (grad,) = _cut((grad_out,), piece, plan.dtype)
                parts = _cut(inputs, piece, plan.dtype)
                partial, flow = kernel.backward(parts, saved, border, grad, flow, needs)
                for i, part in enumerate(partial):
                    if not needs[i]:
                        continue
                    if inputs[i].dim() > 2:
                        _put(found[i], part, piece)
                    else:
                        found[i] = part if found[i] is None else found[i] + part
        return None, None, None, None, None, *flow, *found


def _cut(inputs: tuple[torch.Tensor | None, ...], piece: tuple[int, int, int], dtype: torch.dtype) -> Parts:
    start, stop, chunk = piece
    return tuple(x if x is None or x.dim() < 3 else split(x[:, start:stop], chunk, dtype) for x in inputs)


def _put(whole: torch.Tensor, part: torch.Tensor, piece: tuple[int, int, int]) -> None:
    """Write (N * B * H, C, ...) where it belongs in (B, T, H, ...)."""
    start, stop, chunk = piece
    batch, _, heads, *rest = whole.shape
    place = whole[:, start:stop].view(batch, -1, chunk, heads, *rest)
    place.copy_(part.view(-1, batch, heads, chunk, *rest).transpose(0, 1).transpose(2, 3))


def _border(
    segments: torch.Tensor | None, piece: tuple[int, int, int], heads: int, dtype: torch.dtype
) -> Borders | None:
    if segments is None:
        return None
    start, stop, chunk = piece
    return borders(segments[:, start:stop], segments[:, max(0, start - 1)], chunk, heads, dtype)
