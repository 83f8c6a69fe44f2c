"""The arms of `bench methods`, what is computed from their curves, and what is written of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from relinear.distill.errors import UserError
from relinear.launch.bench_text import methods_text
from relinear.recipes import bench_methods as bench
from relinear.recipes import bench_methods_arms as arms
from relinear.recipes import bench_methods_report as reports
from relinear.recipes import loader, methods_index
from relinear.recipes import plan as planner
from relinear.recipes.bench_methods_stats import Mean, corrected, mean, said, standings, tokens_to
from relinear.recipes.schema import TrainingStage

ROOT = Path(__file__).resolve().parents[3]
NAMES = [name.partition("/")[2] for name in loader.methods()]
TEACHER = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
ABLATIONS = {
    "relinear_window": {"mixers"},
    "relinear_hybrid": {"layers"},
    "relinear_no_conv": {"mixers"},
    "relinear_apart": {"stages"},
    "mlp_frozen": {"stages"},
    "align_skipped": {"stages"},
    "window_alone": {"layers", "mixers"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> arms.Place:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "config.json").write_text(json.dumps(TEACHER))
    (folder / "text.txt").write_text("One.\n")
    return arms.Place(str(folder), str(folder / "text.txt"), None, 600_000)


def made(name: str, place: arms.Place, rates: arms.Rates | None = None, kept: int | None = None) -> list[Any]:
    return arms.recipes(name, place, 1, rates or arms.Rates(), kept, Path("work"))


def test_the_methods_are_the_files_in_the_folder() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes" / "methods").glob("*.yaml")) == NAMES
    assert set(arms.names()) == set(NAMES) - {"mamba_in_llama_half"}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_planned_and_says_where_it_comes_from(name: str, place: arms.Place) -> None:
    fields = arms.header(name)
    assert {"title", "Paper", "Faithful", "Scaled", "Left out"} <= set(fields) and fields["title"].endswith(".")
    published = not name.startswith("relinear") and name != "window_alone"
    assert ("arXiv" in fields["Paper"]) == published
    recipe = loader.load(f"methods/{name}", [f"teacher.model={place.teacher}", f"data.source={place.text}"])
    plan = planner.plan(recipe)
    unused = name == "window_alone"  # it has the options of the default's mixer too
    odd = [note for note in plan.notes if "no layer" in note and not unused]
    assert plan.layers.converted and not odd


@pytest.mark.parametrize("name", arms.names())
def test_every_arm_gets_the_same_tokens(name: str, place: arms.Place) -> None:
    stages = [s for recipe in made(name, place) for s in recipe.stages if isinstance(s, TrainingStage)]
    assert abs(sum(stage.tokens for stage in stages) - place.tokens) < len(stages)
    for stage in stages:
        assert stage.warmup <= stage.tokens / (stage.batch * 512) / 10
        assert planner.stage_settings(made(name, place)[-1], stage, 512)["seq_len"] == 512


def test_groups(place: arms.Place) -> None:
    shapes = {name: arms.shape(made(name, place)[-1]) for name in arms.names()}
    groups = {group: {n for n, s in shapes.items() if s.group == group} for group in arms.GROUPS}
    assert groups["window"] == {"lolcats", "liger", "relinear_window", "window_alone"}
    assert groups["hybrid"] == {"halo", "kl_guided", "relinear_hybrid"}
    assert {shapes[name].window for name in groups["window"]} == {32}
    assert {len(shapes[name].kept) for name in groups["hybrid"]} == {1}
    assert shapes["relinear_no_conv"].state_bytes == shapes["radlads"].state_bytes == 8 * 8 * 8 * 4
    assert shapes["relinear_window"].window_bytes == 2 * 32 * 64 * 4 and shapes["relinear_window"].reach == 31 * 5
    assert arms.shape(made("halo", place, kept=3)[-1]).kept == [3]


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_an_ablation_differs_in_what_it_says_only(name: str, place: arms.Place) -> None:
    default, other = (made(n, place)[0].to_dict() for n in ("relinear", name))
    different = {key for key in default if default[key] != other[key]} - {"save"}
    assert different == ABLATIONS[name]
    if name == "align_skipped":
        glue = {n: {next(iter(s)): next(iter(s.values())) for s in d["stages"]} for n, d in
                (("default", default), ("other", other))}  # fmt: skip
        assert glue["default"].keys() - glue["other"].keys() == {"align"}
        changed = {k for k, v in glue["default"]["glue"].items() if glue["other"]["glue"][k] != v}
        assert changed <= {"tokens", "warmup", "loss"}  # a warm-up is at most a tenth of its stage
        weights = {n: g["glue"]["loss"] for n, g in glue.items()}
        assert weights["other"] == weights["default"] | {"align": 0.0}


def test_rates_are_scaled_apart(place: arms.Place) -> None:
    own, scaled = made("radlads", place)[0], made("radlads", place, arms.Rates(3.0, 0.5, 4))[0]
    before, after = scaled.stage("align"), scaled.stage("glue")
    assert (before.lr, before.lr_final) == pytest.approx((3 * own.stage("align").lr, 3 * own.stage("align").lr_final))
    assert after.lr == 0.5 * own.stage("glue").lr and before.batch == after.batch == 4


def test_unknown_arms_are_refused() -> None:
    with pytest.raises(UserError, match=r"no arm 'radlad'\. Did you mean radlads"):
        arms.chosen("relinear,radlad")
    assert arms.chosen("radlads, relinear,radlads") == ["radlads", "relinear"]


def test_the_index_is_made_from_the_headers() -> None:
    page = (ROOT / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    assert page == methods_index.markdown()


def curve(*points: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"tokens": tokens, "ratio": ratio, "kl": ratio - 1, "stage": "glue"} for tokens, ratio in points]


def test_tokens_to_is_linear_in_log_tokens() -> None:
    assert tokens_to(curve((0, 9), (100, 2.0), (400, 1.0)), 1.5) == pytest.approx(200)
    assert tokens_to(curve((0, 2.0), (100, 1.0)), 1.25) == pytest.approx(75)
    assert tokens_to(curve((0, 1.05), (100, 1.2)), 1.1) == 0
    assert tokens_to(curve((50, 1.05)), 1.1) == 50
    assert tokens_to(curve((0, 3.0), (100, 1.2)), 1.1) is None
    assert tokens_to(curve((10, 1.2), (20, 1.0), (30, 1.3)), 1.1) == pytest.approx(math.sqrt(10 * 20))
    assert tokens_to([], 1.1) is None


def test_means_and_their_errors() -> None:
    made = mean([1.0, 2.0, 3.0])
    assert made.value == 2.0 and made.stderr == pytest.approx(1 / math.sqrt(3)) and made.n == 3
    assert mean([1.0], fallback=0.5) == Mean(1.0, 0.5, 1)


def test_ties_are_corrected_for_the_number_of_comparisons() -> None:
    assert corrected(1) == pytest.approx(1.0) and corrected(2) == pytest.approx(1.41, abs=0.01)
    error = math.sqrt(0.5)  # so that a difference's error is one
    two = standings({"a": Mean(0.0, error, 3), "b": Mean(1.2, error, 3)})
    assert [standing.tied for standing in two] == [True, False] and two[1].errors == pytest.approx(1.2)
    # The same difference among more comparisons counts no longer; a larger one still does.
    many = {"a": Mean(0.0, error, 3), "b": Mean(1.2, error, 3), "c": Mean(1.3, error, 3), "d": Mean(9.0, error, 3)}
    assert {s.name: s.tied for s in standings(many)} == {"a": True, "b": True, "c": True, "d": False}
    best = standings({"a": Mean(0.2, 0.01, 3), "b": Mean(0.9, 0.01, 3)}, lower=False)
    assert best[0].name == "b" and not best[1].tied
    assert [s.tied for s in standings({"a": Mean(0.1, None, 1), "b": Mean(0.2, None, 1)})] == [True, False]


def test_who_is_first_is_said() -> None:
    found = standings({"a": Mean(0.0, 0.1, 3), "b": Mean(0.05, 0.1, 3), "c": Mean(5.0, 0.1, 3)})
    assert said(found, "a") == "a: tied for first with b" and said(found, "b") == "b: tied for first with a"
    assert said(found, "c").startswith("c: place 3 of 3, behind a, b, 35.4 standard errors")
    assert said(standings({"a": Mean(0.0, 0.1, 3), "c": Mean(5.0, 0.1, 3)}), "a") == "a: first of 2"
    assert said(found, "d") == ""


def result(arm: str, seed: int, last: float, group: str = "linear", **more: Any) -> dict[str, Any]:
    points = curve((0, 30.0 + seed), (100_000, 2.0), (300_000, 1.5 + 0.01 * seed), (600_000, last))
    fidelity = {f"{key}{end}": value for key, value in (("perplexity_ratio", last), ("kl", last - 1),
                ("top1_agreement", 0.9)) for end, value in (("", value), ("_stderr", 0.01))}  # fmt: skip
    about = {"window": 0, "state_bytes": 2048, "window_bytes": 0, "kept": [], "reach": 0, "calibration_tokens": 0}
    spent = {"tokens": 600_100, "seconds": 70.0, "rates": {"before": 1.0, "after": 1.0, "batch": None}}
    return {"arm": arm, "seed": seed, "teacher": "toy", "key": "k", "status": "complete", "group": group, **about,
            **spent, "curve": points, "fidelity": fidelity} | more  # fmt: skip


@pytest.fixture
def results() -> list[dict[str, Any]]:
    cells = [{"pairs": 4, "distance": d, "accuracy": a, "stderr": 0.05, "n": 64} for d, a in ((0, 1.0), (384, 0.2))]
    alone = {"kl": 0.3, "kl_stderr": 0.01, "recall": {"cells": cells}}
    better = {"cells": [{**cell, "accuracy": 0.9} for cell in cells]}
    both = {"both": {"kl": 0.05, "kl_stderr": 0.01, "recall": better}, "window": alone, "linear": alone}
    found = [result("relinear", seed, 1.02 + 0.001 * seed) for seed in range(3)]
    found += [result("radlads", seed, 1.09 + 0.001 * seed) for seed in range(3)]
    found += [result("mohawk", seed, 1.3) for seed in range(3)]
    window = {"window": 32, "window_bytes": 16384, "reach": 128, "branches": both}
    found += [result("relinear_window", seed, 1.01, "window", **window) for seed in range(3)]
    failed = {"arm": "liger", "seed": 0, "teacher": "toy", "key": "k", "status": "failed", "error": "ValueError: no"}
    return [*found, failed]


def test_the_table_says_what_follows(results: list[dict[str, Any]]) -> None:
    text = methods_text(reports.summary(results))
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "toy: Every layer converted, no window" in text and "2 KiB" in lines["relinear"]
    assert "not within 600k" in lines["mohawk"] and " se" in lines["mohawk"]
    assert "final KL: relinear: first of 3" in text
    assert "tokens to 1.1: relinear needs" in text and "of its tokens" in text
    assert "relinear_window: KL 0.0500 and 0.3000 with its linear branch and without; the linear branch helps" in text
    assert "recall 0.90 and 0.20 over more than 128 tokens" in text
    assert text.endswith("Failed\nliger, seed 0: ValueError: no")


def test_arms_of_equal_state_are_compared_apart(results: list[dict[str, Any]]) -> None:
    for entry in results:
        entry["state_bytes"] = 4096 if entry["arm"] == "relinear" else 2048
    results += [result("relinear_no_conv", seed, 1.05 + 0.001 * seed) for seed in range(3)]
    said = reports.summary(results)["teachers"]["toy"]["linear"]["said"]
    assert said[0] == "final KL: relinear: first of 4"
    assert said[1] == "final KL of arms that carry at most 2 KiB a layer: relinear_no_conv: first of 3"


def test_what_is_not_reached_has_no_mean(results: list[dict[str, Any]]) -> None:
    results[0]["curve"] = curve((0, 3.0), (600_000, 1.2))
    group = reports.summary(results)["teachers"]["toy"]["linear"]
    row = next(row for row in group["arms"] if row["arm"] == "relinear")
    assert row["to_target"]["reached"] == 2 and row["to_target"]["mean"] is None
    assert any("relinear reaches it with 2 of 3 seeds" in sentence for sentence in group["said"])


def test_page_and_plots_are_written_and_made_again_alike(results: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "methods"
    trials = [{"rates": {"before": 1.0, "after": 1.0, "batch": None}, "kl": 0.2}, {"rates": {}, "kl": None}]
    tuned = {"toy": {"radlads": {**trials[0], "at_the_edge": True, "trials": trials}}}
    reports.write(out, results, tuned)
    page = tmp_path / "methods.md"
    first = {path: path.read_bytes() for path in (page, *out.iterdir())}
    assert {path.name for path in out.iterdir()} == {"summary.json", "curves-toy.png", "kl-toy.png"}
    text = page.read_text(encoding="utf-8")
    assert "| relinear | " in text and "- Final KL: relinear: first of 3." in text
    assert "| radlads | 1 | 1 (edge of the grid) | own | 2 | 0.2000 | 0.2000 |" in text
    assert "curves" not in json.loads((out / "summary.json").read_text())["teachers"]["toy"]["linear"]["arms"][0]
    reports.write(out, results, tuned)
    assert first == {path: path.read_bytes() for path in (page, *out.iterdir())}


def test_an_empty_folder_has_no_results(tmp_path: Path) -> None:
    assert bench.results(tmp_path) == []
