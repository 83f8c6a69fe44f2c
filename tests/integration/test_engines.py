"""Every engine, with two processes, gives the curve and the weights of one process; killed, it resumes to the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill import files
from relinear.distill.checkpoint import Checkpoints

CHILD = Path(__file__).with_name("engine_child.py")
ENGINES = ("ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")


def start(engine: str, teacher: Path, folder: Path, *more: str, ranks: int = 2) -> int:
    """Run the child on so many ranks; its exit code."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, str(CHILD), engine, str(teacher), str(folder), *more]
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1"
    }
    if ranks == 1:
        return subprocess.run(command, env=base, check=False).returncode
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(command, env=base | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    codes = [process.wait(timeout=240) for process in running]
    return next((code for code in codes if code), 0)


def curves(folder: Path) -> dict[str, list[float]]:
    """Losses by stage."""
    made: dict[str, list[float]] = {}
    for line in files.read_metrics(folder / "metrics.jsonl"):
        made.setdefault(line["stage"], []).append(line["loss"])
    return made


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    """Of the stage's last commit."""
    return Checkpoints(folder / "checkpoints").require_complete(stage).weights()


def agree(found: dict[str, Any], wanted: dict[str, Any], rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """The same tensors, nearly."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """One process, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    assert start("single", llama, folder, ranks=1) == 0
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_do_what_one_process_does(engine: str, alone: Path, llama: Path, tmp_path: Path) -> None:
    assert start(engine, llama, tmp_path) == 0
    for stage, losses in curves(alone).items():
        assert curves(tmp_path)[stage] == pytest.approx(losses, rel=1e-4), stage
        agree(weights(tmp_path, stage), weights(alone, stage))
    assert json.loads((tmp_path / "changed.json").read_text()) == json.loads((alone / "changed.json").read_text())
    agree(torch.load(tmp_path / "student.pt", weights_only=True), torch.load(alone / "student.pt", weights_only=True))
