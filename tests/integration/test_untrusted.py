"""What lies in a teacher's, a run's or a recipe's files never runs code, and never names a path outside its folder."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relinear.distill.errors import UserError
from relinear.distill.teacher import load_model, load_teacher
from relinear.launch.main import main
from relinear.recipes import loader, runner

SMALL = [
    "stages=[{transfer: {}}, {align: {tokens: 2k, batch: 4}}, {glue: {tokens: 1k, batch: 4}}]",
    "data.seq_len=64",
    "eval.tokens=500",
]


@pytest.fixture(scope="module")
def teacher(make_teacher: Any) -> Path:
    return make_teacher("llama", num_hidden_layers=2)


def arguments(teacher: Path, text: Path, out: Path) -> list[str]:
    return ["run", "gated_deltanet", f"teacher.model={teacher}", f"data.source={text}", *SMALL, "--out", str(out)]


def recipe(teacher: Path, text: Path, out: Path, *changes: str) -> Any:
    given = [f"teacher.model={teacher}", f"data.source={text}", f"save.dir={out}"]
    return loader.load("gated_deltanet", [*given, *SMALL, *changes])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def first(teacher: Path, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "first"
    runner.run(recipe(teacher, story_file, out))
    return out


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_beside_or_in_place_of_weights_is_not_executed(
    first: Path, teacher: Path, story_file: Path, tmp_path: Path
) -> None:
    mark, copy = tmp_path / "executed", tmp_path / "teacher"
    evil = pickle.dumps(Payload(mark))
    shutil.copytree(teacher, copy)
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.bin", "tokenizer.pkl"):
        (copy / name).write_bytes(evil)
    load_teacher(copy)
    load_model(copy)
    (copy / "model.safetensors").unlink()
    for load in (load_teacher, load_model):
        with pytest.raises(UserError, match=r"model\.safetensors: not found.*relinear reads safetensors"):
            load(copy)
    (copy / "model.safetensors").write_bytes(evil)
    with pytest.raises(UserError, match=r"model\.safetensors: (truncated or corrupt|.*too short)"):
        load_teacher(copy)
    # In a run: every file of a checkpoint is one; the stage begins anew.
    run = tmp_path / "run"
    shutil.copytree(first, run)
    for name in ("result.json", "manifest.json"):
        (run / name).unlink()
    for path in (run / "checkpoints").glob("*/*.safetensors"):
        path.write_bytes(evil)
    assert main([*arguments(teacher, story_file, run), "--resume"]) == 0
    assert not mark.exists() and same(weights(run), weights(first))
    assert os.mkdir  # the payload does work:
    pickle.loads(evil)
    assert mark.exists()


def test_code_and_adapters_of_a_teacher_need_more_than_its_folder(teacher: Path, tmp_path: Path) -> None:
    copy, mark = tmp_path / "teacher", tmp_path / "executed"
    shutil.copytree(teacher, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (copy / "config.json").write_text(json.dumps(config))
    load_teacher(copy)  # a known family: its own code is transformers'
    with pytest.raises(UserError, match=r"runs its own code.*--trust-remote-code"):
        load_model(copy)
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )
    with contextlib.suppress(UserError):
        load_teacher(copy)
    assert not mark.exists()
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}))
    with pytest.raises(UserError, match=r"adapter_config\.json: this folder holds an adapter"):
        load_teacher(copy)


def test_shards_outside_of_the_teachers_folder_are_refused(teacher: Path, tmp_path: Path) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: names the file '\.\./elsewhere\.safetensors'"):
        load_teacher(copy)


@pytest.mark.parametrize(
    "change",
    [
        'stages=[{transfer: {}}, {align: {tokens: 1k, name: "../../away"}}]',
        'stages=[{transfer: {}}, {align: {tokens: 1k, name: "a/b"}}]',
        'stages=[{transfer: {}}, {calibrate: {name: "run"}}]',
        'stages=[{transfer: {}}, {align: {tokens: 1k, name: "export"}}]',
        'stages=[{transfer: {}}, {align: {tokens: 1k, name: "glue"}}]',
        "track.wandb=../../away",
        "publish.repo=../../away",
        "publish.repo=a/b/c",
        "publish.base_model=../../away",
        "layers.mixer=../../away",
    ],
)
def test_names_in_a_recipe_never_lead_out_of_the_run_folder(teacher: Path, story_file: Path, change: str) -> None:
    with pytest.raises(UserError):
        recipe(teacher, story_file, Path("run"), change)
