"""Both our forms against other projects' own references in plain torch: fla's naive functions and mamba-ssm's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from relinear.mixers.ops import check
from relinear.mixers.ops.fused import Call
from relinear.mixers.ops.op import Op

pytestmark = pytest.mark.kernels

LENGTH = 64  # two of fla's naive chunks; some of them take nothing else
CPU = Call("cpu", torch.float32, 3, 16, 24, "train", state=True)


def naive(path: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"fla.ops.{path}"), name)


def head_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def scaled(path: str, name: str) -> Callable[..., Any]:
    """Functions that take a scale."""

    def run(*inputs, state, **more):
        return naive(path, name)(*inputs, scale=1.0, initial_state=state, output_final_state=True, **more)

    return run


def gla(q, k, v, g, state):
    return naive("gla.naive", "naive_recurrent_gla")(q * q.shape[-1] ** 0.5, k, v, g, state, True)


def gated_delta_steps(q, k, v, g, beta, state):
    return scaled("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule")(q, k, v, beta, g, state=state)


def dplr(name):
    """RWKV-7 in the general form: a is -kappa, b is a * kappa."""

    def run(r, w, k, v, kappa, a, state):
        parts = head_first(r * r.shape[-1] ** 0.5, k, v, -kappa, kappa * a, w)
        out, last = naive("generalized_delta_rule.dplr.naive", name)(*parts, initial_state=state)
        return out.transpose(1, 2), last

    return run


NAIVE = {
    ("simple_gla", "steps"): scaled("simple_gla.naive", "naive_recurrent_simple_gla"),
    ("simple_gla", "chunks"): scaled("simple_gla.naive", "naive_chunk_simple_gla"),
    ("gla", "steps"): gla,
    ("gated_delta", "steps"): gated_delta_steps,
    ("gated_delta", "chunks"): scaled("gated_delta_rule.naive", "naive_chunk_gated_delta_rule"),
    ("kda", "steps"): scaled("kda.naive", "naive_recurrent_kda"),
    ("kda", "chunks"): scaled("kda.naive", "naive_chunk_kda"),
    ("rwkv7", "steps"): dplr("dplr_recurrence"),
    ("rwkv7", "chunks"): dplr("dplr_chunkwise"),
}


def agree(op: Op, reference: Callable[..., Any], call: Call, limit: float, learnable_state: bool = True) -> None:
    """Both of our forms give what `reference` gives, forward and backward, to `limit`."""
    inputs = check.sample(op.name, call, 2, LENGTH)
    state = check.sample_state(op.name, call, 2) if call.state else None
    expected = check.results(reference, inputs, state, True, learnable_state)
    for form in (op.recurrent, op.chunked):
        found = check.results(form, inputs, state, True, learnable_state)
        errors = check.errors(found, expected)
        assert max(errors.values()) < limit, errors


@pytest.mark.parametrize(("name", "form"), NAIVE)
def test_fla(name, form):
    op = import_module(f"relinear.mixers.ops.{name}").OP
    agree(op, NAIVE[name, form], CPU, 1e-5)


@pytest.mark.parametrize("chunks", [False, True], ids=["steps", "chunks"])
def test_fla_delta_rule(chunks):
    """DeltaNet: the gated rule without decays."""
    op = import_module("relinear.mixers.ops.gated_delta").OP

    def plain(form):
        return lambda q, k, v, g, beta, **where: form(q, k, v, None, beta + 0 * g, **where)

    def reference(q, k, v, g, beta, state):
        parts = head_first(q * q.shape[-1] ** 0.5, k, v, beta + 0 * g)
        if chunks:
            out, last = naive("delta_rule.naive", "delta_rule_chunkwise")(*parts)
        else:
            out, last = naive("delta_rule.naive", "delta_rule_recurrence")(*parts, initial_state=state)
        return out.transpose(1, 2), last

    call = CPU._replace(state=not chunks)
    agree(Op(op.name, plain(op.recurrent), plain(op.chunked), op.step), reference, call, 1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_mamba_ssm_selective_scan(mamba_ssm, groups):
    """Its reference starts from nothing and gives the state after the last token."""
    op = import_module("relinear.mixers.ops.selective_scan").OP
    scan = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref

    def reference(x, dt, A, B, C, state):
        out, last = scan(x.mT, dt.mT, A, B.movedim(1, -1), C.movedim(1, -1), return_last_state=True)
        return out.mT, last

    agree(op, reference, CPU._replace(heads=groups, state=False), 1e-5)


def test_mamba_ssm_scan_with_decays_per_head(mamba_ssm):
    """Mamba-2 (SSD): dt A is the log-decay, dt x the value."""
    op = import_module("relinear.mixers.ops.simple_gla").OP
    reference = import_module("mamba_ssm.ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
    q, k, v, g = check.sample("simple_gla", CPU, 2, LENGTH)
    rates = torch.tensor([-0.5, -1.0, -4.0])
    steps = g / rates
    expected = reference(v, steps, rates, k, q, 16)
    for form in (op.recurrent, op.chunked):
        found, _ = form(q, k, v * steps[..., None], g)
        assert check.errors({"output": found}, {"output": expected})["output"] < 1e-5


@pytest.mark.parametrize("groups", [1, 3])
def test_mamba_ssm_decoding(mamba_ssm, groups):
    """Mamba-1's step, token by token; its reference overwrites the state, as ours does."""
    op = import_module("relinear.mixers.ops.selective_scan").OP
    update = import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update_ref
    call = CPU._replace(heads=groups)
    x, dt, A, B, C = check.sample("selective_scan", call, 2, 5)
    ours = check.sample_state("selective_scan", call, 2)
    size = (2, groups, 24 // groups)
    theirs = ours.clone().view(*size, 16)
    for t in range(5):
        here = slice(t, t + 1)
        found = op.step(x[:, here], dt[:, here], A, B[:, here], C[:, here], ours)
        rates = A.view(groups, -1, 16)
        expected = update(theirs, x[:, t].reshape(size), dt[:, t].reshape(size), rates, B[:, t], C[:, t])
        assert torch.allclose(found[:, 0], expected.reshape(2, 24), atol=1e-5)
        assert torch.allclose(ours, theirs.view_as(ours), atol=1e-5)
