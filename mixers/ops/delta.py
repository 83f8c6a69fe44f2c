"""What kernels of `segmented` share that write by a delta rule: each token writes what its key does not yet recall.

Within a chunk with incoming state Z (d, dv), and with whatever decays the recurrence has in its factors:
    y = V - Kin Z - a (beta y)      what is missing; a strictly lower triangular
    O = Qin Z + P (beta y)          what is read
    Z' = carry Z + Kout^T (beta y)  what is handed on
so y = T (V - Kin Z) with T = (I + a diag(beta))^-1: one small inverse per chunk, products, and a walk of the state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Factors(NamedTuple):
    """The factors of M = N * B * H chunks, or their gradients.

    Attributes:
        a: (M, C, C), what a token's key recalls of what earlier tokens wrote; 0 on and above the diagonal.
        beta: (M, C, 1) write strength.
        P: (M, C, C), what a token reads of what it and earlier tokens wrote; 0 above the diagonal.
        V: (M, C, dv) values.
        Kin: (M, C, d), with what a key recalls the incoming state.
        Qin: (M, C, d), with what a query reads the incoming state.
        Kout: (M, C, d), with what a write reaches the outgoing state.
        carry: (M, 1 or d, 1), what is left of each row of the incoming state in the outgoing one; or (M, 2, 2), how its
            two halves mix.
    """

    a: torch.Tensor
    beta: torch.Tensor
    P: torch.Tensor
    V: torch.Tensor
    Kin: torch.Tensor
    Qin: torch.Tensor
    Kout: torch.Tensor
    carry: torch.Tensor


def delta_forward(x: Factors, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs (M, C, dv), the state (B * H, d, dv) after the last chunk; for the backward T and the states before."""
    eye = torch.eye(x.a.shape[-1], dtype=x.a.dtype, device=x.a.device)
    T = torch.linalg.solve_triangular(x.a * x.beta.mT, eye.expand_as(x.a), upper=False, unitriangular=True)
    T_ = T * x.beta
    alone, recalled = torch.bmm(T_, x.V), torch.bmm(T_, x.Kin)
    states, writes, size = [first], [], len(first)
    for write, recall, Kout, carry in zip(*(y.split(size) for y in (alone, recalled, x.Kout, x.carry)), strict=True):
        writes.append(torch.baddbmm(write, recall, states[-1], alpha=-1))
        states.append(_carried(carry, states[-1]).baddbmm_(Kout.mT, writes[-1]))
    last, before = states.pop(), torch.cat(states)
    return torch.bmm(x.P, torch.cat(writes)).baddbmm_(x.Qin, before), last, T, before


def delta_backward(
    x: Factors, T: torch.Tensor, before: torch.Tensor, grad: torch.Tensor, flow: torch.Tensor
) -> tuple[Factors, torch.Tensor, torch.Tensor]:
    """Gradients of the factors (but of `carry`: those of the rows or halves, undivided) and of the incoming state.

    Args:
        x: the factors again. T, before: from `delta_forward`.
        grad: (M, C, dv) gradient of the outputs. flow: (B * H, d, dv) that of the last state.

    Returns:
        The gradients, all of them also where a factor is 0 by construction; `carry` holds the (M, d, dv) gradients of
        the states after each chunk. Then the gradient of the incoming state, and what was written, (M, C, dv).
    """
    y = torch.bmm(T, torch.baddbmm(x.V, x.Kin, before, alpha=-1))
    u = y * x.beta
    du = torch.bmm(x.P.mT, grad)
    asked = torch.bmm(x.Qin.mT, grad)
    T_ = T * x.beta
    alone, reached = torch.bmm(T_.mT, du), torch.bmm(T_.mT, x.Kout)
    flows, dV, size = [flow], [], len(flow)
    walk = zip(*(reversed(part.split(size)) for part in (alone, reached, asked, x.Kin, x.carry)), strict=True)
    for own, reach, ask, Kin, carry in walk:
        dV.append(torch.baddbmm(own, reach, flows[-1]))
        flows.append(_carried(carry.mT, flows[-1]).add_(ask).baddbmm_(Kin.mT, dV[-1], alpha=-1))
    first, after, w = flows.pop(), torch.cat(flows[::-1]), torch.cat(dV[::-1])
    du.baddbmm_(x.Kout, after)
    found = Factors(
        a=torch.bmm(w, u.mT).neg_(),
        beta=(y * du.baddbmm_(x.a.mT, w, alpha=-1)).sum(-1, keepdim=True),
        P=torch.bmm(grad, u.mT),
        V=w,
        Kin=torch.bmm(w, before.mT).neg_(),
        Qin=torch.bmm(grad, before.mT),
        Kout=torch.bmm(u, after.mT),
        carry=after,
    )
    return found, first, u


def _carried(carry: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    if carry.shape[-1] == 1 or carry.shape[-2] == 1:
        return state * carry.reshape(len(carry), -1, 1)
    return torch.bmm(carry, state.reshape(len(state), 2, -1)).view(state.shape)
