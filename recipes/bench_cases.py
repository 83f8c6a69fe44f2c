"""What `bench ops` compares: for each baseline the inputs, our form of the recurrence, and theirs.

Both sides start from the same numbers and do the same work, the scaling of queries and the activation of gates
included. Each gets its inputs in the layout that it wants: bringing them there is not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid, normalize

from . import bench_baselines as baselines

Tensors = tuple[torch.Tensor, ...]
MAMBA_STATE = 16  # Mamba-1's own


class Shape(NamedTuple):
    """Rows, tokens, heads, and the width of a head's keys and values."""

    batch: int
    length: int
    heads: int
    dim: int


def same(*inputs: torch.Tensor) -> Tensors:
    """Inputs in our own layout, (B, T, H, ...)."""
    return inputs


def heads_first(*inputs: torch.Tensor) -> Tensors:
    """(B, T, H, ...) -> (B, H, T, ...), each lying in memory in that order."""
    return tuple(x.transpose(1, 2).contiguous() for x in inputs)


def tokens_first(out: torch.Tensor) -> torch.Tensor:
    """(B, H, T, d) -> (B, T, H, d)."""
    return out.transpose(1, 2)


class Case(NamedTuple):
    """One comparison.

    Attributes:
        inputs: tensors in our layout; those with a gradient require it.
        ours: our output from them.
        theirs: the baseline's output from `prepare(*inputs)`.
        prepare: moves inputs into the baseline's layout: a permutation or concatenation, nothing else, so that it also
            carries our gradients to theirs. Not timed.
        restore: the baseline's output in our layout. Not timed.
    """

    inputs: Tensors
    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., torch.Tensor]
    prepare: Callable[..., Tensors] = same
    restore: Callable[[torch.Tensor], torch.Tensor] = lambda out: out


class _Draw:
    """Random inputs of one shape, always the same ones."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *last: int) -> torch.Tensor:
        """(B, T, *last)."""
        return torch.randn(*self.shape[:2], *last, generator=self._generator)

    def vectors(self) -> torch.Tensor:
        """(B, T, H, d), normal."""
        return self.normal(self.shape.heads, self.shape.dim)

    def units(self) -> torch.Tensor:
        """(B, T, H, d) of unit length."""
        return normalize(self.vectors(), dim=-1)

    def decay(self, *last: int) -> torch.Tensor:
        """(B, T, H, *last) log-decays, mostly between -1 and 0: e^g has its median at 0.88."""
        return logsigmoid(self.normal(self.shape.heads, *last) + 2)

    def share(self) -> torch.Tensor:
        """(B, T, H) in (0, 1)."""
        return self.normal(self.shape.heads).sigmoid()


def _simple_gla(draw: _Draw) -> Tensors:
    return draw.vectors(), draw.units(), draw.vectors(), draw.decay()


def _gla(draw: _Draw) -> Tensors:
    return draw.vectors(), draw.units(), draw.vectors(), draw.decay(draw.shape.dim)


def _gated_delta(draw: _Draw) -> Tensors:
    return draw.units(), draw.units(), draw.vectors(), draw.decay(), draw.share()


def _kda(draw: _Draw) -> Tensors:
    return draw.units(), draw.units(), draw.vectors(), draw.decay(draw.shape.dim), draw.share()


def _rwkv7(draw: _Draw) -> Tensors:
    w = -math.exp(-0.5) * draw.vectors().sigmoid()
    return draw.vectors(), w, draw.units(), draw.vectors(), draw.units(), draw.vectors().sigmoid()


def _mlstm(draw: _Draw) -> Tensors:
    return draw.vectors(), draw.vectors(), draw.vectors(), draw.normal(draw.shape.heads), draw.decay()


def _titans(draw: _Draw) -> Tensors:
    theta, eta, alpha = (draw.normal(draw.shape.heads).sub(2).sigmoid() for _ in range(3))
    return draw.units(), draw.units(), draw.vectors(), theta, eta, alpha


def _selective_scan(draw: _Draw) -> Tensors:
    channels = draw.shape.heads * draw.shape.dim
    A = -torch.arange(1.0, MAMBA_STATE + 1).expand(channels, -1).contiguous()
    dt = torch.nn.functional.softplus(draw.normal(channels) - 3)
    return draw.normal(channels), dt, A, draw.normal(1, MAMBA_STATE), draw.normal(1, MAMBA_STATE)


# The inputs of every op, in the order of its arguments.
INPUTS: dict[str, Callable[[_Draw], Tensors]] = {
    "simple_gla": _simple_gla,
    "gla": _gla,
    "gated_delta": _gated_delta,
    "kda": _kda,
    "rwkv7": _rwkv7,
    "mlstm": _mlstm,
    "titans": _titans,
    "selective_scan": _selective_scan,
}


def inputs(op: str, shape: Shape) -> Tensors:
    """Inputs of an op, each requiring a gradient."""
    return tuple(x.requires_grad_() for x in INPUTS[op](_Draw(shape)))


def _chunked(op: str) -> Callable[..., torch.Tensor]:
    """The chunked form's output, without the state."""
    chunked = baselines.ours(op).chunked
    return lambda *tensors: chunked(*tensors)[0]


def _scaled(op: str) -> Callable[..., torch.Tensor]:
    """The same with queries scaled first, as the baselines do inside."""
    chunked = _chunked(op)
    return lambda q, *rest: chunked(q * q.shape[-1] ** -0.5, *rest)


def _first(call: Callable[..., Any], **options: Any) -> Callable[..., torch.Tensor]:
    return lambda *tensors: call(*tensors, **options)[0]


def _qwen3_next(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.fallback("qwen3_next", "torch_chunk_gated_delta_rule")
    return Case(inputs("gated_delta", shape), _scaled("gated_delta"), _first(theirs))


def _fla_gated_delta(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.naive(root, "gated_delta_rule/naive", "naive_chunk_gated_delta_rule")
    return Case(inputs("gated_delta", shape), _scaled("gated_delta"), _first(theirs))


def _fla_delta(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.naive(root, "delta_rule/naive", "delta_rule_chunkwise")
    q, k, v, _, beta = inputs("gated_delta", shape)
    scaled = _scaled("gated_delta")
    return Case((q, k, v, beta), lambda q, k, v, b: scaled(q, k, v, None, b), _first(theirs), heads_first, tokens_first)


def _mamba2(shape: Shape, root: Path | None, chunk: int | None = None) -> Case:
    """In chunks of transformers' default, 256 tokens, or of `chunk`."""
    theirs = baselines.fallback("mamba2", "mamba2_chunk_scan")
    chunk = chunk or baselines.default("mamba2", "Mamba2Config", "chunk_size")
    simple_gla = _chunked("simple_gla")
    draw = _Draw(shape)
    x, dt = draw.vectors(), torch.nn.functional.softplus(draw.normal(shape.heads) - 3)
    A = -torch.linspace(1, 16, shape.heads)
    tensors = tuple(t.requires_grad_() for t in (x, dt, A, draw.vectors(), draw.vectors()))
    return Case(
        tensors,
        lambda x, dt, A, B, C: simple_gla(C, B, x * dt[..., None], dt * A),
        lambda x, dt, A, B, C: theirs(x, dt, A, B, C, chunk),
    )


def _minimax(shape: Shape, root: Path | None) -> Case:
    module = baselines.lightning(shape.heads, shape.dim)
    simple_gla = _chunked("simple_gla")
    decay = -module.slope_rate.flatten()
    return Case(
        inputs("simple_gla", shape)[:3],
        lambda q, k, v: simple_gla(q, k, v, decay),
        lambda qkv: module(qkv, None, None)[0],
        lambda q, k, v: (torch.cat([q, k, v], -1).flatten(2),),
        lambda out: out.unflatten(-1, (shape.heads, shape.dim)),
    )


def _fla_simple_gla(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.naive(root, "simple_gla/naive", "naive_chunk_simple_gla")
    return Case(inputs("simple_gla", shape), _scaled("simple_gla"), _first(theirs))


def _fla_linear(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.naive(root, "linear_attn/naive", "naive_chunk_linear_attn")
    scaled, decay = _scaled("simple_gla"), torch.zeros(shape.heads)
    return Case(inputs("simple_gla", shape)[:3], lambda q, k, v: scaled(q, k, v, decay), theirs)


def _fla_gla(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.naive(root, "gla/naive", "naive_recurrent_gla")
    return Case(inputs("gla", shape), _scaled("gla"), _first(theirs))


def _kimi(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.fallback("kimi_linear", "chunk_kimi_delta_attention")
    return Case(inputs("kda", shape), _scaled("kda"), _first(theirs))


def _fla_kda(shape: Shape, root: Path | None) -> Case:
    return Case(inputs("kda", shape), _scaled("kda"), _first(baselines.naive(root, "kda/naive", "naive_chunk_kda")))


def _fla_dplr(shape: Shape, root: Path | None) -> Case:
    """fla has no naive form of RWKV-7's op; its diagonal-plus-low-rank form takes a = -kappa and b = a kappa."""
    theirs = baselines.naive(root, "generalized_delta_rule/dplr/naive", "dplr_chunkwise")
    rwkv7 = _chunked("rwkv7")

    def dplr(r: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kappa: torch.Tensor, a: torch.Tensor):
        return theirs(r, k, v, -kappa, kappa * a, w)[0]

    def ours(r: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return rwkv7(r * shape.dim**-0.5, *rest)

    return Case(inputs("rwkv7", shape), ours, dplr, heads_first, tokens_first)


def _xlstm(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.fallback("xlstm", "mlstm_chunkwise_native_autograd")
    scaled = _scaled("mlstm")
    draw = _Draw(shape)
    *qkv, gate, _ = _mlstm(draw)
    forget = draw.normal(shape.heads) + 2
    return Case(
        tuple(t.requires_grad_() for t in (*qkv, gate, forget)),
        lambda q, k, v, i, f: scaled(q, k, v, i, logsigmoid(f)),
        # eps is their guard against dividing by nothing; at zero both sides compute the paper's equation.
        lambda *tensors: theirs(*tensors, eps=0.0),
        heads_first,
        tokens_first,
    )


def _mamba(shape: Shape, root: Path | None) -> Case:
    theirs = baselines.fallback("mamba", "mamba_selective_scan")

    def prepare(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> Tensors:
        return x.mT.contiguous(), dt.mT.contiguous(), A, B.squeeze(2).mT.contiguous(), C.squeeze(2).mT.contiguous()

    return Case(inputs("selective_scan", shape), _chunked("selective_scan"), theirs, prepare, lambda out: out.mT)


# (op, baseline) -> the comparison at a shape, given the folder of fla's ops or None.
CASES: dict[tuple[str, str], Callable[[Shape, Path | None], Case]] = {
    ("simple_gla", "transformers mamba2"): _mamba2,
    # Its default costs a CPU 2 to 3 times its best chunk length; at 2k tokens the others' cost at most a sixth more.
    ("simple_gla", "transformers mamba2, chunk 64"): partial(_mamba2, chunk=64),
    ("simple_gla", "transformers minimax"): _minimax,
    ("simple_gla", "fla naive_chunk_simple_gla"): _fla_simple_gla,
    ("simple_gla", "fla naive_chunk_linear_attn"): _fla_linear,
    ("gla", "fla naive_recurrent_gla"): _fla_gla,
    ("gated_delta", "transformers qwen3_next"): _qwen3_next,
    ("gated_delta", "fla naive_chunk_gated_delta_rule"): _fla_gated_delta,
    ("gated_delta", "fla delta_rule_chunkwise"): _fla_delta,
    ("kda", "transformers kimi_linear"): _kimi,
    ("kda", "fla naive_chunk_kda"): _fla_kda,
    ("rwkv7", "fla dplr_chunkwise"): _fla_dplr,
    ("mlstm", "transformers xlstm"): _xlstm,
    ("selective_scan", "transformers mamba"): _mamba,
}


def alone(op: str, shape: Shape) -> tuple[Tensors, Callable[..., torch.Tensor]]:
    """Inputs of an op and its chunked form, compared with nothing."""
    return inputs(op, shape), _chunked(op)
