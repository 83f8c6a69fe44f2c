"""A run from start to end: what is refused, what survives a kill, what a second run may take from a first."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relinear.distill import files
from relinear.distill.errors import MachineError, UserError
from relinear.distill.export import export
from relinear.launch.main import main
from relinear.recipes import loader, runner

SMALL = [
    "stages.calibrate.tokens=1k",
    "stages.align.tokens=4k",
    "stages.glue.tokens=4k",
    "stages.align.batch=4",
    "stages.glue.batch=4",
    "data.seq_len=64",
    "eval.tokens=1k",
    "save.every=1k",
    "eval.every=1k",
]


@pytest.fixture(scope="module")
def teacher(make_teacher: Any) -> Path:
    return make_teacher("llama", num_hidden_layers=3)


def recipe(teacher: Path, text: Path, out: Path, *changes: str, name: str = "gated_deltanet") -> Any:
    given = [f"teacher.model={teacher}", f"data.source={text}", f"save.dir={out}"]
    return loader.load(name, [*given, *SMALL, *changes])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def first(teacher: Path, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    runner.run(recipe(teacher, story_file, out))
    return out


def test_result_says_what_happened(first: Path) -> None:
    result = json.loads((first / "result.json").read_text())
    assert [stage["name"] for stage in result["stages"]] == ["calibrate", "align", "glue"]
    assert result["measured"].keys() == {"transfer", "calibrate", "align"}
    assert result["layers"] == {"drawing": "LLL", "kept": []}
    changed = result["stages"][2]["changed_teacher_tensors"]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"} <= set(changed)
    report = json.loads((first / "transfer.json").read_text())
    assert report["0"]["copied"]["q_proj.weight"] == "q_proj.weight"
    card = (first / "export" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "(`gated_deltanet`) |" in card and "| 0–2 |" in card
    assert f"{result['fidelity']['kl']:.4f}" in card and "schema: 1" in card
    assert "base_model" not in card.split("---\n")[1], "a teacher from a folder has no name on the Hub"
    for name in ("recipe.yaml", "metrics.jsonl", "loss.png", "calibrate.json", "calibrate.png", "result.txt"):
        assert (first / name).stat().st_size > 0


def test_every_layer_is_followed_from_random_to_aligned(first: Path) -> None:
    report = json.loads((first / "calibrate.json").read_text())
    assert (report["method"], report["inputs"], list(report["layers"])) == ("spread", "teacher", ["0", "1", "2"])
    for row in report["layers"].values():
        assert row["aligned"] < row["calibrated"] <= row["transfer"] and row["random"] == pytest.approx(1, abs=0.1)


def test_calibrated_and_nothing_else(first: Path, teacher: Path, story_file: Path, tmp_path: Path) -> None:
    """A run without training; and one whose mixers are trained already, which calibrate leaves alone."""
    calibrate = {"tokens": "1k", "batch": 4}
    given = [f"teacher.model={teacher}", f"data.source={story_file}", "data.seq_len=64", "eval.tokens=1k"]

    def load(name: str, *stages: dict[str, Any]) -> Any:
        return loader.load("rwkv7", [*given, "layers.mixer=gated_deltanet", f"save.dir={tmp_path / name}",
                                     f"stages={[{'transfer': {}}, {'calibrate': calibrate}, *stages]}",
                                     "mixers.gated_deltanet={conv: 4, expand_kv: true}"])  # fmt: skip

    alone = runner.run(load("alone"))
    assert [stage["name"] for stage in alone["stages"]] == ["calibrate"] and alone["stages"][0]["method"] == "full"
    assert alone["measured"]["calibrate"]["kl"] < alone["measured"]["transfer"]["kl"]
    assert not (tmp_path / "alone" / "loss.png").exists()
    again = export(tmp_path / "alone", "last", tmp_path / "again")
    made, kept = load_file(again / "model.safetensors"), weights(tmp_path / "alone")
    assert all(torch.equal(made[name], kept[name]) for name in kept)
    later = runner.run(load("later", {"glue": {"tokens": "1k", "batch": 4, "lr": 1e-9}}), start=first)
    assert [stage["name"] for stage in later["stages"]] == ["glue"]
    assert not (tmp_path / "later" / "calibrate.json").exists()


def test_the_export_is_the_best_step(first: Path, teacher: Path) -> None:
    result = json.loads((first / "result.json").read_text())
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval"]["score"] for line in lines if line["stage"] == "glue" and "eval" in line}
    assert len(scores) > 3 and result["step"] == min(scores, key=lambda step: scores[step])
    measured = {name: value["kl"] for name, value in result["measured"].items()}
    assert measured.keys() == {"transfer", "calibrate", "align"}
    assert result["fidelity"]["kl"] < measured["transfer"] and measured["align"] < measured["transfer"]


def test_the_same_recipe_gives_the_same_bits(first: Path, teacher: Path, story_file: Path, tmp_path: Path) -> None:
    runner.run(recipe(teacher, story_file, tmp_path / "second"))
    again, before = weights(tmp_path / "second"), weights(first)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_stopped_by_a_signal_and_resumed(first: Path, teacher: Path, story_file: Path, tmp_path: Path) -> None:
    class Stopper(runner.Silent):
        def update(self, tokens: int, **metrics: float) -> None:
            if tokens > 1500:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    out = tmp_path / "stopped"
    result = runner.run(recipe(teacher, story_file, out), progress=Stopper())
    assert result["status"] == "stopped" and result["stage"] == "align" and "--resume" in result["table"]
    assert not (out / "result.json").exists()
    assert runner.run(recipe(teacher, story_file, out), resume=True)["status"] == "complete"
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(first).items())
    again = runner.run(recipe(teacher, story_file, out), resume=True)
    assert again["status"] == "complete" and again["table"]


def test_a_hybrid_starts_from_aligned_mixers(first: Path, teacher: Path, story_file: Path, tmp_path: Path) -> None:
    changes = ["layers.keep=1", "stages=[{transfer: {}}, {glue: {tokens: 1k, batch: 4, lr: 1e-9}}]"]
    wanted = [change for change in SMALL if not change.startswith("stages")]
    given = [f"teacher.model={teacher}", f"data.source={story_file}", f"save.dir={tmp_path / 'hybrid'}"]
    runner.run(loader.load("gated_deltanet", [*given, *wanted, *changes]), start=first)
    report = json.loads((tmp_path / "hybrid" / "transfer.json").read_text())
    assert report.keys() == {"0", "2"} and all("align-" in report[layer]["from"] for layer in report)
    aligned = load_file(next((first / "checkpoints").glob("align-*")) / "weights.safetensors")
    made = weights(tmp_path / "hybrid")
    torch.testing.assert_close(
        made["model.layers.2.self_attn.q_proj.weight"], aligned["2.q_proj.weight"], rtol=0, atol=1e-6
    )


def test_kept_attention_is_changed_from_glue_on(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    changes = ["layers.keep=1", "layers.attention.rope=false", "layers.attention.window=16", "stages.align.tokens=1k"]
    runner.run(recipe(teacher, story_file, tmp_path / "run", *changes))
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["kept_attention"] == {"rope": False, "logit_scale": None, "window": 16}
    again = export(tmp_path / "run", "last", tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["kept_attention"] == config["kept_attention"]
    # Before glue the kept layer is as it was, and the mixers know nothing of it.
    runner.run(recipe(teacher, story_file, tmp_path / "plain", "layers.keep=1", "stages.align.tokens=1k"))
    measured, plain = (json.loads((tmp_path / n / "result.json").read_text())["measured"] for n in ("run", "plain"))
    assert measured["align"]["kl"] == plain["align"]["kl"]


def test_a_run_of_another_teacher_is_refused(first: Path, make_teacher: Any, story_file: Path, tmp_path: Path) -> None:
    other = make_teacher("llama", num_hidden_layers=4)
    with pytest.raises(UserError, match=r"first: holds another run.*teacher"):
        runner.run(recipe(other, story_file, first), resume=True)


def test_a_folder_with_other_things_is_left_alone(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="is not a run of relinear"):
        runner.run(recipe(teacher, story_file, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"One short line.", "fewer|too short|one row|sequence"),
        (b"\xff\xfe\x00\x81" * 50, "UTF-8|text"),
    ],
    ids=["empty", "short", "binary"],
)
def test_bad_text_ends_before_work(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    import re

    text = tmp_path / "text.txt"
    text.write_bytes(content)
    arguments = ["run", "rwkv7", f"teacher.model={teacher}", f"data.source={text}", *SMALL]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(text) in errors[0] and re.search(words, errors[0]), errors
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_full_disk_ends_with_exit_code_3_and_harms_nothing(
    first: Path,
    teacher: Path,
    story_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import errno

    out = tmp_path / "run"
    runner.run(recipe(teacher, story_file, out, "stages.align.tokens=2k"), max_hours=0.0)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    sync = files.sync

    def full(path: Path) -> None:
        if "checkpoints" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(files, "sync", full)
    arguments = ["run", "gated_deltanet", f"teacher.model={teacher}", f"data.source={story_file}", *SMALL]
    assert main([*arguments, "stages.align.tokens=2k", "--out", str(out), "--resume"]) == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "space" in errors[0]
    for path, content in before.items():
        if "checkpoints" in str(path):
            assert path.read_bytes() == content
    monkeypatch.setattr(files, "sync", sync)
    assert main([*arguments, "stages.align.tokens=2k", "--out", str(out), "--resume"]) == 0


def test_converting_nothing_exports_the_teacher_itself(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    from relinear.distill.teacher import load_model, load_teacher

    given = [f"teacher.model={teacher}", f"data.source={story_file}", f"save.dir={tmp_path / 'run'}"]
    result = runner.run(loader.load("rwkv7", [*given, "layers.convert=none", "stages=[{transfer: {}}]"]))
    assert result["fidelity"]["kl"] == 0.0 and result["fidelity"]["perplexity_ratio"] == 1.0
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        same = load_model(result["export"])[0](ids).logits
        assert torch.equal(same, load_teacher(teacher).model(ids).logits)


def test_wandb_gets_the_metrics(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, Any]] = []
    given: list[dict[str, Any]] = []
    made = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append({"finished": 1.0}))
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: given.append(options) or made  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    runner.run(recipe(teacher, story_file, tmp_path / "a run", "track.wandb=mine"))
    assert (given[0]["project"], given[0]["name"], given[0]["id"]) == ("mine", "a run", "a-run")
    assert given[0]["dir"] == str(tmp_path / "a run") and given[0]["mode"] == "online"
    lines = files.read_metrics(tmp_path / "a run" / "metrics.jsonl")
    for stage in ("align", "glue"):
        sent = [record[f"{stage}/loss"] for record in logged if f"{stage}/loss" in record]
        assert sent[-1] == [line["loss"] for line in lines if line["stage"] == stage and "loss" in line][-1]
    assert {"align/losses/layer 0", "align/grad_norm/layer 2", "glue/eval/kl", "step"} <= {k for r in logged for k in r}
    assert logged[-1] == {"finished": 1.0}


def test_what_this_version_cannot_do_is_refused(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is converted"):
        runner.run(recipe(teacher, story_file, tmp_path / "run", "layers.convert=none"))
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="sees no GPU"):
            runner.run(recipe(teacher, story_file, tmp_path / "run", "engine.device=cuda"))
    assert not (tmp_path / "run").exists()


def test_more_layers_start_from_the_mixers_of_fewer(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    glue = {"tokens": "1k", "batch": 4, "lr": 1e-2, "warmup": 1, "train": "mixers"}
    changes = [f"stages={[{'transfer': {}}, {'glue': glue}]}", "data.seq_len=64", "eval.tokens=1k"]
    given = [f"teacher.model={teacher}", f"data.source={story_file}", *changes]
    runner.run(loader.load("gated_deltanet", [*given, f"save.dir={tmp_path / 'half'}", "layers.keep=1"]))
    runner.run(loader.load("gated_deltanet", [*given, f"save.dir={tmp_path / 'all'}"]), start=tmp_path / "half")
    report = json.loads((tmp_path / "all" / "transfer.json").read_text())
    assert {layer: "from" in entry for layer, entry in report.items()} == {"0": True, "1": False, "2": True}
    assert report["0"]["transferred"] == []
