"""Streamed align as a run: from the recipe to the export, on to glue, with workers, and within its memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from relinear.distill import checkpoint
from relinear.distill.errors import MachineError, UserError
from relinear.distill.files import read_metrics
from relinear.distill.teacher import load_model
from relinear.recipes import disk_room, loader, measuring, runner, streaming

RECIPE = """\
schema: 1
teacher: {{model: {teacher}}}
layers: {{mixer: rwkv7, keep: [1]}}
data: {{source: {text}, seq_len: 48}}
stages:
  - transfer: {{}}
  - align: {{tokens: 2k, batch: 4, lr: 3e-3, warmup: 2}}
eval: {{tokens: 500}}
"""
RELINEAR = [sys.executable, "-c", "from relinear.launch.main import main; main()"]
STREAM = "stages.align.stream={borders: compute, blocks: 2}"


@pytest.fixture
def recipe(tmp_path: Path, llama: Path, story_file: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(teacher=llama, text=story_file))
    return path


def load(recipe: Path, folder: Path, *changes: str) -> Any:
    return loader.load(str(recipe), [*changes, f"save.dir={folder}"])


def mixers(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.Checkpoints(folder / "checkpoints").require_complete("align").weights()


def test_a_streamed_run_ends_as_one_in_memory(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.run(load(recipe, tmp_path / "memory"))

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole teacher was loaded")

    monkeypatch.setattr(streaming, "load_teacher", refused)
    monkeypatch.setattr(runner, "assemble", refused)
    monkeypatch.setattr(measuring, "assemble", refused)
    monkeypatch.setattr("relinear.distill.stream.export.PART", 20_000)
    result = runner.run(load(recipe, tmp_path / "stream", STREAM))
    assert result["status"] == "complete" and result["fidelity"] is None
    wanted, found = mixers(tmp_path / "memory"), mixers(tmp_path / "stream")
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0)
    one, many = (load_file(tmp_path / "memory" / "export" / "model.safetensors"), {})
    shards = sorted((tmp_path / "stream" / "export").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        many |= load_file(shard)
    assert one.keys() == many.keys() and all(torch.equal(value, many[name]) for name, value in one.items())
    configs = [json.loads((tmp_path / run / "export" / "config.json").read_text()) for run in ("memory", "stream")]
    assert configs[0] == configs[1]
    transfers = [json.loads((tmp_path / run / "transfer.json").read_text()) for run in ("memory", "stream")]
    assert transfers[0] == transfers[1]
    ids = torch.arange(3, 40)[None]
    models = [load_model(tmp_path / run / "export")[0] for run in ("memory", "stream")]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    steps = [
        [line["losses"] for line in read_metrics(tmp_path / run / "metrics.jsonl") if "losses" in line]
        for run in ("memory", "stream")
    ]
    assert steps[0] == steps[1]
    assert not list((tmp_path / "stream").rglob("border-*"))


def test_goes_on_to_glue_and_resumes(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("eval:", "  - glue: {tokens: 500, batch: 4, warmup: 1}\neval:")
    recipe.write_text(text)
    runner.run(load(recipe, tmp_path / "memory"))
    stopped = runner.run(load(recipe, tmp_path / "stream", STREAM), max_hours=1e-9)
    assert stopped["status"] == "stopped"
    with pytest.raises(UserError, match="--resume"):
        runner.run(load(recipe, tmp_path / "stream", STREAM))
    ended = runner.run(load(recipe, tmp_path / "stream", STREAM), resume=True)
    assert [stage["name"] for stage in ended["stages"]] == ["align", "glue"]
    weights = [
        checkpoint.Checkpoints(tmp_path / run / "checkpoints").require_complete("glue").weights()
        for run in ("memory", "stream")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)


def test_a_second_process_joins(recipe: Path, tmp_path: Path) -> None:
    runner.run(load(recipe, tmp_path / "alone", STREAM))
    folder = tmp_path / "shared"
    command = [*RELINEAR, "run", str(recipe), STREAM, "--out", str(folder)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    waited = time.monotonic() + 120
    while not (folder / "run.json").exists() and time.monotonic() < waited and first.poll() is None:
        time.sleep(0.1)
    worker = [sys.executable, "-m", "relinear.recipes.streaming", str(folder), "--layers", "2-3"]
    second = subprocess.run(worker, capture_output=True, text=True, check=False, timeout=120)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert second.returncode == 0, second.stderr
    wanted = mixers(tmp_path / "alone")
    assert all(torch.equal(value, wanted[name]) for name, value in mixers(folder).items())
    assert ("layer 2: rwkv7" in second.stderr) != ("layer 2: rwkv7" in said)


def test_no_room_is_said_before_any_work(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda place: usage(10**6, 10**6, 1000))
    with pytest.raises(MachineError, match=r"bytes needed.*1,000 free.*stream.dir"):
        runner.run(load(recipe, tmp_path / "run", STREAM))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_the_plan_is_what_the_disk_then_holds(recipe: Path, tmp_path: Path) -> None:
    from relinear.recipes.plan import plan

    kept = "stages.align.stream={borders: compute, keep_borders: true}"
    needs = plan(load(recipe, tmp_path / "run", kept)).stage("align").disk
    runner.run(load(recipe, tmp_path / "run", kept))
    borders = tmp_path / "run" / "stream" / "align" / "borders"
    for name, pattern in (("hidden states", "border-*"), ("v_first", "shared-*"), ("batches", "batches")):
        held = sum(p.stat().st_size for folder in borders.glob(pattern) for p in folder.rglob("*.safetensors"))
        heads = 600 * len([p for folder in borders.glob(pattern) for p in folder.rglob("*.safetensors")])
        assert 0.85 * needs[name] < held - heads < 1.02 * needs[name], name


@pytest.mark.parametrize(
    ("change", "message"),
    [("engine.parallel=ddp", "single processes"), ("eval.assembled=true", "needs the whole model")],
)
def test_what_cannot_stand_beside_it(recipe: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(recipe, tmp_path / "run", STREAM, change)


def calibrated(recipe: Path, calibrate: str) -> None:
    text = recipe.read_text().replace("transfer: {}\n", f"transfer: {{}}\n  - calibrate: {calibrate}\n")
    recipe.write_text(text)


@pytest.mark.parametrize("method", ["auto", pytest.param("full", marks=pytest.mark.slow)])
def test_calibrate_before_it_is_that_in_memory(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    calibrated(recipe, f"{{tokens: 400, batch: 2, method: {method}}}")
    runner.run(load(recipe, tmp_path / "memory"))
    monkeypatch.setattr(streaming, "load_teacher", None)  # the whole teacher is not loaded
    result = runner.run(load(recipe, tmp_path / "stream", STREAM))
    assert [stage["name"] for stage in result["stages"]] == ["calibrate", "align"]
    for stage in ("calibrate", "align"):
        wanted, found = (
            checkpoint.Checkpoints(tmp_path / run / "checkpoints").require_complete(stage).weights()
            for run in ("memory", "stream")
        )
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    reports = [json.loads((tmp_path / run / "calibrate.json").read_text()) for run in ("memory", "stream")]
    assert reports[0]["method"] == {"auto": "spread", "full": "full"}[method]
    rows = [report.pop("layers") for report in reports]
    assert reports[0] == reports[1] and rows[0].keys() == rows[1].keys() == {"0", "2", "3"}
    for layer, row in rows[0].items():
        assert rows[1][layer]["kept"] == row["kept"]
        for kind in ("random", "transfer", "calibrated", "aligned"):
            assert rows[1][layer][kind] == pytest.approx(row[kind], rel=1e-5), (layer, kind)
    assert (tmp_path / "stream" / "calibrate.png").exists()
    assert not list((tmp_path / "stream" / "stream").rglob("*.safetensors"))  # hidden states, layers' commits


@pytest.mark.slow
def test_stopped_in_calibrate_it_goes_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relinear.distill.stream import calibrate as stage

    calibrated(recipe, "{tokens: 400, batch: 2, method: full}")
    runner.run(load(recipe, tmp_path / "whole", STREAM))
    plain, layers = stage._commit_layer, []

    def dies(work: Any, layer: int, *rest: Any) -> None:
        layers.append(layer)
        if layers == [0, 2]:
            raise KeyboardInterrupt
        plain(work, layer, *rest)

    monkeypatch.setattr(stage, "_commit_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        runner.run(load(recipe, tmp_path / "run", STREAM))
    from relinear.recipes.plan import plan

    needs = plan(load(recipe, tmp_path / "run", STREAM)).stage("calibrate").disk
    chunks = [p.stat().st_size for p in (tmp_path / "run").rglob("calibrate-002/*.safetensors")]
    whole = (needs["hidden states"] + needs["v_first"]) / 2  # of one layer
    assert 0.85 * whole < sum(chunks) - 900 * len(chunks) < 1.05 * whole
    for _ in range(2):  # the second time there is nothing left to do
        assert runner.run(load(recipe, tmp_path / "run", STREAM), resume=True)["status"] == "complete"
    assert layers == [0, 2, 2, 3]
    wanted, found = mixers(tmp_path / "whole"), mixers(tmp_path / "run")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    reports = [json.loads((tmp_path / run / "calibrate.json").read_text()) for run in ("whole", "run")]
    assert reports[0] == reports[1]


def large_teacher(folder: Path, tokenizer: Path) -> int:
    """A llama of 8 layers and 3 GB, a shard for each layer, written tensor by tensor; its bytes."""
    hidden, inner, vocab = 2048, 14336, 320
    config = json.loads((tokenizer / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 8, "vocab_size": vocab}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 128}
    config.pop("layer_types", None)
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    narrow = 4 * 128
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden)}
    shapes |= {"self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    places, total, noise = {}, 0, torch.randn(inner * hidden + 9).mul_(0.02)
    for number in range(9):
        if number < 8:
            names = {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}
        else:
            names = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
            names["model.norm.weight"] = (hidden,)
        tensors = {
            n: torch.ones(s) if len(s) == 1 else noise[number : number + s[0] * s[1]].view(s).clone()
            for n, s in names.items()
        }
        total += sum(4 * t.numel() for t in tensors.values())
        save_file(tensors, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(names, f"model-{number}.safetensors")
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_three_gigabytes_within_half_of_them(llama: Path, story_file: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    assert large_teacher(teacher, llama) >= 3e9
    assert len(list(teacher.glob("*.safetensors"))) >= 8
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(teacher=teacher, text=story_file).replace("keep: [1]", "convert: all"))
    changes = [STREAM, "stages.align.tokens=500", "stages.align.batch=2", "save.every=10k", "eval.every=10k"]
    command = [*RELINEAR, "run", str(recipe), *changes, "--out", str(tmp_path / "run")]
    log = (tmp_path / "log").open("w")
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    peak = 0
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, *found, 0)
        time.sleep(0.02)
    log.close()
    assert child.returncode == 0, (tmp_path / "log").read_text()
    print(f"peak RssAnon {peak / 1024:.0f} MiB")
    assert 300e6 < peak * 1024 <= 1.5e9
    model = json.loads((tmp_path / "run" / "export" / "model.safetensors.index.json").read_text())
    assert model["metadata"]["total_size"] > 3e9
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(teacher)
