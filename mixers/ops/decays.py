"""What kernels of `segmented` share: decays of one number per head and token, and the walk of the state over chunks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .chunks import Borders


class Decays(NamedTuple):
    """Decays of M = N * B * H chunks, with what document borders cut off already at 0.

    Attributes:
        pairs: (M, C, C) from token j to token i, 0 for j > i.
        inflow: (M, C, 1) of the incoming state at each token.
        outflow: (M, C, 1) from each token to the end of the chunk.
        carry: (M, 1, 1) of the incoming state over the whole chunk.
    """

    pairs: torch.Tensor
    inflow: torch.Tensor
    outflow: torch.Tensor
    carry: torch.Tensor


LOG2E = math.log2(math.e)


def bounded_exp2(x: torch.Tensor, highest: float | None = None) -> torch.Tensor:
    """2^x, in place, of at least 2^-125.5 (2^-1010 in fp64).

    That is nothing beside 1, but no subnormal number: CPUs take these twenty times as long.
    """
    return x.clamp_(-125.5 if x.dtype == torch.float32 else -1010.0, highest).exp2_()


def bounded_exp(x: torch.Tensor, highest: float | None = None) -> torch.Tensor:
    """The same of e^x: CPUs take two to four times as long for exp itself."""
    return bounded_exp2(x.mul_(LOG2E), None if highest is None else highest * LOG2E)


def scalar_decays(g: torch.Tensor, k: torch.Tensor, border: Borders | None) -> Decays:
    """Decays of log-decays (M, C), or of (H,) that are the same at every token. k: (M, C, dk).

    Sums of log-decays are kept in fp64: a small difference of two large ones must be right as well.
    """
    chunks, chunk, _ = k.shape
    each = g[:, None].expand(-1, chunk) if g.dim() == 1 else g
    G = each.double().cumsum(-1)
    pairs = bounded_exp((G[:, :, None] - G[:, None, :]).to(k.dtype), 0.0).tril_()
    inflow, outflow = (bounded_exp(x.to(k.dtype)).unsqueeze(-1) for x in (G, G[:, -1:] - G))
    carry = inflow[:, -1:]
    if g.dim() == 1:
        pairs, inflow, outflow, carry = (x.repeat(chunks // len(g), 1, 1) for x in (pairs, inflow, outflow, carry))
    if border is None:
        return Decays(pairs, inflow, outflow, carry)
    return Decays(pairs * border.pairs, inflow * border.sees, outflow * border.leaves, carry * border.carries)


def scalar_decay_gradient(
    pairs: torch.Tensor, read: torch.Tensor, sent: torch.Tensor, held: torch.Tensor
) -> torch.Tensor:
    """Gradient of the log-decays (M, C).

    Every product that enters a result carries a decay e^(G_i - G_j): its share, value times gradient, counts for
    every step from j + 1 to i.

    Args:
        pairs: (M, C, C) shares of the products of token i with token j. Overwritten. A token's own pair has no decay.
        read: (M, C) shares of what each token reads in the incoming state.
        sent: (M, C) shares of what each token hands on to the outgoing state. Overwritten.
        held: (M,) shares of what is left of the incoming state in the outgoing one.
    """
    sent[:, -1] = 0.0  # what the last token hands on has no decay
    dG = pairs.tril_(-1).sum(2).sub_(pairs.sum(1)).add_(read).sub_(sent)
    dG[:, -1] += held + sent.sum(1)
    return dG.flip(1).cumsum(1).flip(1)


class ChannelDecays(NamedTuple):
    """Decays per channel of M = N * B * H chunks, relative to the middle m of each, which has cumulated log-decay G_m.

    A product of token i with token j <= i takes q_i * left_i and k_j * right_j. Log-decays in [-5, 0] and chunks of 32
    keep both below e^80. Products with j > i may overflow: discard them before anything else.

    Attributes:
        left: (M, C, dk) e^(G - G_m). right: (M, C, dk) e^(G_m - G).
        inflow: (M, 1 or C, dk), turns `left` into the decay of the incoming state at each token.
        outflow: (M, 1 or C, dk), turns `right` into the decay from each token to the end of the chunk.
        carry: (M, dk, 1) of the incoming state over the whole chunk.
    """

    left: torch.Tensor
    right: torch.Tensor
    inflow: torch.Tensor
    outflow: torch.Tensor
    carry: torch.Tensor


def channel_decays(g: torch.Tensor, border: Borders | None) -> ChannelDecays:
    """Decays of log-decays (M, C, dk); what document borders cut off is 0 in all but `left` and `right`."""
    # In powers of 2, from the start: both sides of a product then see the same rounded log-decays.
    G = (g * LOG2E).cumsum(1)
    middle = G[:, (G.shape[1] - 1) // 2, None]
    carry, outflow, inflow = G[:, -1].unsqueeze(-1).clone(), G[:, -1:] - middle, middle.clone()
    left = (G - middle).exp2_()
    inflow, outflow, carry = (bounded_exp2(x) for x in (inflow, outflow, carry))
    if border is not None:
        inflow, outflow, carry = inflow * border.sees, outflow * border.leaves, carry * border.carries
    return ChannelDecays(left, left.reciprocal(), inflow, outflow, carry)


def seen(scores: torch.Tensor, border: Borders | None) -> torch.Tensor:
    """Scores (M, C, C) with those between documents at 0. Overwrites them."""
    return scores if border is None else scores.mul_(border.pairs)


def states_before(written: torch.Tensor, carry: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk over the chunks: S_{n+1} = carry_n * S_n + written_n.

    Args:
        written: (N * B * H, dk, dv). carry: (N * B * H, 1 or dk, 1). first: (B * H, dk, dv).

    Returns:
        (N * B * H, dk, dv) states before each chunk, and the (B * H, dk, dv) state after the last.
    """
    states = [first]
    for add, keep in zip(written.split(len(first)), carry.split(len(first)), strict=True):
        states.append(torch.addcmul(add, states[-1], keep))
    last = states.pop()
    return torch.cat(states), last


def flows_after(read: torch.Tensor, carry: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The walk of the gradients, from the last chunk to the first: F_n = carry_n * F_{n+1} + read_n.

    Args:
        read: (N * B * H, dk, dv), what each chunk's output asks of its incoming state. carry: as in `states_before`.
        last: (B * H, dk, dv), the gradient of the state after the last chunk.

    Returns:
        (N * B * H, dk, dv) gradients of the states after each chunk, and that of the state before the first.
    """
    flows = [last]
    for add, keep in zip(reversed(read.split(len(last))), reversed(carry.split(len(last))), strict=True):
        flows.append(torch.addcmul(add, flows[-1], keep))
    first = flows.pop()
    return torch.cat(flows[::-1]), first
