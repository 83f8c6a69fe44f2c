"""Fused kernels against our step-by-step form: output, state and every gradient, with padding, borders and a state.

The same functions run on two devices: `kernels` is a CPU with Triton interpreted (fp32, and fp16 where types are mixed;
its bf16 is wrong), small because that is slow; `gpu` is CUDA, with sizes as in models.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import pytest
import torch

from relinear.mixers.ops import check, fused
from relinear.mixers.ops.fused import Call, Kernel
from relinear.mixers.ops.op import Op

pytestmark = pytest.mark.usefixtures("poisoned")

FLA = sorted(name for name, kernels in fused.KERNELS.items() if kernels[0].library == "fla")
INTERPRETED = {torch.float32: 1e-5, torch.float16: 4e-3}


class Place(NamedTuple):
    """A device, and what is tried there."""

    device: torch.device
    heads: int
    key: int
    value: int
    lengths: tuple[int, ...]

    def limit(self, dtype: torch.dtype) -> float:
        limits = INTERPRETED if self.device.type == "cpu" else check.LIMITS
        return limits[dtype]


PLACES = {
    "cpu": Place(torch.device("cpu"), 2, 16, 24, (1, 67)),
    "cuda": Place(torch.device("cuda"), 4, 64, 128, (1, 63, 67, 1000, 4097)),
}
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.kernels),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
WITH_DTYPES = [
    pytest.param(*device.values, dtype, marks=device.marks, id=f"{device.values[0]}-{str(dtype)[6:]}")
    for device in DEVICES
    for dtype in (torch.float32, torch.float16 if device.values[0] == "cpu" else torch.bfloat16)
]


def operation(name: str) -> Op:
    return import_module(f"relinear.mixers.ops.{name}").OP


def packed(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Borders early, at the chunk's edge and at the last token; padding before, behind and at a border."""
    fresh = torch.zeros(batch, length, dtype=torch.long)
    for row in range(batch):
        fresh[row, [t for t in (3 + row, 16, length // 2, length - 2 - row) if 0 < t < length]] = 1
    padding = torch.ones(batch, length, dtype=torch.bool)
    padding[0, :3] = False
    padding[-1, -4:] = False
    padding[:, length // 2] = False
    return {"segments": fresh.cumsum(1) + 4, "padding": padding}


def compare(op, kernel, call, place, length, batch=1, truth=None, **where):
    """Assert that a kernel gives what the recurrence gives; returns the largest error."""
    gradients = call.mode == "train"
    inputs = [x.to(place.device) for x in check.sample(op.name, call, batch, length)]
    state = check.sample_state(op.name, call, batch).to(place.device) if call.state else None
    where = {name: tensor.to(place.device) for name, tensor in where.items()}
    found = check.results(kernel, inputs, state, gradients, **where)
    wide = None if state is None else state.double()
    expected = check.results(truth or op.recurrent, [x.double() for x in inputs], wide, gradients, **where)
    assert found["output"].dtype == call.dtype and found["state"].dtype == torch.float32
    errors = check.errors(found, expected)
    worst = max(errors.values())
    assert worst <= place.limit(call.dtype), {name: f"{error:.1e}" for name, error in errors.items()}
    return worst


def call_of(place: Place, dtype: torch.dtype, mode: str, **more) -> Call:
    return Call(place.device.type, dtype, place.heads, place.key, place.value, mode, **more)


@pytest.mark.parametrize("name", FLA)
@pytest.mark.parametrize(("device", "dtype"), WITH_DTYPES)
def test_training(name, device, dtype, measured):
    """Forward and backward of the chunk kernels, also of the gradient of the last state."""
    place, op, kernel = PLACES[device], operation(name), fused.KERNELS[name][0]
    place = place._replace(heads=1) if device == "cpu" else place
    worst = [
        compare(
            op, kernel.chunk, call_of(place, dtype, "train"), place, length, truth=op.chunked if length > 2000 else None
        )
        for length in place.lengths
    ]
    measured(max(worst))


@pytest.mark.parametrize("name", FLA)
@pytest.mark.parametrize(("device", "dtype"), WITH_DTYPES)
def test_training_on_packed_rows(name, device, dtype, measured):
    place, op, kernel = PLACES[device], operation(name), fused.KERNELS[name][0]
    length = 35 if device == "cpu" else 333
    call = call_of(place, dtype, "train", state=True, segments=True)
    measured(compare(op, kernel.chunk, call, place, length, 2, **packed(2, length)))


@pytest.mark.parametrize("name", FLA)
@pytest.mark.parametrize(("device", "dtype"), WITH_DTYPES)
def test_decoding(name, device, dtype, measured):
    """The kernel that loops over tokens: without and with a state, with padding and borders."""
    place, op, kernel = PLACES[device], operation(name), fused.KERNELS[name][0]
    call = call_of(place, dtype, "decode")
    worst = [
        compare(op, kernel.decode, call, place, 1, 3),
        compare(op, kernel.decode, call._replace(state=True), place, 1, 3),
    ]
    worst.append(compare(op, kernel.decode, call._replace(state=True), place, 21, 2, **packed(2, 21)))
    measured(max(worst))


@pytest.mark.parametrize("name", FLA)
@pytest.mark.parametrize("device", DEVICES)
def test_prefill_then_decoding(name, device):
    """Chunks, then token by token from the state they left, give what steps over all give."""
    place, op, kernel = PLACES[device], operation(name), fused.KERNELS[name][0]
    call = call_of(place, torch.float32, "decode")
    inputs = [x.to(place.device) for x in check.sample(name, call, 2, 70)]
    with torch.no_grad():
        expected, last = op.recurrent(*(x.double() for x in inputs))
        out, state = kernel.chunk(*(x[:, :67] for x in inputs))
        pieces = [out]
        for t in range(67, 70):
            out, state = kernel.decode(*(x[:, t : t + 1] for x in inputs), state=state)
            pieces.append(out)
    found = {"output": torch.cat(pieces, 1), "state": state}
    errors = check.errors(found, {"output": expected, "state": last})
    assert max(errors.values()) <= place.limit(torch.float32), errors


@pytest.mark.parametrize("name", FLA)
@pytest.mark.parametrize("device", DEVICES)
def test_head_sizes_that_are_no_powers_of_two(name, device):
    place = (
        PLACES[device]._replace(key=20, value=12, heads=1)
        if device == "cpu"
        else PLACES[device]._replace(key=80, value=96)
    )
    op, kernel = operation(name), fused.KERNELS[name][0]
    compare(op, kernel.chunk, call_of(place, torch.float32, "train"), place, 19)
    compare(op, kernel.decode, call_of(place, torch.float32, "decode"), place, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_fixed_decays(device):
    """One decay per head and no tensor of decays: chunks without and with padding, learnt or not, and decoding."""
    place, op = PLACES[device], operation("simple_gla")
    kernel = fused.KERNELS["simple_gla"][0]
    for mode, length in (("prefill", 67), ("train", 35), ("decode", 3)):
        call = call_of(place, torch.float32, mode, fixed=True, state=True)
        compare(op, kernel.form(mode), call, place, length)
        compare(op, kernel.form(mode), call, place, length + 10, 2, **packed(2, length + 10))


@pytest.mark.parametrize("device", DEVICES)
def test_delta_rule_without_decays(device):
    place, op = PLACES[device], operation("gated_delta")
    kernel: Kernel = fused.KERNELS["gated_delta"][0]
    for mode in ("train", "decode"):
        call = call_of(place, torch.float32, mode, state=True)

        def plain(form):
            return lambda q, k, v, g, beta, **where: form(q, k, v, None, beta + 0 * g, **where)

        compare(Op("gated_delta", plain(op.recurrent), op.chunked, op.step), plain(kernel.form(mode)), call, place, 20)


@pytest.mark.parametrize("name", sorted(fused.KERNELS))
@pytest.mark.parametrize(("device", "dtype"), WITH_DTYPES)
def test_the_check_before_first_use_passes(name, device, dtype, request):
    """As kernels.py makes it, in every mode that the kernels serve."""
    place = PLACES[device]
    kernel = fused.KERNELS[name][0]
    if kernel.library == "mamba_ssm":
        request.getfixturevalue("mamba_ssm")
    for mode in ("train", "decode"):
        call = call_of(place, dtype, mode, state=True)
        if kernel.refuse(call) is None:
            passed, figures = check.verdict(operation(name), kernel.form(mode), call, place.device)
            assert passed, figures
