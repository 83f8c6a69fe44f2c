"""mamba-ssm's kernels against our step-by-step forms. Its selective scan is CUDA code: on a CPU its reference takes its
place, which tries the adaptor and not the kernel."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from relinear.mixers.ops import check, fused
from relinear.mixers.ops.fused import Call

pytestmark = pytest.mark.usefixtures("mamba_ssm")

CPU = Call("cpu", torch.float32, 2, 16, 24, "train")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.kernels),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def packed(batch: int, length: int) -> dict[str, Any]:
    fresh = torch.zeros(batch, length, dtype=torch.long)
    fresh[0, [5, 6, length // 2]] = 1
    fresh[1, [length - 1]] = 1
    padding = torch.ones(batch, length, dtype=torch.bool)
    padding[0, :3] = False
    padding[-1, -4:] = False
    padding[0, 20] = False
    return {"segments": fresh.cumsum(1) + 4, "padding": padding}


def compare(name, kernel, call, device, length, limit, learnable_state=True, **where):
    op = import_module(f"relinear.mixers.ops.{name}").OP
    inputs = [x.to(device) for x in check.sample(name, call, 2, length)]
    state = check.sample_state(name, call, 2).to(device) if call.state else None
    where = {key: x.to(device) for key, x in where.items()}
    gradients = call.mode == "train"
    found = check.results(kernel, inputs, state, gradients, learnable_state, **where)
    wide = None if state is None else state.double()
    exact = check.results(op.recurrent, [x.double() for x in inputs], wide, gradients, learnable_state, **where)
    errors = check.errors(found, exact)
    assert max(errors.values()) <= limit, errors
    return max(errors.values())


@pytest.fixture
def limit(device):
    return 1e-5 if device == "cpu" else check.LIMITS[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_mamba_fixed_decays(device, limit, measured):
    """Mamba-2's kernel, forward and backward: the rate is the decay and every step is one."""
    call = CPU._replace(fixed=True, state=True)
    plain = compare("simple_gla", fused.mamba_simple_gla, call, device, 67, limit)
    measured(max(plain, compare("simple_gla", fused.mamba_simple_gla, call, device, 67, limit, **packed(2, 67))))


@pytest.mark.parametrize("device", DEVICES)
def test_mamba_decays_per_token(device, limit, measured):
    """Forward only: the step is the decay, and values are divided by it."""
    call = CPU._replace(mode="prefill", state=True)
    plain = compare("simple_gla", fused.mamba_simple_gla, call, device, 67, limit)
    measured(max(plain, compare("simple_gla", fused.mamba_simple_gla, call, device, 67, limit, **packed(2, 67))))


@pytest.mark.kernels
def test_a_gradient_per_token_is_refused():
    kernel = fused.KERNELS["simple_gla"][1]
    assert kernel.refuse(CPU) is not None
    assert kernel.refuse(CPU._replace(fixed=True)) is None and kernel.refuse(CPU._replace(mode="prefill")) is None


@pytest.fixture
def scan(device, monkeypatch):
    """On a CPU mamba-ssm's reference in the place of its CUDA kernel, with a gradient of the last state as little."""
    if device == "cpu":
        module = import_module("mamba_ssm.ops.selective_scan_interface")
        monkeypatch.setattr(module, "selective_scan_fn", module.selective_scan_ref)
    fused._function.cache_clear()
    yield fused.mamba_selective_scan
    fused._function.cache_clear()


@pytest.mark.parametrize("device", DEVICES)
def test_selective_scan(device, limit, scan):
    """Without a state: plain, and with borders and padding. The gradient of the last state does not exist."""
    compare("selective_scan", scan, CPU, device, 67, limit, learnable_state=False)
    compare("selective_scan", scan, CPU, device, 67, limit, learnable_state=False, **packed(2, 67))
    compare("selective_scan", scan, CPU._replace(mode="prefill"), device, 41, limit, **packed(2, 41))


@pytest.mark.parametrize("device", DEVICES)
def test_selective_scan_refuses_what_it_would_get_wrong(device, scan):
    inputs = [x.to(device) for x in check.sample("selective_scan", CPU)]
    with pytest.raises(ValueError, match="no incoming state"):
        scan(*inputs, state=check.sample_state("selective_scan", CPU).to(device))
    leaves = [x.requires_grad_() for x in inputs]
    with pytest.raises(RuntimeError, match="no gradient for its last state"):
        scan(*leaves)[1].sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_mamba_decoding(device, limit, measured):
    call = CPU._replace(mode="decode")
    steps = fused.mamba_selective_steps
    measured(max(compare("selective_scan", steps, call._replace(state=s), device, 3, limit) for s in (False, True)))
    padding = torch.tensor([[True, False, True], [False, True, True]])
    compare("selective_scan", steps, call, device, 3, limit, padding=padding)
    inputs = [x.to(device) for x in check.sample("selective_scan", CPU, length=1)]
    state = check.sample_state("selective_scan", CPU).to(device)
    kept = state.clone()
    steps(*inputs, state=state)
    assert torch.equal(state, kept)
