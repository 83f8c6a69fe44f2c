"""The commands on real parts: a tiny teacher is planned, converted, measured, exported, verified and used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relinear.distill.manifest import check_manifest
from relinear.launch.main import main

SMALL = [
    "stages.calibrate.tokens=1k",
    "stages.align.tokens=8k",
    "stages.glue.tokens=8k",
    "data.seq_len=64",
    "eval.tokens=1k",
]


@pytest.fixture(scope="module")
def llama2(make_teacher) -> Path:
    """A teacher of two layers."""
    return make_teacher("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def finished(llama2, story_file, tmp_path_factory) -> Path:
    """A run folder that `relinear run` left."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    assert main(["run", "gated_deltanet", *given(llama2, story_file), *SMALL, "--out", str(folder)]) == 0
    return folder


def given(teacher: Path, text: Path) -> list[str]:
    return [f"teacher.model={teacher}", f"data.source={text}"]


def test_a_run_leaves_what_it_promises(finished):
    assert (finished / "export" / "config.json").exists()
    for name in ("result.json", "metrics.jsonl", "recipe.yaml"):
        assert (finished / name).stat().st_size > 0
    result = json.loads((finished / "result.json").read_text())
    assert result["status"] == "complete" and result["fidelity"]["kl"] >= 0
    assert all(json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines())


def test_recall_at_the_end_of_a_run(make_teacher, story_file, tmp_path, monkeypatch):
    monkeypatch.setattr("relinear.eval.suite.LENGTHS", (300,))
    monkeypatch.setattr("relinear.eval.suite.SAMPLES", 1)
    teacher = make_teacher("llama", num_hidden_layers=2, max_position_embeddings=400)
    changes = [*given(teacher, story_file), *SMALL, "stages.align.tokens=1k", "stages.glue.tokens=1k"]
    assert main(["run", "gated_deltanet", *changes, "eval.suite=recall", "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["fidelity"]["kl"] >= 0
    assert set(result["recall"]["tasks"]["needle"]["models"]) == {"teacher", "student"}
    assert "needle-number" in (tmp_path / "run" / "result.txt").read_text()
    assert (tmp_path / "run" / "recall" / "recall-needle.png").exists()


def test_the_resolved_recipe_is_a_recipe(finished, capsys):
    assert main(["check", str(finished / "recipe.yaml")]) == 0
    capsys.readouterr()
    assert main(["show", str(finished / "recipe.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["seq_len"] == 64


def test_run_again_is_refused_and_harms_nothing(finished, llama2, story_file, capsys):
    def times():
        """The lock says who had it last."""
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "run.lock"}

    before = times()
    arguments = ["run", "rwkv7", *given(llama2, story_file), *SMALL, "--out", str(finished)]
    for extra in ([], ["--resume"]):
        assert main([*arguments, *extra]) == 2
        assert str(finished) in capsys.readouterr().err
    assert before == times()


def test_dry_run_writes_nothing(llama2, story_file, tmp_path, capsys):
    arguments = ["run", "rwkv7", *given(llama2, story_file), "--out", str(tmp_path / "run"), "--dry-run", "--json"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["teacher"]["layers"] == 2
    assert "relinear run rwkv7" in err and f"save.dir={tmp_path / 'run'}" in err
    assert not (tmp_path / "run").exists()


def test_max_hours_stops_and_resume_finishes(llama2, story_file, tmp_path, capsys):
    arguments = ["run", "rwkv7", *given(llama2, story_file), *SMALL, "--out", str(tmp_path / "run")]
    assert main([*arguments, "--max-hours", "1e-6", "--json"]) == 75
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "stopped"
    assert err.rstrip().splitlines()[-1].endswith("--resume")
    assert main([*arguments, "--resume", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["status"] == "complete" and "table" not in json.loads(out)


def test_eval_prints_every_figure_with_its_error(finished, llama2, story_file, tmp_path, capsys):
    arguments = ["eval", str(finished / "export"), "--against", str(llama2), "--text", str(story_file)]
    arguments += ["--out", str(tmp_path)]  # what the run stored stays the newest of its folder
    assert main([*arguments, "--max-tokens", "2000", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert {"student", "teacher", "perplexity_ratio", "kl", "top1_agreement", "tokens"} <= set(found)
    for side in ("student", "teacher"):
        assert found[side]["perplexity"] > 1 and found[side]["perplexity_stderr"] > 0
    for figure in ("perplexity_ratio", "kl", "top1_agreement"):
        assert found[f"{figure}_stderr"] >= 0
    assert found["perplexity_ratio"] == pytest.approx(found["student"]["perplexity"] / found["teacher"]["perplexity"])
    assert 0 < found["tokens"] <= 2000 and "quick done" in err
    assert main([*arguments, "--max-tokens", "2000"]) == 0
    assert "perplexity_ratio" in capsys.readouterr().out


def test_a_run_stores_what_it_measured_and_eval_finds_it(finished, capsys, monkeypatch):
    """`relinear eval RUN/export` alone: the run's teacher, its held-out text, and the result that is there."""
    from relinear.eval.models import Models

    stored = json.loads((finished / "eval" / "quick.json").read_text())
    assert stored["kl"] == json.loads((finished / "result.json").read_text())["fidelity"]["kl"]
    assert stored["suite"] == "quick" and stored["seconds"] > 0
    assert {"models", "checkpoints", "settings", "versions", "key"} <= set(stored)
    assert len(stored["checkpoints"]["teacher"]) == len(stored["checkpoints"]["student"]) == 64
    export = str(finished / "export")
    with monkeypatch.context() as patch:
        patch.setattr(Models, "get", lambda *_: pytest.fail("a model was loaded"))
        assert main(["eval", export, "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == stored and "measured before" in err
    assert main(["eval", export, "--json", "--again"]) == 0
    again = json.loads(capsys.readouterr().out)
    same = ("student", "teacher", "kl", "top1_agreement", "tokens", "documents", "seq_len", "key", "checkpoints")
    assert {name: again[name] for name in same} == {name: stored[name] for name in same}
    assert main(["eval", export, "--against", "none", "--json", "--max-tokens", "300"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert "kl" not in alone and alone["checkpoints"]["teacher"] is None
    assert len(list((finished / "eval" / "earlier").iterdir())) == 1
    assert check_manifest(finished) == []  # results may come and go: the manifest does not hold them


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> Path:
    """A data folder for three of the shipped tasks: choices, last words, generated numbers."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "foundry").mkdir()
    options = ["it was dark.", "Mia gave them."]
    questions = [{"query": f"Tom had {n} balls, because", "choices": options, "gold": n % 2} for n in range(9)]
    words = [{"context": f"Tom had a {w}. Mia saw the", "continuation": w} for w in ("ball", "kite", "dog")]
    sums = [{"context": f"Tom has {n} balls.", "answer": str(n)} for n in range(5)]
    for name, rows in (("copa", questions), ("lambada_openai", words), ("svamp", sums)):
        (folder / "foundry" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_all_suites_that_can_run(finished, choices, tmp_path, monkeypatch, capsys):
    from relinear.eval import suites

    monkeypatch.setattr("relinear.eval.suite.LENGTHS", (100,))
    monkeypatch.setattr("relinear.eval.suite.SAMPLES", 1)
    arguments = ["eval", str(finished / "export"), "--out", str(tmp_path / "results"), "--max-new-tokens", "8"]
    arguments += ["--suite", "all", "--data", str(choices), "--max-tokens", "500"]
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found) - {"left_out"} == {"quick", "recall", "core", "generation"}, found["left_out"]
    assert list(found["left_out"]) == ["long", "mt_bench"] and "Left out: mt_bench: --questions FILE" in err
    assert "no document of 256 tokens" in found["left_out"]["long"]
    assert found["core"]["tasks"]["local_copa"]["n"] == 9 and found["core"]["tasks"]["local_copa"]["recovery"]
    files = {path.stem for path in (tmp_path / "results").glob("*.json")}
    assert files == set(suites.SUITES) - {"long", "mt_bench"}
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err.count("measured before") == 4 and "local_copa" in out and "completions beside" in out


@pytest.mark.slow
@pytest.mark.parametrize("task", ["local_copa", "local_lambada", "local_svamp"])
def test_the_figures_are_those_of_lm_eval(finished, choices, task, tmp_path, capsys):
    """The harness's own command, on the exported folder with the code in it: every answer, digit for digit."""
    results, export = tmp_path / "results", str(finished / "export")
    arguments = ["eval", export, "--suite", "core", "--data", str(choices), "--tasks", task, "--batch", "4"]
    assert main([*arguments, "--out", str(results), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={export},trust_remote_code=True", "--tasks", task, "--log_samples"]
    command += ["--include_path", str(results / "tasks"), "--output_path", str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"][task]
    figures = {key: value for key, value in theirs.items() if "," in key and "_stderr" not in key}
    mine = ours["tasks"][task]["figures"]
    assert figures and {key: figure["student"]["value"] for key, figure in mine.items()} == figures
    for key, figure in mine.items():
        metric, _, chosen = key.partition(",")
        assert figure["student"]["stderr"] == theirs[f"{metric}_stderr,{chosen}"]
    parts = [json.loads(path.read_text()) for path in (results / "parts" / "core").glob("*.json")]
    (part,) = [part for part in parts if part["model"] == ours["checkpoints"]["student"]]
    (samples,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert _written(part["leaves"][task]["answers"]) == [row["filtered_resps"] for row in rows]


def _written(value: Any) -> Any:
    """Answers as lm_eval logs them: every number as text, with all its digits."""
    return [_written(entry) for entry in value] if isinstance(value, list) else str(value)


def test_generate_is_greedy_or_seeded(finished, capsys):
    def text(*more: str) -> str:
        assert main(["generate", str(finished / "export"), "--prompt", "Tom had", "--max-new-tokens", "12", *more]) == 0
        return capsys.readouterr().out

    assert text() == text() and text().startswith("Tom had")
    hot = ["--temperature", "2.0", "--seed"]
    assert text(*hot, "1") == text(*hot, "1") != text(*hot, "2")
    assert json.loads(text("--json"))["new_tokens"] <= 12


def test_export_of_another_step_and_verify(finished, tmp_path, capsys):
    out = tmp_path / "again"
    assert main(["export", str(finished), "--step", "last", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert main(["export", str(finished), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(finished), "--step", "7654321", "--out", str(tmp_path / "no")]) == 2
    assert main(["verify", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    checks = json.loads(captured.out)["checks"]
    assert checks and all(check["ok"] for check in checks.values())


def test_a_damaged_export_does_not_verify(finished, tmp_path, capsys):
    """A checkpoint whose weights were cut off ends in an error, not in a success or a traceback."""
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(finished / "export", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert main(["verify", str(folder)]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error:") and "unexpected" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "EXPORT", "--against", "TEACHER", "--text", "nofile.txt"], "nofile.txt"),
        (["eval", "EXPORT", "--against", "nowhere", "--text", "TEXT"], "nowhere"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere"),
        (["generate", "QWEN", "--prompt", ""], "--prompt"),
        (["export", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "nowhere"),
        (["verify", "TEACHER"], "not relinear"),
        (["run", "rwkv7", "teacher.model=EXPORT", "data.source=TEXT"], "EXPORT"),
        (["check", "rwkv7", "teacher.model=TEACHER", "data.source=nofile.txt"], "data.source"),
        (["plan", "rwkv7", "teacher.model=TEACHER", "data.source=TEXT", "--gpu", "B52"], "--gpu B52"),
        (["plan", "rwkv7", "teacher.model=TEACHER", "data.source=TEXT", "layers.keep=7"], "7"),
    ],
)
def test_wrong_input_of_commands(finished, llama2, qwen2, story_file, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    places = {"EXPORT": str(finished / "export"), "TEACHER": str(llama2), "QWEN": str(qwen2), "TEXT": str(story_file)}
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
        words = words.replace(word, place)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], err
    assert list(tmp_path.iterdir()) == []
