"""The same conversion on a CUDA device: run with `pytest -m gpu` where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.mixers import registry
from relinear.recipes import loader, runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("mixer", registry.names())
def test_logits_are_those_of_the_cpu(any_teacher: Path, mixer: str) -> None:
    logits = {}
    ids = torch.arange(3, 200)[None]
    for device in ("cpu", "cuda"):
        teacher = load_teacher(any_teacher, device=device)
        mixers, _ = transfer(teacher, {1: (mixer, {}), 2: (mixer, {})})
        with torch.no_grad():
            logits[device] = assemble(teacher, mixers)(ids.to(device), use_cache=False).logits.cpu()
    torch.testing.assert_close(logits["cuda"], logits["cpu"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run(llama: Path, story_file: Path, tmp_path: Path, precision: str) -> None:
    changes = ["engine.device=cuda", f"engine.precision={precision}", "stages.align.tokens=8k", "stages.glue.tokens=8k"]
    changes.append("stages.calibrate.tokens=2k")
    given = [f"teacher.model={llama}", f"data.source={story_file}", f"save.dir={tmp_path / 'run'}", "data.seq_len=64"]
    result = runner.run(loader.load("rwkv7", [*given, *changes]))
    assert result["fidelity"]["kl"] < result["measured"]["transfer"]["kl"]
