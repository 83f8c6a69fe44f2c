"""A whole grid of `bench methods` on a random teacher: run, resumed, reported; a failing arm stops nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relinear.distill.errors import UserError
from relinear.launch.main import main
from relinear.recipes import bench_methods as bench
from relinear.recipes import bench_methods_arms as arms
from relinear.recipes import bench_methods_job as jobs
from relinear.recipes.bench_methods_stats import tokens_to

ARMS = ("mamba_in_llama", "lolcats")  # one stage; align, adapters and a window


@pytest.fixture(scope="module")
def teacher(make_teacher: Any) -> Path:
    return make_teacher("llama", num_hidden_layers=2, max_position_embeddings=64)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few held-out tokens as still measure something."""
    monkeypatch.setattr(arms, "EVALUATIONS", 3)
    monkeypatch.setattr(arms, "EVAL_TOKENS", 500)
    monkeypatch.setattr(jobs, "BRANCH_TOKENS", 500)


def grid(teacher: Path, text: Path, out: Path, **changes: Any) -> bench.Grid:
    place = bench.Place(str(teacher), str(text), None, 3000)
    return bench.Grid(place, changes.pop("arms", ARMS), 1, out / "results", out / "work", **changes)


def test_a_grid_runs_resumes_and_is_reported(
    teacher: Path, story_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = grid(teacher, story_file, tmp_path)
    talked: list[str] = []
    assert bench.run_grid(wanted, talked.append) == {"complete": 2, "failed": 0, "missing": 0}
    assert any("2 jobs of 3k tokens each, 1 at a time: about" in line for line in talked)
    found = {entry["arm"]: entry for entry in bench.results(wanted.out)}
    window = found["lolcats"]
    assert (window["group"], found["mamba_in_llama"]["group"], window["window"]) == ("window", "linear", 32)
    assert window["tokens"] >= 3000 and abs(window["tokens"] - found["mamba_in_llama"]["tokens"]) < 300
    assert [p["tokens"] for p in window["curve"]] == sorted(p["tokens"] for p in window["curve"])
    assert {"align", "glue"} <= {p["stage"] for p in window["curve"]} and window["curve"][0]["tokens"] == 0
    assert set(window["branches"]) == {"both", "window", "linear"} and window["branches"]["window"]["kl"] > 0
    assert not (wanted.work / window["key"]).exists()
    assert "/" not in json.dumps([e for e in found.values() if e.pop("environment")])
    written = {path: path.stat().st_mtime_ns for path in wanted.out.iterdir()}
    talked.clear()
    bench.run_grid(wanted, talked.append)
    assert talked == [f"2 of 2 results are there already, in {wanted.out}"]
    assert {path: path.stat().st_mtime_ns for path in wanted.out.iterdir()} == written
    assert main(["bench", "methods", "--report", "--out", str(wanted.out)]) == 0
    printed = capsys.readouterr().out
    assert f"{teacher.name}: Every layer converted, no window" in printed and "lolcats: KL" in printed
    page = wanted.out.with_name("results.md").read_text()
    assert "| arm |" in page and "(results/curves-" in page
    assert {path.suffix for path in wanted.out.iterdir()} == {".json", ".png"}


def test_a_failing_arm_is_recorded_and_the_others_run(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jobs.run

    def run(recipe: Any, **options: Any) -> Any:
        if recipe.layers.mixer == "rwkv7":
            raise ValueError(f"{recipe.teacher.model}: on purpose\nand more")
        return real(recipe, **options)

    monkeypatch.setattr(jobs, "run", run)
    wanted = grid(teacher, story_file, tmp_path, arms=("radlads", "mamba_in_llama"))
    talked: list[str] = []
    assert bench.run_grid(wanted, talked.append) == {"complete": 1, "failed": 1, "missing": 0}
    record = json.loads((wanted.out / f"{teacher.name}-radlads-s0.json").read_text())
    assert record["error"] == f"ValueError: {teacher.name}: on purpose"  # no path: results are published
    assert any(f"failed: {record['error']}" in line for line in talked)


def test_what_was_stopped_goes_on(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = grid(teacher, story_file, tmp_path, arms=("mamba_in_llama",))
    real = jobs.run
    monkeypatch.setattr(jobs, "run", lambda recipe, **options: {"status": "stopped"})
    with pytest.raises(KeyboardInterrupt):
        bench.run_grid(wanted, lambda text: None)
    assert bench.results(wanted.out) == []
    monkeypatch.setattr(jobs, "run", real)
    assert bench.run_grid(wanted, lambda text: None)["complete"] == 1


def test_keys_are_stable_and_follow_the_content(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    first = grid(teacher, story_file, tmp_path)
    other = grid(teacher, story_file, tmp_path / "elsewhere", jobs=2, keep_runs=True)

    def key(of: bench.Grid, arm: str = "radlads", seed: int = 0, rates: arms.Rates | None = None) -> str:
        return bench.job_of(of, arm, seed, rates or arms.Rates()).key

    assert key(first) == key(first) == key(other)
    text = tmp_path / "text.txt"
    text.write_text(story_file.read_text() + "\nOnce more.\n")
    keys = {
        key(first),
        key(first, seed=1),
        key(first, arm="relinear"),
        key(first, rates=arms.Rates(before=3.0)),
        key(first, rates=arms.Rates(batch=4)),
        key(grid(teacher, text, tmp_path)),
    }
    assert len(keys) == 6


def test_tuning_takes_the_lowest_kl_and_is_found_again(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = grid(teacher, story_file, tmp_path, arms=("relinear", "align_skipped"))
    ran: list[arms.Rates] = []

    def carry_out(job: jobs.Job) -> str:
        ran.append(job.rates)
        kl = abs(job.rates.before - 3) + abs(job.rates.after - 1 / 3) + (job.rates.batch != 4)
        made = {"arm": job.arm, "key": job.key, "status": "complete", "fidelity": {"kl": kl, "perplexity_ratio": 2.0}}
        Path(job.out).parent.mkdir(parents=True, exist_ok=True)
        Path(job.out).write_text(json.dumps(made))
        return "complete"

    monkeypatch.setattr(jobs, "carry_out", carry_out)
    monkeypatch.setattr(bench, "estimate", lambda left, grid, say: {job.key: 1.0 for job in left})
    bench.tune(wanted, lambda text: None)
    assert len(ran) == 9 + 5 + 2 * len(bench.BATCHES)
    assert bench.tuned_rates(wanted, "relinear", print) == arms.Rates(3.0, 1 / 3, 4)
    assert bench.tuned_rates(wanted, "radlads_published", print) == arms.Rates()
    held = bench.read(wanted.out / "tuned.json")[teacher.name]["relinear"]
    assert held["at_the_edge"] and len(held["trials"]) == 9 + len(bench.BATCHES)
    held["key"] = "another"
    (wanted.out / "tuned.json").write_text(json.dumps({teacher.name: {"relinear": held}}))
    said: list[str] = []
    assert bench.tuned_rates(wanted, "relinear", said.append) == arms.Rates() and "--tune" in said[0]


def test_curves_end_where_tokens_do() -> None:
    assert tokens_to([{"tokens": 0, "ratio": 3.0}, {"tokens": 10, "ratio": 2.0}]) is None


def test_the_kept_layer_is_chosen_once(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = grid(teacher, story_file, tmp_path, arms=("relinear_hybrid", "relinear"))
    monkeypatch.setattr("relinear.recipes.select.run.TEXT_TOKENS", 500)
    talked: list[str] = []
    bench.choose_kept(wanted, talked.append)
    held = bench.read(wanted.out / "kept.json")[teacher.name]
    assert held.keys() == {"relinear_hybrid"} and len(held["relinear_hybrid"]["scores"]) == 2
    layer = held["relinear_hybrid"]["layer"]
    assert bench.job_of(wanted, "relinear_hybrid", 0, arms.Rates()).kept == layer
    assert bench.job_of(wanted, "relinear", 0, arms.Rates()).kept is None
    assert talked[0] == "relinear_hybrid: choosing the kept layer by combined" and not any(wanted.work.iterdir())
    talked.clear()
    bench.choose_kept(wanted, talked.append)
    assert talked == []
    monkeypatch.setattr(arms, "VERSION", "another")
    monkeypatch.setattr("relinear.recipes.select.run.select", _refused)
    bench.choose_kept(wanted, talked.append)
    assert "no such luck. The recipe's own layer is kept" in talked[-1]


def _refused(*_: Any, **__: Any) -> Any:
    raise UserError("no such luck")
