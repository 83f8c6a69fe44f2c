"""Mamba's selective scan: decays per channel and state, inputs and read-outs shared by groups (arXiv 2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t

for every channel i of I with its row A_i of N decays; B_t and C_t (N) serve the consecutive channels of a group. The
caller adds D x and gates. With A < 0 and dt >= 0 every factor lies in (0, 1]: nothing can overflow.

There is no product of matrices in it: decays differ per channel and state. The chunked form is one pass over
elements, for many chunks side by side, and never holds (T, I, N): what the backward needs is computed again from the
states between chunks, a fixed number of elements at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .chunks import compute_dtype, continues, without_padding
from .decays import LOG2E
from .op import Op
from .steps import in_dtype

CHUNK = 32
SCRATCH = 2**19  # elements of each of the three arrays (tokens, I, N) that exist at a time


def recurrent(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: the truth that the other forms are held against.

    Args:
        x, dt: (B, T, I) input and step size >= 0. A: (I, N) < 0.
        B, C: (B, T, G, N), of G groups of I / G consecutive channels.
        state: (B, I, N) from the previous call; belongs to the document of the first token.
        padding: (B, T) bool, True at real tokens. Other steps leave the state as it is and give 0.
        segments: (B, T) document numbers, non-decreasing; the state is zeroed where the number changes.

    Returns:
        (B, T, I) in the dtype of x, and the (B, I, N) fp32 state (fp64 for fp64 inputs).

    Raises:
        ValueError: the state given has another shape, or G does not divide I.
    """
    dtype = compute_dtype(x.dtype)
    h = _initial(state, x, A, B, dtype)
    dt_ = without_padding(dt.to(dtype), padding)  # no time passes there: nothing is written and nothing decays
    same = continues(segments, padding)
    per = x.shape[-1] // B.shape[2]
    B_, C_ = (y.to(dtype).repeat_interleave(per, 2) for y in (B, C))
    decay = dt_[..., None] * A.to(dtype)
    written = (dt_ * x.to(dtype))[..., None] * B_
    out = []
    for t, (a, b, c) in enumerate(zip(decay.exp().unbind(1), written.unbind(1), C_.unbind(1), strict=True)):
        if same is not None:
            h = h * same[:, t, None, None]
        h = a * h + b
        out.append((h * c).sum(-1))
    y = torch.stack(out, 1)
    return without_padding(y, padding).to(x.dtype), h


def chunked(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, `chunk` tokens in a row and as many chunks at a time as `SCRATCH` allows.

    First what every chunk would end with if it had begun with nothing, then the states between chunks, then all states
    from those. The backward runs the same two passes from the end. Arguments and results as `recurrent`.
    """
    dtype = compute_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        h = _initial(state, x, A, B, dtype)
        same = continues(segments, padding)
        keep = None if same is None else same.to(dtype)
        y, h = _Scan.apply(  # pyright: ignore[reportGeneralTypeIssues]
            x, without_padding(dt.to(dtype), padding), A, B, C, h, keep, chunk
        )
        return without_padding(y, padding).to(x.dtype), h


def step(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token, called without gradients. Overwrites `state`; besides its result it allocates the decays, (B, I, N).

    Args:
        x, dt: (B, 1, I). A: (I, N). B, C: (B, 1, G, N). As in `recurrent`.
        state: (B, I, N) fp32 or fp64, contiguous.

    Returns:
        (B, 1, I) in the dtype of x.
    """
    x_, dt, A, B, C = in_dtype(state.dtype, x, dt, A, B, C)
    size = A.shape[1]
    B, C = B.reshape(-1, 1, size), C.reshape(-1, 1, size)
    out = torch.mul(dt, LOG2E)
    state.mul_(torch.mul(out.mT, A).exp2_())
    sent = torch.mul(dt, x_, out=out).view(len(B), -1, 1)
    grouped = state.view(len(B), -1, size).addcmul_(sent, B)
    # Rows times matrices: the other way round, CPUs take four times as long.
    torch.bmm(C, grouped.mT, out=sent.mT)
    return out if x_ is x else out.to(x.dtype)


class _Scan(torch.autograd.Function):
    """Outputs (B, T, I) and the final state (B, I, N).

    Inside, (P, n, B, G, N, J): token within the chunk, chunk, row, group, state, channel of the group. The channels are
    last, where a step size serves as a vector.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        h: torch.Tensor,
        keep: torch.Tensor | None,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, channels = x.shape
        groups, size = B.shape[2:]
        A_ = A.to(h.dtype).unflatten(0, (groups, -1)).mT.contiguous()
        state = h.unflatten(1, (groups, -1)).mT.contiguous()
        y = torch.empty_like(x, dtype=h.dtype)
        saved = []
        for tokens in _pieces(length, batch * channels * size, chunk):
            x_, dt_ = (_part(part, tokens, chunk, groups, h.dtype).unsqueeze(-2) for part in (x, dt))
            B_, C_ = (_part(part.flatten(2), tokens, chunk, groups, h.dtype) for part in (B, C))
            marks = _marks(keep, tokens, chunk)
            decay = _decays(dt_, A_, marks)
            states = B_[..., None] * (dt_ * x_)
            before, state = _between(decay, states, _whole_decays(dt_, A_, marks), state)
            saved.append(before)
            _run(decay, states, before)
            y[:, tokens] = _whole(torch.matmul(C_.unsqueeze(-2), states), tokens)
        ctx.save_for_backward(x, dt, A, B, C, keep, *saved)
        ctx.chunk = chunk
        return y, state.mT.flatten(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, dt, A, B, C, keep, *saved = ctx.saved_tensors
        chunk, (grad_y, flow) = ctx.chunk, grads
        batch, length, channels = x.shape
        groups, size = B.shape[2:]
        A_ = A.to(flow.dtype).unflatten(0, (groups, -1)).mT.contiguous()
        flow = flow.unflatten(1, (groups, -1)).mT.contiguous()
        grad_A = torch.zeros_like(A_)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        with torch.autocast(x.device.type, enabled=False):
            pieces = _pieces(length, batch * channels * size, chunk)
            for tokens, before in zip(reversed(pieces), reversed(saved), strict=True):
                x_, dt_, gy = (_part(part, tokens, chunk, groups, flow.dtype).unsqueeze(-2) for part in (x, dt, grad_y))
                B_, C_ = (_part(part.flatten(2), tokens, chunk, groups, flow.dtype) for part in (B, C))
                marks = _marks(keep, tokens, chunk)
                decay = _decays(dt_, A_, marks)
                sent = dt_ * x_
                states = B_[..., None] * sent
                _run(decay, states, before)
                grad_C[:, tokens] = _whole(torch.matmul(states, gy.mT), tokens).unflatten(-1, (groups, size))
                gh = C_[..., None] * gy
                flow = _run_back(decay, gh, _whole_decays(dt_, A_, marks), flow)
                grad_B[:, tokens] = _whole(torch.matmul(gh, sent.mT), tokens).unflatten(-1, (groups, size))
                g_sent = torch.matmul(B_.unsqueeze(-2), gh)
                # The gradient of the exponent dt A is gh * decay * the state before.
                decay.mul_(gh)
                decay[1:].mul_(states[:-1])
                decay[0].mul_(before)
                grad_x[:, tokens] = _whole(g_sent * dt_, tokens)
                g_dt = torch.mul(decay, A_, out=gh).sum(-2, keepdim=True)
                grad_dt[:, tokens] = _whole(g_dt.addcmul_(g_sent, x_), tokens)
                grad_A += torch.mul(decay, dt_, out=gh).sum((0, 1, 2))
        grad_h = flow.mT.flatten(1, 2)
        return grad_x, grad_dt, grad_A.mT.flatten(0, 1).to(A.dtype), grad_B, grad_C, grad_h, None, None


def _pieces(length: int, width: int, chunk: int) -> list[slice]:
    """The tokens that are computed at a time: whole chunks, about SCRATCH / width tokens."""
    some = max(1, SCRATCH // (width * chunk)) * chunk
    return [slice(start, min(start + some, length)) for start in range(0, length, some)]


def _part(
    x: torch.Tensor, tokens: slice, chunk: int, groups: int, dtype: torch.dtype, fill: float = 0.0
) -> torch.Tensor:
    """(B, T, G * d) -> (P, n, B, G, d) of some tokens, with `fill` after the last."""
    x = x[:, tokens].to(dtype)
    x = pad(x, (0, 0, 0, -x.shape[1] % chunk), value=fill)
    return x.unflatten(1, (-1, chunk)).permute(2, 1, 0, 3).unflatten(-1, (groups, -1)).contiguous()


def _whole(x: torch.Tensor, tokens: slice) -> torch.Tensor:
    """(P, n, B, G, 1, J) or (P, n, B, G, N, 1) -> (B, tokens, G * J or N): undoes `_part`."""
    return x.flatten(3).permute(2, 1, 0, 3).flatten(1, 2)[:, : tokens.stop - tokens.start]


def _marks(keep: torch.Tensor | None, tokens: slice, chunk: int) -> torch.Tensor | None:
    """(P, n, B, 1, 1, 1), 0 where a document begins."""
    if keep is None:
        return None
    return _part(keep[..., None], tokens, chunk, 1, keep.dtype, fill=1.0)[..., None]


def _decays(dt: torch.Tensor, A: torch.Tensor, marks: torch.Tensor | None) -> torch.Tensor:
    """(P, n, B, G, N, J): what a token leaves of the state."""
    decay = (dt * (A * LOG2E)).exp2_()
    return decay if marks is None else decay.mul_(marks)


def _whole_decays(dt: torch.Tensor, A: torch.Tensor, marks: torch.Tensor | None) -> torch.Tensor:
    """(n, B, G, N, J): what a chunk leaves of the state."""
    decay = (dt.sum(0) * (A * LOG2E)).exp2_()
    return decay if marks is None else decay.mul_(marks.amin(0))


def _between(
    decay: torch.Tensor, written: torch.Tensor, whole: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States before each chunk (n, B, G, N, J) and after the last one, from what each token adds."""
    ends = written[0]
    for keeps, adds in zip(decay.unbind()[1:], written.unbind()[1:], strict=True):
        ends = torch.addcmul(adds, keeps, ends)
    states = [first]
    for keeps, adds in zip(whole.unbind(), ends.unbind(), strict=True):
        states.append(torch.addcmul(adds, keeps, states[-1]))
    return torch.stack(states[:-1]), states[-1]


def _run(decay: torch.Tensor, written: torch.Tensor, before: torch.Tensor) -> None:
    """Turns what each token adds into the state after it."""
    for keeps, state in zip(decay.unbind(), written.unbind(), strict=True):
        before = state.addcmul_(keeps, before)


def _run_back(decay: torch.Tensor, grads: torch.Tensor, whole: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Turns the gradients that outputs send to the states into all that reaches them; returns what leaves at the start.

    `last` (B, G, N, J) comes from after the last chunk.
    """
    flows = grads[-1] * decay[-1]
    for keeps, grad in zip(reversed(decay.unbind()[:-1]), reversed(grads.unbind()[:-1]), strict=True):
        flows.add_(grad).mul_(keeps)
    after = [last]
    for keeps, flow in zip(reversed(whole.unbind()), reversed(flows.unbind()), strict=True):
        after.append(torch.addcmul(flow, keeps, after[-1]))
    grads[-1].add_(torch.stack(after[-2::-1]))
    later = grads[-1]
    for keeps, grad in zip(reversed(decay.unbind()[1:]), reversed(grads.unbind()[:-1]), strict=True):
        later = grad.addcmul_(keeps, later)
    return after[-1]


def _initial(
    state: torch.Tensor | None, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The incoming (B, I, N) state, zeros where there is none."""
    if x.shape[-1] % B.shape[2]:
        raise ValueError(f"{B.shape[2]} groups do not divide {x.shape[-1]} channels")
    shape = (len(x), *A.shape)
    if state is None:
        return torch.zeros(shape, device=x.device, dtype=dtype)
    if state.shape != shape:
        raise ValueError(f"state has shape {tuple(state.shape)}, expected (B, I, N) = {shape}")
    return state.to(dtype)


OP = Op("selective_scan", recurrent, chunked, step)
