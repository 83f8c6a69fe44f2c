"""What the one-token forms share. All of it writes into memory that is already there.

Autocast leaves in-place operations and those with `out=` alone, so nothing here has to switch it off.
"""

from __future__ import annotations

import torch


def in_dtype(dtype: torch.dtype, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The inputs in the dtype of the state; copies only where it is another one."""
    return [x if x.dtype == dtype else x.to(dtype) for x in inputs]


def folded(count: int, dtype: torch.dtype, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Inputs (B, 1, H, d) or (B, 1, H) as (count = B * H, 1, d or 1) in the dtype of the state; copied only if need be.

    On folded tensors one token takes the fewest calls, and calls are what one token of one row costs.
    """
    return [(x if x.dtype == dtype else x.to(dtype)).reshape(count, 1, -1) for x in inputs]


def decay_state(state: torch.Tensor, g: torch.Tensor, scratch: torch.Tensor) -> None:
    """Multiply a state (B, H, dk, dv) by e^g, with g (B, 1, H) or (H,). `scratch` (B, 1, H, dv) is overwritten."""
    decay = scratch.view(-1)[: g.numel()].copy_(g.reshape(-1)).exp_()
    state.mul_(decay.view(-1, state.shape[1], 1, 1))


def read_state(q: torch.Tensor, state: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """q^T S into `out`: q (B, 1, H, dk), state (B, H, dk, dv), out (B, 1, H, dv), the last two contiguous."""
    flat = state.flatten(0, 1)
    torch.bmm(q.reshape(len(flat), 1, -1), flat, out=out.view(len(flat), 1, -1))
    return out
