"""Every engine, with two processes, gives the curve and the weights of one process; killed, it resumes to the same."""

from __future__ import annotations

import json
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill import files
from relinear.distill.checkpoint import Checkpoints

Ranks = runpy.run_path(str(Path(__file__).with_name("forks.py")))["Ranks"]
ENGINES = ("ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What forks would each import otherwise."""
    import deepspeed  # noqa: F401
    from accelerate import PartialState  # noqa: F401


def start(engine: str, teacher: Path, folder: Path, *more: str, ranks: int = 2) -> int:
    """Run the child on so many ranks; its exit code."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}-log"
    codes = Ranks.of_child(engine, teacher, folder, ranks, log, more).codes()
    for rank, code in enumerate(codes):
        if code not in (0, -signal.SIGKILL):
            print(f"rank {rank} ended with {code}:\n", log.with_name(f"{log.name}-{rank}").read_text())
    return next((code for code in codes if code), 0)


CURVE = 1e-4
"""Relative difference of losses. Sums in another order change the last bits, and Adam's first steps divide by them."""


def curves(folder: Path) -> dict[str, list[float]]:
    """Losses by stage."""
    made: dict[str, list[float]] = {}
    for line in files.read_metrics(folder / "metrics.jsonl"):
        if "eval" in line:
            continue
        made.setdefault(line["stage"], []).append(line["loss"])
    return made


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    """Of the stage's last commit."""
    return Checkpoints(folder / "checkpoints").require_complete(stage).weights()


def agree(found: dict[str, Any], wanted: dict[str, Any], rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """The same tensors, nearly: all elements together, and none off by more than about a third of one of Adam's steps.

    Not element by element: where a gradient is nearly zero, Adam divides its last bits by themselves, and which
    elements these are depends on the processor's order of sums.
    """
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if rtol == 0.0 or not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name
            continue
        off = (found[name] - tensor).abs()
        root = tensor.numel() ** 0.5
        assert off.norm() <= rtol / 2 * tensor.norm() + atol * root, f"{name}: {off.norm()} of {tensor.norm()}"
        assert (off <= 1e-3 + rtol * tensor.abs()).all(), f"{name}: {off.max()} at one element"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """One process, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    assert start("single", llama, folder, ranks=1) == 0
    return folder


@pytest.mark.parametrize(
    "engine",
    # ZeRO-1 goes ZeRO-2's way; without `slow` one of them will do.
    [pytest.param(engine, marks=[pytest.mark.slow] * (engine == "deepspeed-zero1")) for engine in ENGINES],
)
def test_two_ranks_do_what_one_process_does(engine: str, alone: Path, llama: Path, tmp_path: Path) -> None:
    assert start(engine, llama, tmp_path, "--measure") == 0
    for stage, losses in curves(alone).items():
        assert curves(tmp_path)[stage] == pytest.approx(losses, rel=CURVE), stage
        agree(weights(tmp_path, stage), weights(alone, stage))
    assert json.loads((tmp_path / "changed.json").read_text()) == json.loads((alone / "changed.json").read_text())
    agree(torch.load(tmp_path / "student.pt", weights_only=True), torch.load(alone / "student.pt", weights_only=True))
    found = [line["eval"] for line in files.read_metrics(tmp_path / "metrics.jsonl") if "eval" in line]
    assert found and all(values["divided"] == values["each"] and values["own"] == 2 for values in found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_parts_averages_rates_and_layer_losses(engine: str, llama: Path, tmp_path: Path) -> None:
    """Micro-batches, averaged weights, two groups of rates, RWKV-7's shared values and align's loss beside the KL."""
    more = ("--mixer", "rwkv7", "--settings", json.dumps({"micro_batch": 1, "average": 0.9}))
    more += ("--glue", json.dumps({"loss": {"kl": 1.0, "align": 3.0}, "lr_mixers": 1e-2}))
    assert start("single", llama, tmp_path / "alone", *more, ranks=1) == 0
    assert start(engine, llama, tmp_path / "two", *more) == 0
    for stage, losses in curves(tmp_path / "alone").items():
        assert curves(tmp_path / "two")[stage] == pytest.approx(losses, rel=CURVE), stage
        agree(weights(tmp_path / "two", stage), weights(tmp_path / "alone", stage), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed-zero2", "deepspeed-zero3"])
def test_an_offloaded_optimizer_does_the_same(engine: str, alone: Path, llama: Path, tmp_path: Path) -> None:
    """Killed in between, too: its state is read back from the host's copies."""
    assert start(engine, llama, tmp_path, "--offload", "cpu", "--kill", "glue:6") == -signal.SIGKILL
    assert start(engine, llama, tmp_path, "--offload", "cpu", "--resume") == 0
    for stage, losses in curves(alone).items():
        assert curves(tmp_path)[stage] == pytest.approx(losses, rel=CURVE), stage
        agree(weights(tmp_path, stage), weights(alone, stage), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_ends_at_the_same_weights(engine: str, llama: Path, tmp_path: Path) -> None:
    assert start(engine, llama, tmp_path / "whole") == 0
    for moment in ("align:5", "glue:1", "glue:6"):
        assert start(engine, llama, tmp_path / "killed", "--resume", "--kill", moment) == -signal.SIGKILL
    assert start(engine, llama, tmp_path / "killed", "--resume") == 0
    assert curves(tmp_path / "killed") == curves(tmp_path / "whole")
    for stage in ("align", "glue"):
        agree(weights(tmp_path / "killed", stage), weights(tmp_path / "whole", stage), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "ranks"),
    [
        ("fsdp2", "single", 1),
        ("single", "fsdp2", 2),
        ("deepspeed-zero3", "ddp", 2),
        ("ddp", "deepspeed-zero2", 2),
        ("deepspeed-zero2", "deepspeed-zero3", 2),
        ("ddp", "ddp", 4),
    ],
)
def test_a_run_goes_on_under_another_engine(
    first: str, then: str, ranks: int, alone: Path, llama: Path, tmp_path: Path
) -> None:
    for moment in ("align:5", "glue:6"):
        begun = start(first, llama, tmp_path, "--resume", "--kill", moment, ranks=1 if first == "single" else 2)
        assert begun == -signal.SIGKILL
    assert start(then, llama, tmp_path, "--resume", ranks=ranks) == 0
    for stage, losses in curves(alone).items():
        assert curves(tmp_path)[stage] == pytest.approx(losses, rel=CURVE), stage
        agree(weights(tmp_path, stage), weights(alone, stage), rtol=1e-3, atol=1e-3)
