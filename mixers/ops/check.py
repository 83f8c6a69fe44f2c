"""A kernel against the step-by-step form of its recurrence, on the device where it will run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import logsigmoid, normalize

from .fused import Call
from .op import Op

LENGTH = 67
"""Tokens of a check of the chunk kernels: more than one chunk, and no multiple of any."""

LIMITS = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest error that passes, by dtype: TF32 keeps 10 bits of fp32's factors, fp16 10 and bf16 7. A wrong sign, scale
or layout gives errors near 1."""


def sample(op: str, call: Call, batch: int = 1, length: int = LENGTH, seed: int = 0) -> list[torch.Tensor]:
    """Random inputs of a recurrence, in the shapes of `call` and within the bounds that its file states.

    Args:
        op: a key of `fused.KERNELS`.

    Returns:
        fp32 tensors on the CPU, but for those that go into kernels in the dtype of the values.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(batch, length, *size, generator=generator)

    if op == "selective_scan":
        channels, size = call.value, call.key
        rates = -torch.rand(channels, size, generator=generator) - 0.05
        B, C = draw(call.heads, size), draw(call.heads, size)
        return [draw(channels).to(call.dtype), draw(channels).sigmoid(), rates, B.to(call.dtype), C.to(call.dtype)]
    q = (draw(call.heads, call.key) * call.key**-0.5).to(call.dtype)
    k = normalize(draw(call.heads, call.key), dim=-1).to(call.dtype)
    v = draw(call.heads, call.value).to(call.dtype)
    if op == "simple_gla":
        return [q, k, v, logsigmoid(draw(call.heads))[0, 0] if call.fixed else logsigmoid(draw(call.heads))]
    gates = draw(call.heads, call.key).sigmoid()
    if op == "rwkv7":
        kappa = normalize(draw(call.heads, call.key), dim=-1)
        return [q, -0.6065 * gates, k, v, kappa.to(call.dtype), draw(call.heads, call.key).sigmoid().to(call.dtype)]
    decays = gates.log().clamp(min=-5.0)
    if op == "gla":
        return [q, k, v, decays]
    g = logsigmoid(draw(call.heads)) if op == "gated_delta" else decays
    return [q, k, v, g, draw(call.heads).sigmoid()]


def sample_state(op: str, call: Call, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """A random fp32 state of a recurrence, in the shapes of `call`."""
    size = (call.value, call.key) if op == "selective_scan" else (call.heads, call.key, call.value)
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed)) * 0.3


def results(
    form: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    state: torch.Tensor | None,
    gradients: bool,
    learnable_state: bool = True,
    **where: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Output, last state and, with `gradients`, the gradient of every input, all of a fixed random loss.

    Args:
        form: called as `form(*inputs, state=, padding=, segments=)`.
        learnable_state: the loss depends on the last state.
        where: padding and segments.
    """
    inputs = [x.detach().clone().requires_grad_(gradients) for x in inputs]
    state = None if state is None else state.detach().clone().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        out, last = form(*inputs, state=state, **where)
    found = {"output": out.detach(), "state": last.detach()}
    if gradients:
        generator = torch.Generator().manual_seed(2)
        loss = out.new_zeros((), dtype=torch.float64)
        for part in (out, last) if learnable_state else (out,):
            weights = torch.randn(part.shape, generator=generator).to(part.device)
            loss = loss + (part.double() * weights).sum()
        leaves = {f"gradient {i}": x for i, x in enumerate(inputs)}
        leaves |= {} if state is None else {"gradient of the state": state}
        found |= dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return found


def errors(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the difference over norm of the truth, result by result; infinite where a result is not finite.

    A truth of zeros counts as one of tenths: some gradients vanish, such as that of the first decay of all.
    """
    return {name: _error(found[name].double(), exact.double()) for name, exact in truth.items()}


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    if not found.isfinite().all():
        return float("inf")
    return float((found - exact).norm()) / max(float(exact.norm()), 0.1 * exact.numel() ** 0.5)


def deviation(op: Op, kernel: Callable[..., Any], call: Call, device: torch.device) -> dict[str, float]:
    """Errors of a kernel against `op.recurrent` in fp64, at a short odd length; with gradients in mode `train`."""
    length = 3 if call.mode == "decode" else LENGTH
    inputs = [x.to(device) for x in sample(op.name, call, length=length)]
    state = sample_state(op.name, call).to(device) if call.state else None
    gradients = call.mode == "train"
    learnable = op.name != "selective_scan"
    with torch.autocast(device.type, enabled=False):
        found = results(kernel, inputs, state, gradients, learnable)
        wide = None if state is None else state.double()
        truth = results(op.recurrent, [x.double() for x in inputs], wide, gradients, learnable)
    return errors(found, truth)


def verdict(op: Op, kernel: Callable[..., Any], call: Call, device: torch.device) -> tuple[bool, str]:
    """Whether the kernel gives what `op.recurrent` gives on this device, and the largest error or what went wrong.

    In a thread of its own, so that the caller's inference mode, autocast and hooks on saved tensors (checkpointing
    counts those) have no part in it.
    """
    outcome: list[tuple[bool, str]] = []

    def work() -> None:
        try:
            found = deviation(op, kernel, call, device)
        except Exception as error:  # whatever a compiler, a driver or another version's arguments bring
            first = (str(error).strip().splitlines() or [""])[0]
            outcome.append((False, f"{type(error).__name__}: {first[:200]}"))
            return
        worst = max(found, key=lambda name: found[name])
        limit = LIMITS[call.dtype]
        outcome.append((found[worst] <= limit, f"largest error {found[worst]:.1e} ({worst}), limit {limit:.0e}"))

    thread = threading.Thread(target=work, name=f"check of {op.name}")
    thread.start()
    thread.join()
    return outcome[0]
