"""Every shipped recipe loads, is planned and explains itself; none of it needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relinear.distill.errors import UserError
from relinear.recipes import loader
from relinear.recipes import plan as planner

from_folder = Path(__file__).resolve().parents[3] / "recipes"
NAMES = sorted(file.stem for file in from_folder.glob("*.yaml"))

TEACHER = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
# What a recipe for any teacher leaves to the user.
OPEN = {"convert", "rwkv7", "gated_deltanet"}


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Overrides that name a teacher and a text."""
    (tmp_path / "config.json").write_text(json.dumps(TEACHER))
    return [f"teacher.model={tmp_path}", f"data.source={tmp_path / 'config.json'}"]


def test_shipped_are_the_files_in_the_folder():
    assert loader.shipped() == NAMES
    assert len(NAMES) == 5


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_is_planned(name: str, given: list[str]):
    recipe = loader.load(name, given if name in OPEN else given[:1])
    plan = planner.plan(recipe)
    assert plan.layers.converted and [stage.kind for stage in plan.stages][:4] == [
        "transfer",
        "calibrate",
        "align",
        "glue",
    ]
    assert not any("warm-up" in note or "no layer" in note for note in plan.notes), plan.notes
    planner.render(plan)


@pytest.mark.parametrize("name", NAMES)
def test_explains_itself(name: str):
    text = loader.text_of(name)
    head = text.split("\nschema:")[0]
    assert f"relinear run {name}" in head and "# Cost: " in head and "# Caveats: " in head
    assert loader.summary(name).endswith(".") and loader.summary(name).startswith("Converts")
    assert all(line.startswith("#") for line in head.strip().split("\n"))


@pytest.mark.parametrize("name", sorted(OPEN))
def test_what_is_left_open_is_asked_for(name: str, given: list[str]):
    with pytest.raises(UserError) as error:
        loader.load(name)
    lines = str(error.value).split("\n")
    assert [line.split(": ")[1] for line in lines] == ["teacher.model", "data.source"]
    assert "teacher.model=PATH_OR_ID" in lines[0] and "data.source=FILE" in lines[1]
    with pytest.raises(UserError, match=r"^[^\n]*data\.source=FILE[^\n]*$"):
        loader.load(name, given[:1])


def test_quickstart_is_planned_without_anything_given():
    plan = planner.plan(loader.load("quickstart"))
    assert plan.teacher.source == "embedded" and plan.stage("glue").settings["seq_len"] == plan.teacher.context


def test_the_two_open_recipes_differ_in_their_mixer_only(given: list[str]):
    first, second = (loader.load(name, given).to_dict() for name in ("rwkv7", "gated_deltanet"))
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {"layers", "mixers", "save"}


def test_nothing_here_imports_torch(given: list[str]):
    code = f"""
import sys
from relinear.recipes import loader, plan, reference
for name in loader.shipped():
    made = plan.plan(loader.load(name, {given!r} if name in {OPEN!r} else {given[:1]!r}))
    plan.render(made), made.to_dict(), loader.dump(loader.load("rwkv7", {given!r}))
reference.markdown()
heavy = [name for name in ("torch", "transformers", "numpy", "datasets", "safetensors") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
