"""`train: lora` in a recipe: plan, run, stop and resume, export, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relinear.distill import lora
from relinear.distill.errors import MachineError, UserError
from relinear.distill.export import export
from relinear.distill.glue import glue_stage
from relinear.distill.stage import StageSettings
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_model, load_teacher
from relinear.recipes import loader, plan, runner

TEXT = """\
schema: 1
teacher: {model: embedded}
layers: {mixer: gated_deltanet, convert: [0, 2]}
data: {source: embedded, seq_len: 32}
stages:
  - transfer: {}
  - glue: {tokens: 2k, batch: 4, warmup: 2, lr: 1e-2, train: lora}
  - extend: {tokens: 500, batch: 4, warmup: 1, seq_len: 48, train: lora, lora: {rank: 2, targets: [v_proj, up_proj]}}
eval: {tokens: 500, every: 500}
save: {every: 500}
"""


@pytest.fixture(scope="module")
def teacher(make_teacher: Any) -> Path:
    return make_teacher("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def recipe_of(teacher: Path, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("recipes") / "lora.yaml"
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


def test_the_export_is_an_ordinary_student(run_folder: Path, teacher: Path) -> None:
    result = json.loads((run_folder / "result.json").read_text())
    glue = result["stages"][0]
    changed = {name.split(".")[-2] for name in glue["changed_teacher_tensors"]}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert result["fidelity"]["kl"] < result["measured"]["transfer"]["kl"]
    model, _ = load_model(run_folder / "export")
    loaded = load_teacher(teacher)
    mixers, _ = transfer(loaded, dict.fromkeys((0, 2), ("gated_deltanet", {})))
    assert model.state_dict().keys() == assemble(loaded, mixers).state_dict().keys()
    embeddings = loaded.model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_stopped_and_resumed(run_folder: Path, recipe_of: Any, tmp_path: Path) -> None:
    class Stopper(runner.Silent):
        def update(self, tokens: int, **metrics: float) -> None:
            if tokens > 900:
                raise KeyboardInterrupt  # as hard as a kill: what was not committed is lost

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        runner.run(recipe_of(out), progress=Stopper())
    export(out, "last", tmp_path / "early")
    assert load_file(tmp_path / "early" / "model.safetensors").keys() == load_file(
        run_folder / "export" / "model.safetensors"
    ).keys()  # fmt: skip
    assert runner.run(recipe_of(out), resume=True)["status"] == "complete"
    again, before = (load_file(folder / "export" / "model.safetensors") for folder in (out, run_folder))
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_plan_counts_the_adapters(recipe_of: Any, teacher: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    loaded = load_teacher(teacher)
    mixers, _ = transfer(loaded, dict.fromkeys((0, 2), ("gated_deltanet", {})))
    made = plan.plan(recipe)
    for name in ("glue", "extend"):
        settings = StageSettings(**plan.stage_settings(recipe, recipe.stage(name), loaded.context))
        stage = glue_stage(loaded, assemble(loaded, mixers), settings, name)
        assert made.stage(name).trained == sum(p.numel() for p in stage.parameters.values())
    whole = plan.plan(recipe_of(tmp_path, "stages.glue.train=all")).stage("glue")
    assert made.stage("glue").flops < whole.flops and made.stage("glue").total_memory < whole.total_memory


def test_what_is_refused(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"lora: adapters train with train: lora only"):
        recipe_of(tmp_path, "stages.extend.train=mixers")
    with pytest.raises(UserError, match="rank"):
        recipe_of(tmp_path, "stages.extend.lora.rank=0")
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"stages\.glue\.train: lora: .* pip install 'relinear\[lora\]'"):
        runner.run(recipe_of(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
