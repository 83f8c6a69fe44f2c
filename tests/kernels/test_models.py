"""A student on fused kernels: logits, generation and gradients as in plain torch, chosen as in a run."""

from __future__ import annotations

import logging

import pytest
import torch

from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.mixers import kernels

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CASES = [
    *(pytest.param(name, "cpu", "float32", marks=pytest.mark.kernels) for name in ("rwkv7", "lightning")),
    *(
        pytest.param(name, "cuda", dtype, marks=GPU)
        for name in ("rwkv7", "gated_deltanet", "deltanet", "gla", "lightning", "kda")
        for dtype in ("float32", "bfloat16")
    ),
]


@pytest.fixture
def build(make_teacher, monkeypatch):
    """build(mixer, device, dtype): a student of a llama with two converted layers."""

    def build(mixer, device, dtype):
        size = 16 if device == "cpu" else 64
        shape = {"hidden_size": 2 * size, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
        teacher = load_teacher(make_teacher("llama", max_position_embeddings=8192, **shape), dtype=dtype, device=device)
        mixers, _ = transfer(teacher, {0: (mixer, {}), 2: (mixer, {})})
        monkeypatch.setattr(kernels, "_CHOICES", {})
        monkeypatch.setattr(kernels, "_SAID", set())
        return assemble(teacher, mixers).to(getattr(torch, dtype))

    return build


def both(monkeypatch, caplog, act):
    """What `act` gives on fla's kernels and in plain torch."""
    monkeypatch.setenv("RELINEAR_KERNELS", "fla")
    with caplog.at_level(logging.INFO, "relinear"):
        fused = act()
    said = [record.getMessage() for record in caplog.records]
    assert any(": fused (" in text for text in said) and not any("FAILED" in text for text in said), said
    monkeypatch.setenv("RELINEAR_KERNELS", "torch")
    return fused, act()


def near(found, expected, device, dtype):
    limit = {"cpu": 1e-4, "cuda": 2e-2}[device] if dtype == "float32" else 6e-2
    error = float((found.double() - expected.double()).detach().norm() / expected.double().detach().norm())
    assert error < limit, error


@pytest.mark.parametrize(("mixer", "device", "dtype"), CASES)
def test_logits_and_gradients(mixer, device, dtype, build, monkeypatch, caplog):
    """Two packed rows with left padding in one of them; on a GPU also a row of 4097 tokens."""
    student = build(mixer, device, dtype)
    length = 35 if device == "cpu" else 301
    ids = torch.randint(3, 320, (2, length), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def act():
        student.zero_grad()
        logits = student(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.float().square().mean().backward()
        weight = student.mixers()[0].q_proj.weight
        return logits, weight.grad.clone()

    for found, expected in zip(*both(monkeypatch, caplog, act), strict=True):
        near(found, expected, device, dtype)
    if device == "cuda":
        long = torch.randint(3, 320, (1, 4097)).to(device)
        with torch.no_grad():
            found, expected = both(monkeypatch, caplog, lambda: student(long, use_cache=False).logits)
        near(found, expected, device, dtype)


@pytest.mark.parametrize(("mixer", "device", "dtype"), CASES)
def test_generation(mixer, device, dtype, build, monkeypatch, caplog):
    """A prompt and token after token from its state: the logits of every step."""
    student = build(mixer, device, dtype).eval()
    ids = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)

    def act():
        made = student.generate(
            ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(made.logits)

    near(*both(monkeypatch, caplog, act), device, dtype)
