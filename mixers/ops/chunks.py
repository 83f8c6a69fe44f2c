"""What the forms of recurrences share: types, states, padding, document borders, cutting rows into chunks.

Layout inside a chunked form: the N chunks lead and batch and heads are folded, (N * B * H, C, ...), so that every
product is one plain `bmm` and the states of one chunk, (B * H, dk, dv), lie together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def initial_state(
    state: torch.Tensor | None, batch: int, heads: int, dk: int, dv: int, like: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The incoming (B, H, dk, dv) state, zeros where there is none.

    Raises:
        ValueError: the state given has another shape.
    """
    shape = (batch, heads, dk, dv)
    if state is None:
        return torch.zeros(shape, device=like.device, dtype=dtype)
    if state.shape != shape:
        raise ValueError(f"state has shape {tuple(state.shape)}, expected (B, H, dk, dv) = {shape}")
    return state.to(dtype)


def real_segments(segments: torch.Tensor | None, padding: torch.Tensor | None) -> torch.Tensor | None:
    """Document numbers in which padding takes the number of the nearest real token, before it if there is one.

    A padding step does not exist: it must neither open a document nor close one.
    """
    if segments is None or padding is None:
        return segments
    first = segments.masked_fill(~padding, torch.iinfo(segments.dtype).max).amin(1, keepdim=True)
    return torch.maximum(segments.masked_fill(~padding, torch.iinfo(segments.dtype).min).cummax(1).values, first)


def continues(segments: torch.Tensor | None, padding: torch.Tensor | None) -> torch.Tensor | None:
    """(B, T) bool, False at the first token of every document but the row's first, which the incoming state belongs to.

    None where a row is one document. Padding opens and closes none.
    """
    numbers = real_segments(segments, padding)
    if numbers is None:
        return None
    return pad(numbers[:, 1:] == numbers[:, :-1], (1, 0), value=True)


def without_padding(x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """(B, T, ...) with zeros at padding."""
    return x if padding is None else x.masked_fill(~padding.view(*padding.shape, *(1,) * (x.dim() - 2)), 0.0)


def masked(padding: torch.Tensor | None, dtype: torch.dtype, *inputs: torch.Tensor | None) -> tuple[Any, ...]:
    """Inputs (B, T, ...) in the dtype of the computation; at padding all zero: nothing read or written, no decay.

    An input that is None stays None.
    """
    return tuple(None if x is None else without_padding(x.to(dtype), padding) for x in inputs)


def split(x: torch.Tensor, chunk: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, N * C, H, ...) -> (N * B * H, C, ...). Copies, unless there is one row with one head."""
    batch, _, heads, *rest = x.shape
    x = x.to(dtype).reshape(batch, -1, chunk, heads, *rest)
    return x.transpose(2, 3).transpose(0, 1).reshape(-1, chunk, *rest)


class Borders(NamedTuple):
    """Document borders of M = N * B * H chunks, as factors of 0 and 1.

    Attributes:
        pairs: (M, C, C), 1 where row i may see token j as far as documents go.
        sees: (M, C, 1), 1 where a row belongs to the document of the incoming state.
        leaves: (M, C, 1), 1 where a token belongs to the document of the outgoing state.
        carries: (M, 1, 1), 1 where the incoming state survives the chunk.
    """

    pairs: torch.Tensor
    sees: torch.Tensor
    leaves: torch.Tensor
    carries: torch.Tensor


def borders(segments: torch.Tensor, previous: torch.Tensor, chunk: int, heads: int, dtype: torch.dtype) -> Borders:
    """Borders from (B, N * C) document numbers. `previous`: (B,), the document of the state before the first token."""
    inside = segments.unflatten(1, (-1, chunk)).transpose(0, 1)  # (N, B, C)
    last = inside[:, :, -1:]
    before = torch.cat([previous[None, :, None], last[:-1]])
    return Borders(
        *(
            same.to(dtype).unsqueeze(2).expand(-1, -1, heads, -1, -1).flatten(0, 2)
            for same in (
                inside[..., :, None] == inside[..., None, :],
                (inside == before)[..., None],
                (inside == last)[..., None],
                (last == before)[..., None],
            )
        )
    )
