"""The matrix stage in a recipe: plan, run, stop and resume, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relinear.distill.errors import UserError
from relinear.distill.matrix import choose_parameters
from relinear.distill.student import transfer
from relinear.distill.teacher import load_teacher
from relinear.mixers import registry
from relinear.recipes import costs, loader, plan, runner
from relinear.recipes.teacher_config import read_teacher_config

MATERIALISE = [n for n in registry.names() if not registry.spec(n).no_matrix(registry.spec(n).options())]

TEXT = """\
schema: 1
teacher: {model: embedded}
layers: {mixer: gated_deltanet, convert: all}
data: {source: embedded, seq_len: 32}
stages:
  - transfer: {}
  - matrix: {tokens: 2k, batch: 4, warmup: 2}
  - align: {tokens: 1k, batch: 4, warmup: 2}
eval: {tokens: 500, every: 500}
save: {every: 500}
"""


@pytest.fixture(scope="module")
def teacher(make_teacher: Any) -> Path:
    return make_teacher("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def recipe_of(teacher: Path, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("recipes") / "mohawk.yaml"
    path.write_text(TEXT, encoding="utf-8")

    def make(out: Path, *changes: str) -> Any:
        return loader.load(
            str(path), [f"teacher.model={teacher}", f"data.source={story_file}", f"save.dir={out}", *changes]
        )

    return make


@pytest.fixture(scope="module")
def run_folder(recipe_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    runner.run(recipe_of(out))
    return out


def test_a_run_trains_and_measures_it(run_folder: Path) -> None:
    result = json.loads((run_folder / "result.json").read_text())
    assert [stage["name"] for stage in result["stages"]] == ["matrix", "align"]
    assert result["measured"].keys() >= {"transfer", "matrix", "align"}
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval"]["score"] for line in lines if line["stage"] == "matrix" and "eval" in line]
    losses = [line["losses"] for line in lines if line["stage"] == "matrix" and "losses" in line]
    assert len(scores) > 2 and scores[-1] < scores[0]
    assert losses[0].keys() == {"layer 0", "layer 1"}


def test_stopped_and_resumed(run_folder: Path, recipe_of: Any, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    assert runner.run(recipe_of(out), max_hours=1e-9)["stage"] == "matrix"
    assert runner.run(recipe_of(out), resume=True)["status"] == "complete"
    again, before = (load_file(folder / "export" / "model.safetensors") for folder in (out, run_folder))
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_plan_counts_what_trains(recipe_of: Any, teacher: Path, tmp_path: Path) -> None:
    loaded = load_teacher(teacher)
    stage = plan.plan(recipe_of(tmp_path)).stage("matrix")
    mixers, _ = transfer(loaded, dict.fromkeys(range(2), ("gated_deltanet", {})))
    assert stage.trained == sum(m.get_parameter(key).numel() for m in mixers.values() for key in choose_parameters(m))
    align = plan.plan(recipe_of(tmp_path)).stage("align")
    assert 0 < stage.trained < align.trained
    assert stage.total_memory > align.total_memory and stage.flops / 2000 > align.flops / 1000


@pytest.mark.parametrize("name", MATERIALISE)
def test_costs_know_what_every_matrix_depends_on(name: str, teacher: Path) -> None:
    config = read_teacher_config(str(teacher), None, "")
    wide = {"window": 7} if hasattr(registry.spec(name).options(), "window") else {}
    loaded = load_teacher(teacher)
    plan_ = dict.fromkeys(range(2), (name, wide))
    mixers, _ = transfer(loaded, plan_)
    counts = costs.count(config, _layers(plan_))
    assert counts.mixing == sum(m.get_parameter(key).numel() for m in mixers.values() for key in choose_parameters(m))


def _layers(converted: dict[int, Any]) -> Any:
    class Layers:
        def __init__(self) -> None:
            self.converted = converted

        def layers_of(self, name: str) -> list[int]:
            return [layer for layer, (mixer, _) in converted.items() if mixer == name]

    return Layers()


def test_refused_before_work_starts(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "mamba", "layers.mixer=mamba")
    with pytest.raises(UserError, match=r"stages\.matrix: layer 0: mamba has no mixing matrix to train"):
        plan.plan(recipe)
    with pytest.raises(UserError, match=r"stages\.matrix: layer 0: mamba has no mixing matrix to train"):
        runner.run(recipe)


def test_order(recipe_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "late.yaml"
    swapped = TEXT.replace("- matrix:", "- keep:").replace("- align:", "- matrix:").replace("- keep:", "- align:")
    path.write_text(swapped, encoding="utf-8")
    with pytest.raises(UserError, match="matrix cannot follow align; the order is transfer, calibrate, matrix, align"):
        loader.load(str(path), [])
