"""What the chunked forms share: cutting rows into chunks, document borders inside them, the scan over chunk states.

Layout inside a chunked form: the N chunks lead and batch and heads are folded, (N * B * H, C, ...), so that every
product is one plain `bmm` and the states of one chunk, (B * H, dk, dv), lie together for the scan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
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


def split(x: torch.Tensor, chunk: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, T, H, ...) -> (N * B * H, C, ...), with zeros after the last token."""
    batch, length, heads, *rest = x.shape
    x = x.to(dtype)
    if length % chunk:
        x = pad(x, (0, 0) * (len(rest) + 1) + (0, -length % chunk))
    x = x.reshape(batch, -1, chunk, heads, *rest).transpose(2, 3)  # (B, N, H, C, ...)
    return x.transpose(0, 1).reshape(-1, chunk, *rest)


def join(x: torch.Tensor, batch: int, length: int, heads: int) -> torch.Tensor:
    """(N * B * H, C, d) -> (B, T, H, d): undoes `split`."""
    chunk, dim = x.shape[-2:]
    return x.view(-1, batch, heads, chunk, dim).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, dim)[:, :length]


class Borders(NamedTuple):
    """Document borders of every chunk; each broadcasts over heads in (N, B, H, ...) views.

    Attributes:
        pairs: (N, B, 1, C, C) bool, True where row i may see token j as far as documents go.
        sees: (N, B, 1, C, 1), 1 where a row belongs to the document of the incoming state.
        leaves: (N, B, 1, C, 1), 1 where a token belongs to the document of the outgoing state.
        carries: (N, B, 1, 1, 1), 1 where the incoming state survives the chunk.
    """

    pairs: torch.Tensor
    sees: torch.Tensor
    leaves: torch.Tensor
    carries: torch.Tensor


def borders(segments: torch.Tensor, chunk: int, dtype: torch.dtype, previous: torch.Tensor | None = None) -> Borders:
    """Borders from (B, T) document numbers.

    The state before the first token belongs to the (B,) documents `previous`, by default the first token's.
    """
    batch, length = segments.shape
    if length % chunk:
        tail = segments[:, -1:].expand(batch, -length % chunk)
        segments = torch.cat([segments, tail], 1)
    inside = segments.view(batch, -1, chunk).transpose(0, 1)  # (N, B, C)
    last = inside[:, :, -1]
    before = torch.cat([inside[:1, :, 0] if previous is None else previous[None], last[:-1]])
    return Borders(
        pairs=(inside[..., :, None] == inside[..., None, :]).unsqueeze(2),
        sees=(inside == before[..., None])[:, :, None, :, None].to(dtype),
        leaves=(inside == last[..., None])[:, :, None, :, None].to(dtype),
        carries=(last == before)[:, :, None, None, None].to(dtype),
    )


class _Scan(torch.autograd.Function):
    """States before every chunk and after the last: S_{n+1} = M_n S_n + R_n. One product per chunk and direction."""

    @staticmethod
    def forward(ctx: Any, transition: torch.Tensor, written: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        states = torch.empty((len(written) + 1, *first.shape), device=first.device, dtype=first.dtype)
        states[0] = first
        state = states[0]
        for M, R, after in zip(transition.unbind(0), written.unbind(0), states[1:].unbind(0), strict=True):
            state = torch.baddbmm(R, M, state, out=after)
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        transition, states = ctx.saved_tensors
        (grad,) = grads
        with torch.autocast(grad.device.type, enabled=False):
            written = torch.empty_like(states[1:])
            flow = grad[-1]
            for n in range(len(transition) - 1, -1, -1):
                written[n] = flow
                flow = torch.baddbmm(grad[n], transition[n].mT, flow)
            return written @ states[:-1].mT, written, flow


def scan(transition: torch.Tensor, written: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chunk states.

    Args:
        transition: (N, B * H, dk, dk), what a chunk does to the state it receives.
        written: (N, B * H, dk, dv), what it adds.
        first: (B * H, dk, dv), the incoming state.

    Returns:
        (N * B * H, dk, dv) states before each chunk, and the (B * H, dk, dv) state after the last.
    """
    states: torch.Tensor = _Scan.apply(transition, written, first)  # pyright: ignore[reportAssignmentType]
    # A copy: a view would keep the states of all chunks alive in the cache.
    return states[:-1].flatten(0, 1), states[-1].clone()
