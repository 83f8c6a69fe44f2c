"""One decoded token: our `step`, which overwrites its state, beside what transformers does for one token on a CPU.

As in `bench_cases`, both sides start from the same numbers and do the same work, and each has its inputs and its state
in its own layout.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid, softplus

from ..distill.modeling.cache import CACHE
from ..eval.memory import allocated_bytes
from . import bench_baselines as baselines
from .bench_cases import MAMBA_STATE, Shape, Tensors, _Draw, inputs, same
from .bench_measure import TOLERANCE, relative_error, turns

STEPS = 16  # steps per turn and side: short turns, and many, so that a slow spell touches both sides
TURNS = 10  # turns here for each turn of a whole sequence


class Step(NamedTuple):
    """One comparison of a decode step.

    Attributes:
        inputs: of one token (T = 1), in our layout.
        state: ours, a tensor or a tuple of tensors.
        ours: (*inputs, state) -> output; overwrites the state, may overwrite inputs.
        theirs: (*prepared inputs, state) -> (output, next state).
        prepare: inputs in the baseline's layout. Not timed.
        prepare_state: our state in the baseline's layout, sharing no memory. Not timed.
        restore: the baseline's output in our layout. Not timed.
    """

    inputs: Tensors
    state: Any
    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., tuple[torch.Tensor, Any]]
    prepare: Callable[..., Tensors] = same
    prepare_state: Callable[[Any], Any] = lambda state: state.clone()
    restore: Callable[[torch.Tensor], torch.Tensor] = lambda out: out


def state(op: str, shape: Shape) -> Any:
    """A state of an op as it may stand in the middle of a text."""
    batch, _, heads, dim = shape
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    if op == "selective_scan":
        return normal(batch, heads * dim, MAMBA_STATE)
    matrix = normal(batch, heads, dim, dim)
    if op == "mlstm":
        return matrix, normal(batch, heads, dim), normal(batch, heads)
    if op == "titans":
        return matrix, normal(batch, heads, dim, dim) / 8
    return matrix


def _step(op: str) -> Callable[..., torch.Tensor]:
    return baselines.ours(op).step


def _scaled(op: str) -> Callable[..., torch.Tensor]:
    step = _step(op)
    return lambda q, *rest: step(q * q.shape[-1] ** -0.5, *rest)


def _one_token(*tensors: torch.Tensor) -> Tensors:
    """(B, 1, ...) -> (B, ...)."""
    return tuple(x.squeeze(1).clone() for x in tensors)


def _qwen3_next(shape: Shape) -> Step:
    theirs = baselines.fallback("qwen3_next", "torch_recurrent_gated_delta_rule")
    return _delta("gated_delta", shape, theirs)


def _kimi(shape: Shape) -> Step:
    return _delta("kda", shape, baselines.fallback("kimi_linear", "recurrent_kimi_delta_attention"))


def _delta(op: str, shape: Shape, theirs: Callable[..., Any]) -> Step:
    return Step(
        inputs(op, shape),
        state(op, shape),
        _scaled(op),
        lambda q, k, v, g, beta, S: theirs(q, k, v, g, beta, initial_state=S, output_final_state=True),
    )


def _mamba2(shape: Shape) -> Step:
    theirs = baselines.fallback("mamba2", "mamba2_selective_state_update")
    step = _step("simple_gla")
    draw = _Draw(shape)
    A = -torch.linspace(1, 16, shape.heads)
    dt = softplus(draw.normal(shape.heads) - 3)

    def other(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, S: torch.Tensor):
        return theirs(S, x, dt, decay, B, C), S

    # transformers' mixer expands A and dt over the channels before the call.
    decay = A[:, None, None].expand(-1, shape.dim, shape.dim)

    def prepare(*tensors: torch.Tensor) -> Tensors:
        x, dt, B, C = _one_token(*tensors)
        return x, dt[..., None].expand(-1, -1, shape.dim), B, C

    return Step(
        (draw.vectors(), dt, draw.vectors(), draw.vectors()),
        state("simple_gla", shape),
        lambda x, dt, B, C, S: step(C, B, x * dt[..., None], dt * A, S),
        other,
        prepare,
        lambda S: S.mT.contiguous(),
        lambda out: out.unsqueeze(1),
    )


def _minimax(shape: Shape) -> Step:
    module = baselines.lightning(shape.heads, shape.dim)
    step = _step("simple_gla")
    decay = -module.slope_rate.flatten()

    def other(qkv: torch.Tensor, cache: baselines.LightningCache):
        return module(qkv, None, None, **{CACHE: cache})[0], cache

    return Step(
        inputs("simple_gla", shape)[:3],
        state("simple_gla", shape),
        lambda q, k, v, S: step(q, k, v, decay.clone(), S),
        other,
        lambda q, k, v: (torch.cat([q, k, v], -1).flatten(2),),
        lambda S: baselines.LightningCache(S.clone()),
        lambda out: out.unflatten(-1, (shape.heads, shape.dim)),
    )


def _xlstm(shape: Shape) -> Step:
    theirs = baselines.fallback("xlstm", "mlstm_recurrent_step_native")
    step = _scaled("mlstm")
    draw = _Draw(shape)
    gates = draw.normal(shape.heads), draw.normal(shape.heads) + 2

    def prepare(*tensors: torch.Tensor) -> Tensors:
        q, k, v, i, f = _one_token(*tensors)
        return q, k, v, i[..., None], f[..., None]

    return Step(
        (draw.vectors(), draw.vectors(), draw.vectors(), *gates),
        state("mlstm", shape),
        lambda q, k, v, i, f, S: step(q, k, v, i, logsigmoid(f), S),
        lambda q, k, v, i, f, S: theirs(q, k, v, i, f, *S, eps=0.0),
        prepare,
        lambda S: (S[0].clone(), S[1].clone(), S[2][..., None].clone()),
        lambda out: out.unsqueeze(1),
    )


def _mamba(shape: Shape) -> Step:
    theirs = baselines.fallback("mamba", "mamba_selective_state_update")
    x, dt, A, B, C = inputs("selective_scan", shape)
    step = _step("selective_scan")

    def other(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, h: torch.Tensor):
        return theirs(h, x, dt, A, B.squeeze(1), C.squeeze(1)), h

    return Step(
        (x, dt, B, C),
        state("selective_scan", shape),
        lambda x, dt, B, C, h: step(x, dt, A, B, C, h),
        other,
        _one_token,
        restore=lambda out: out.unsqueeze(1),
    )


# (op, baseline) -> the comparison; a shape's length is 1.
STEP_CASES: dict[tuple[str, str], Callable[[Shape], Step]] = {
    ("simple_gla", "transformers mamba2"): _mamba2,
    ("simple_gla", "transformers minimax"): _minimax,
    ("gated_delta", "transformers qwen3_next"): _qwen3_next,
    ("kda", "transformers kimi_linear"): _kimi,
    ("mlstm", "transformers xlstm"): _xlstm,
    ("selective_scan", "transformers mamba"): _mamba,
}


def copied(value: Any) -> Any:
    """A tensor, or tuple of tensors, of its own memory."""
    return tuple(copied(item) for item in value) if isinstance(value, tuple) else value.detach().clone()


@torch.no_grad()
def compare_step(case: Step, repeats: int, seconds: float) -> dict[str, Any]:
    """Both sides of a decode step.

    Returns:
        {"error" (largest relative error of the output over `STEPS` steps from the same state), "agrees", "turns",
        "ratio" (theirs over ours within a turn: median, with the quartiles "ratio_low" and "ratio_high", as one
        interruption can be longer than a turn), "ours_us", "theirs_us" (medians, per step)}. A pair that does not agree
        has no more than the first two.
    """
    prepared = case.prepare(*case.inputs)
    mine, other = copied(case.state), case.prepare_state(copied(case.state))
    error = 0.0
    for _ in range(STEPS):
        out = case.ours(*copied(case.inputs), mine)
        found, other = case.theirs(*prepared, other)
        error = max(error, relative_error(case.restore(found), out))
    if error > TOLERANCE:
        return {"error": error, "agrees": False}
    fresh: list[Tensors] = []

    def ours() -> None:
        for tensors in fresh:
            case.ours(*tensors, mine)

    def theirs() -> None:
        nonlocal other
        for _ in range(STEPS):
            _, other = case.theirs(*prepared, other)

    def refresh() -> None:
        fresh[:] = [copied(case.inputs) for _ in range(STEPS)]  # a step may overwrite its inputs

    seen = turns([ours, theirs], repeats * TURNS, seconds, before=refresh)
    ratios = sorted(b / a for a, b in zip(*seen, strict=True))
    return {
        "error": error,
        "agrees": True,
        "turns": len(ratios),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[3 * len(ratios) // 4],
        "ours_us": statistics.median(seen[0]) * 1e6 / STEPS,
        "theirs_us": statistics.median(seen[1]) * 1e6 / STEPS,
    }


@torch.no_grad()
def step_alone(op: str, shape: Shape, repeats: int, seconds: float) -> dict[str, Any]:
    """One op's step, compared with nothing.

    Returns:
        {"ours_us" (median per step), "turns", "extra_bytes": what one step asks of torch's allocator beyond its output;
        a Python number in an expression takes 12}.
    """
    step, tensors, held = _step(op), tuple(x.detach() for x in inputs(op, shape)), copied(state(op, shape))
    out = step(*copied(tensors), held)
    prepared = copied(tensors)
    extra = allocated_bytes(lambda: step(*prepared, held)) - out.nbytes
    fresh: list[Tensors] = []

    def refresh() -> None:
        fresh[:] = [copied(tensors) for _ in range(STEPS)]

    (seen,) = turns([lambda: [step(*t, held) for t in fresh]], repeats * TURNS, seconds, before=refresh)
    return {"ours_us": statistics.median(seen) * 1e6 / STEPS, "turns": len(seen), "extra_bytes": extra}
