"""Trackers get the metrics, and their trouble never stops a run or changes a number of it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relinear.distill import files
from relinear.distill.errors import MachineError
from relinear.recipes import loader, runner

SMALL = [
    "stages=[{transfer: {}}, {align: {tokens: 2k, batch: 4}}, {glue: {tokens: 1k, batch: 4}}]",
    "data.seq_len=64",
    "eval.tokens=500",
]


@pytest.fixture(scope="module")
def teacher(make_teacher: Any) -> Path:
    return make_teacher("llama", num_hidden_layers=2)


def recipe(teacher: Path, text: Path, out: Path, *changes: str) -> Any:
    given = [f"teacher.model={teacher}", f"data.source={text}", f"save.dir={out}"]
    return loader.load("gated_deltanet", [*given, *SMALL, *changes])


@pytest.fixture(scope="module")
def first(teacher: Path, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without trackers."""
    out = tmp_path_factory.mktemp("runs") / "first"
    runner.run(recipe(teacher, story_file, out))
    return out


def same_run(a: Path, b: Path) -> bool:
    """The same weights and, clocks and memory apart, the same metrics."""
    made, held = (load_file(folder / "export" / "model.safetensors") for folder in (a, b))
    clocks = ("tokens_per_second", "peak_memory")
    lines = [
        [
            {key: value for key, value in line.items() if key not in clocks}
            for line in files.read_metrics(f / "metrics.jsonl")
        ]
        for f in (a, b)
    ]
    return all(torch.equal(made[name], held[name]) for name in held) and lines[0] == lines[1]


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in wandb's place, without `init` so far."""
    import types

    fake = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


class Talk(runner.Silent):
    """A progress that remembers its notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("how", ["init raises", "log raises", "finish raises", "init hangs", "log hangs"])
def test_trouble_with_wandb_never_stops_a_run(
    first: Path, teacher: Path, story_file: Path, tmp_path: Path, fake_wandb: Any, how: str, monkeypatch: Any
) -> None:
    from relinear.recipes import trackers

    what, does = how.split()

    def trouble(*_: Any, **__: Any) -> Any:
        if does == "raises":
            raise ConnectionError("the server is down")
        time.sleep(60)

    class Run:
        log = staticmethod(trouble if what == "log" else lambda record: None)
        finish = staticmethod(trouble if what == "finish" else lambda: None)

    fake_wandb.init = trouble if what == "init" else lambda **given: Run()
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    talk = Talk()
    began = time.monotonic()
    result = runner.run(recipe(teacher, story_file, tmp_path / "run", "track.wandb=mine"), progress=talk)
    assert result["status"] == "complete" and time.monotonic() - began < 60
    said = [line for line in talk.said if line.startswith("wandb")]
    assert len(said) == 1 and ("the server is down" if does == "raises" else "does not answer") in said[0]
    assert "metrics.jsonl has everything" in said[0]
    assert same_run(tmp_path / "run", first)


def test_wandb_itself_offline_gets_the_metrics_into_the_run_folder(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    talk = Talk()
    changed = ["track.wandb=mine", "track.wandb_mode=offline"]
    code = "import sys; from relinear.launch.main import main; sys.exit(main(sys.argv[1:]))"
    given = ["run", "gated_deltanet", f"teacher.model={teacher}", f"data.source={story_file}", *SMALL, *changed]
    command = [sys.executable, "-c", code, *given, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("wandb: ")], done.stderr
    found = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(found) == 1 and b"align/loss" in found[0].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and talk.said == []


def test_tensorboard_gets_the_metrics(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    runner.run(recipe(teacher, story_file, tmp_path / "run", "track.tensorboard=true"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("align/loss")]
    lines = files.read_metrics(tmp_path / "run" / "metrics.jsonl")
    written = [line["loss"] for line in lines if line["stage"] == "align" and "loss" in line]
    assert losses[0] == pytest.approx(written[0]) and len(losses) >= len(written)


def test_a_tracker_that_is_not_installed_is_said_before_any_work(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, change in (("wandb", "track.wandb=mine"), ("tensorboard", "track.tensorboard=true")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MachineError, match=rf"relinear\[{package}\]"):
            runner.run(recipe(teacher, story_file, tmp_path / "run", change))
    assert not (tmp_path / "run").exists()
