"""Loading a teacher, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from relinear.distill.errors import MachineError, UserError
from relinear.distill.families import FAMILIES
from relinear.distill.teacher import load_model, load_teacher
from relinear.recipes.teacher_config import read_teacher_config


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A teacher's folder that the test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "teacher"))


def test_every_family_loads_frozen(any_teacher: Path) -> None:
    teacher = load_teacher(any_teacher)
    assert teacher.family.name in FAMILIES
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    assert teacher.num_layers == 4 and teacher.context == 256


def test_geometry_equals_the_modules(any_teacher: Path) -> None:
    teacher = load_teacher(any_teacher)
    shape, attention = teacher.geometry(0), teacher.attention(0)
    state = attention.state_dict()
    assert state["q_proj.weight"].shape == (shape.inner_size, shape.hidden_size)
    assert state["k_proj.weight"].shape == (shape.kv_size, shape.hidden_size)
    assert ("q_proj.bias" in state) == shape.qkv_bias
    assert ("o_proj.bias" in state) == shape.o_bias
    assert ("q_norm.weight" in state) == bool(shape.qk_norm)


def test_sharded_weights_load_alike(llama: Path, tmp_path: Path) -> None:
    import torch

    whole = load_teacher(llama)
    whole.model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama / name, tmp_path / "sharded" / name)
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    parts = load_teacher(tmp_path / "sharded")
    ids = torch.arange(3, 30)[None]
    assert torch.equal(whole.model(ids).logits, parts.model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"config\.json: model_type 'gpt2' is not a family .* Known: llama, mistral, .*/add-a-",
        ),
        ({"model_type": ""}, "model_type '' is not a family that relinear knows"),
        (
            {"model_type": "mamba2"},
            "model_type 'mamba2' .* It has layers that are not softmax attention.* families llama",
        ),
        ({"model_type": "jamba", "layers_block_type": ["mamba"]}, "It has layers that are not softmax attention"),
        (
            {"model_type": "qwen3_next", "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
            "Layer 0 is 'linear_attention', 3 of 4 layers are not softmax attention.* families llama, mistral",
        ),
        (
            {"layer_types": ["full_attention"] * 3 + ["conv"]},
            "Layer 3 is 'conv', 1 of 4 layers .* that this one came from",
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "of family gemma3_text too: save its lan",
        ),
        ({"use_bidirectional_attention": True}, "attends in both directions"),
        ({"is_causal": False}, "attends in both directions"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config gives layers different shapes"),
    ],
)
def test_what_is_no_teacher(copy: Path, changes: dict, message: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    for read in (load_teacher, lambda folder: read_teacher_config(str(folder))):
        with pytest.raises(UserError, match=message):
            read(copy)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(UserError, match=str(copy)):
        load_teacher(copy)


def test_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: not found"):
        load_teacher(copy)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_shard(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: .*(too short|truncated)"):
        load_teacher(copy)


def test_corrupt_header(copy: Path) -> None:
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"x" * 32
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="header is not JSON"):
        load_teacher(copy)


def test_weights_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(UserError, match="missing keys in the weights"):
        load_teacher(copy)


def test_tokenizer_larger_than_the_vocabulary(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    for number in range(5):
        token = {"id": 320 + number, "content": f"<extra{number}>", "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({**token, **flags})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="325 tokens, the model's vocabulary only 320"):
        load_teacher(copy)


def test_no_such_folder() -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_teacher("./nowhere/at/all")


def test_hub_id_without_a_network() -> None:
    with pytest.raises(MachineError, match="somebody/something: no such folder, and the Hub cannot be reached"):
        load_teacher("somebody/something")


def test_foreign_code_needs_the_flag(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_model(copy)
