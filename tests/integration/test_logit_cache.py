"""Caches of the teacher's logits on the command line: made beforehand or by a run, killed, shared by students."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relinear.distill import files
from relinear.launch.main import main

STEP = "{tokens: 1536, batch: 4, lr: 1e-3, warmup: 1}"


@pytest.fixture
def recipe(tmp_path: Path, llama: Path, story_file: Path) -> Callable[..., list[str]]:
    """recipe(*changes) -> arguments: a tiny conversion whose glue reads a cache."""

    def make(*changes: str, run: str = "run") -> list[str]:
        path = tmp_path / "tiny.yaml"
        path.write_text(
            f"""\
schema: 1
teacher: {{model: {llama}}}
layers: {{mixer: gated_deltanet, convert: [1, 2]}}
data: {{source: {story_file}, seq_len: 64}}
stages:
  - transfer: {{}}
  - align: {STEP}
  - glue: {{tokens: 1536, batch: 4, lr: 1e-3, warmup: 1, loss: {{kl: 1.0}}, teacher_logits: {{top_k: 16}}}}
eval: {{tokens: 1000, every: 1M}}
save: {{dir: {tmp_path / run}}}
""",
            encoding="utf-8",
        )
        return [str(path), *changes]

    return make


def glue_losses(folder: Path) -> list[float]:
    records = files.read_metrics(folder / "metrics.jsonl")
    return [record["loss"] for record in records if record["stage"] == "glue" and "loss" in record]


def one_cache(folder: Path) -> dict[str, Any]:
    (found,) = folder.iterdir()
    return json.loads((found / "cache.json").read_text(encoding="utf-8"))


def test_prepared_once_and_read_by_two_students(
    recipe: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    llama: Path,
    story_file: Path,
) -> None:
    assert main(["prepare", *recipe(), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["prepare", *recipe(), "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["stage"] == "glue" and 0 < made["bytes"] <= planned[0]["bytes"] + 1000
    assert not (tmp_path / "run").exists()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher was run again")

    monkeypatch.setattr("relinear.distill.logit_cache.make.predicted", refuse)
    assert main(["run", *recipe()]) == 0
    assert main(["run", *recipe("layers.mixer=rwkv7", "seed=0", run="other")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["fidelity"]["kl"] > 0 and glue_losses(tmp_path / "run") != glue_losses(tmp_path / "other")
    capsys.readouterr()
    errors = ["bench", "logits", str(tmp_path / "run" / "export"), "--against", str(llama), "--text", str(story_file)]
    assert main([*errors, "--top-k", "4,64,320", "--tokens", "1k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    few, more, whole = found["rows"]
    assert few["missed"] > more["missed"] > whole["missed"] == pytest.approx(0, abs=1e-4)
    assert few["gradient"] > more["gradient"] > whole["gradient"] == pytest.approx(0, abs=1e-4)
    assert few["tail_mass"] > more["tail_mass"] > whole["tail_mass"] == 0 and found["kl"] > 0
    # Another seed is another order of the data: another cache, which has to be made.
    assert main(["run", *recipe("data.seed=5", run="third")]) == 1


def test_a_run_makes_it_and_one_that_is_over_needs_it_no_more(
    recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *recipe()]) == 0
    held = one_cache(tmp_path / "teacher-logits")
    assert held["complete"] and held["key"]["top_k"] == 16 and "fp32" in held["key"].values()
    for path in (tmp_path / "teacher-logits").rglob("*.safetensors"):
        path.unlink()
    (tmp_path / "run" / "result.json").unlink()
    assert main(["run", *recipe(), "--resume"]) == 0
    assert "complete, loaded from" in capsys.readouterr().err


def test_a_named_cache_of_something_else_is_refused_with_what_differs(
    recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *recipe()]) == 0
    (folder,) = (tmp_path / "teacher-logits").iterdir()
    named = f"stages.glue.teacher_logits.dir={folder}"
    assert main(["run", *recipe(named, "stages.glue.teacher_logits.top_k=8", "stages.glue.tokens=2000")]) == 2
    told = capsys.readouterr().err
    assert "tokens: made with 1536, now 2000; top_k: made with 16, now 8" in told
    assert main(["run", *recipe(named, "stages.glue.loss.align=0.5", run="other")]) == 2
    assert "loss.align" in capsys.readouterr().err


def test_the_whole_vocabulary_gives_the_run_without_a_cache(recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    whole = ["stages.glue.teacher_logits.top_k=320", "stages.glue.teacher_logits.dtype=float32"]
    assert main(["run", *recipe(*whole)]) == 0
    assert main(["run", *recipe("stages.glue.teacher_logits=null", run="plain")]) == 0
    assert glue_losses(tmp_path / "run") == pytest.approx(glue_losses(tmp_path / "plain"), rel=1e-4)


def test_glue_where_the_teachers_weights_are_not(
    recipe: Callable[..., list[str]],
    tmp_path: Path,
    llama: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Aligned and prepared where they are; then they are gone, and another run goes on from the export."""
    whole = tmp_path / "teacher"
    shutil.copytree(llama, whole)
    aligned, glued = tmp_path / "aligned", tmp_path / "glued"
    named = f"teacher.model={whole}"
    assert main(["run", *recipe(named, f"stages=[{{transfer: {{}}}}, {{align: {STEP}}}]"), "--out", str(aligned)]) == 0
    glue = "{tokens: 1536, batch: 4, lr: 1e-3, warmup: 1, loss: {kl: 1.0}, teacher_logits: {top_k: 16}}"
    changes = recipe(named, f"stages=[{{transfer: {{}}}}, {{glue: {glue}}}]", "eval.against=text", run="glued")
    start = ["--start", str(aligned)]
    (whole / "model.safetensors").rename(tmp_path / "aside")
    assert main(["run", *changes, *start]) == 2
    assert "relinear prepare" in capsys.readouterr().err and not (glued / "checkpoints").exists()
    (tmp_path / "aside").rename(whole / "model.safetensors")
    assert main(["prepare", *changes]) == 0
    (whole / "model.safetensors").unlink()
    assert main(["run", *changes, *start, "--max-hours", "0", "--resume"]) == 75
    assert main(["run", *changes, *start, "--resume"]) == 0
    result = json.loads((glued / "result.json").read_text(encoding="utf-8"))
    assert result["fidelity"].keys() == {"student", "tokens", "documents"}
    assert [row["name"] for row in result["rows"]] == ["student"]
    before, after = (load_file(folder / "export" / "model.safetensors") for folder in (aligned, glued))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    losses = glue_losses(glued)
    assert losses[-1] < losses[0]
    assert main(["verify", str(glued)]) == 0
    # The same with the weights there, which are not looked at.
    shutil.copytree(llama, whole, dirs_exist_ok=True)
    assert main(["run", *changes, *start, "--out", str(tmp_path / "again")]) == 0
    assert glue_losses(tmp_path / "again") == losses
    (whole / "config.json").write_text((whole / "config.json").read_text() + " ")
    assert main(["run", *changes, *start, "--out", str(tmp_path / "other")]) == 2
    assert "config.json: is not what it was" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_while_it_is_made(recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    """A process of its own, killed once its first files are there; the same command then goes on to the same cache."""
    arguments = recipe("stages.glue.tokens=60k", "stages.glue.teacher_logits.top_k=256")
    code = (
        "import sys\nfrom relinear.distill.logit_cache import make, sizes\n"
        "make.make_cache.__kwdefaults__['shard_bytes'] = 500_000\n"
        "from relinear.launch.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "prepare", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=dict(os.environ))
    place = tmp_path / "teacher-logits"
    deadline = time.monotonic() + 120
    while len(list(place.rglob("shard-*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in place.rglob("shard-*.json")}
    assert len(before) >= 3 and not one_cache(place)["complete"]
    subprocess.run(command, check=True, capture_output=True)
    held = one_cache(place)
    assert held["complete"] and len(held["shards"]) > len(before)
    after = {path.name: path.stat().st_mtime_ns for path in place.rglob("shard-*.json")}
    assert before.items() <= after.items()
