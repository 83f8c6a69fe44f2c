"""Whole mixers on fused kernels: chosen, checked and run as in a model, against the same mixer going step by step."""

from __future__ import annotations

import logging

import pytest
import torch

from relinear.mixers import kernels, registry
from relinear.mixers.base import MixerInputs
from relinear.mixers.specs.base import Geometry

GEOMETRY = Geometry(32, 2, 1, 16, rope=False)
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.kernels),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def build(name: str, form: str, device: str):
    torch.manual_seed(0)
    mixer = registry.module(name)(GEOMETRY, registry.spec(name).options.parse({"form": form}), 0, 2, True)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return mixer.to(device)


def forward(mixer, x, where):
    """Output, last states and gradients of the input and every parameter."""
    x = x.clone().requires_grad_()
    out, states = mixer.mix(x, None, where, None)
    loss = out.square().sum() + sum(part.float().square().sum() for part in states)
    return out, states, torch.autograd.grad(loss, [x, *mixer.parameters()], allow_unused=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", registry.names())
def test_fused_mixer(name, device, monkeypatch, caplog):
    """Training on a packed, padded batch; then a prompt in one piece and decoding from it."""
    monkeypatch.setenv("RELINEAR_KERNELS", "fla")
    monkeypatch.setattr(kernels, "_CHOICES", {})
    fused, exact = build(name, "auto", device), build(name, "recurrent", device)
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(3)).to(device)
    padding = torch.ones(2, 37, dtype=torch.bool, device=device)
    padding[0, :5] = False
    where = MixerInputs(padding, (torch.arange(37, device=device) // 17).expand(2, 37))
    limit = 2e-4 if device == "cpu" else 2e-2
    with caplog.at_level(logging.INFO, "relinear"):
        found, expected = forward(fused, x, where), forward(exact, x, where)
    pairs = [(found[0], expected[0]), *zip(found[1] + found[2], expected[1] + expected[2], strict=True)]
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            assert float((a - b).detach().norm()) <= limit * max(float(b.detach().norm()), 0.1 * b.numel() ** 0.5)
    outputs = []
    with torch.no_grad():
        for mixer in (fused, exact):
            out, state = mixer.mix(x[:, :33], None, MixerInputs(), None)
            pieces = [out]
            for t in range(33, 36):
                out, state = mixer.mix(x[:, t : t + 1], None, MixerInputs(), state)
                pieces.append(out)
            outputs.append(torch.cat(pieces, 1))
    assert torch.allclose(*outputs, atol=limit * float(outputs[1].abs().max()))
    said = [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "FAILED" in text], said
    ran = {choice.kernel is not None for key, choice in kernels._CHOICES.items() if key[0] in kernels.KERNELS}
    assert ran <= {True} or name == "mamba"
