"""One layer at a time from the shards: the same numbers as the whole teacher, and what cannot be read so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from relinear.distill.data.batch import Batch
from relinear.distill.errors import UserError
from relinear.distill.stream.teacher import open_teacher
from relinear.distill.student import transfer, transfer_layer
from relinear.distill.teacher import load_teacher
from relinear.distill.walk import walk

FUSED = ("qwen3_moe", "mixtral")


def keeper(seen: dict[int, tuple]) -> Any:
    return lambda layer, x, rotary, out, inputs: seen.update({layer: (x, *(rotary or ()), out)})


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_every_layer_sees_and_gives_what_it_does_in_the_whole_model(
    any_teacher: Path, batch_of: Callable[..., Batch], dtype: str, precision: str
) -> None:
    if any_teacher.name.startswith(FUSED):
        with pytest.raises(UserError, match="under other names"):
            open_teacher(any_teacher, dtype=dtype)
        return
    teacher, batch = open_teacher(any_teacher, dtype=dtype), batch_of(1)
    wanted: dict[int, tuple] = {}
    walk(load_teacher(any_teacher, dtype=dtype), range(teacher.num_layers), batch, keeper(wanted), precision)
    with teacher.embedding():
        hidden = teacher.embed(batch, precision)
    for layer in range(teacher.num_layers):
        found: dict[int, tuple] = {}
        with teacher.hold(layer) as tensors:
            assert sum(not p.is_meta for p in teacher.model.parameters()) == len(tensors)
            assert teacher.pass_layer(batch, hidden, None, precision, end=False) is None
            made = teacher.pass_layer(batch, hidden, keeper(found), precision, end=True)
        assert made is not None and made.dtype == getattr(torch, dtype)
        assert all(torch.equal(a, b) for a, b in zip(wanted[layer], found[layer], strict=True)), layer
        hidden = made
    assert all(p.is_meta for p in teacher.model.parameters())


def test_transfer_reads_the_same_attention(llama: Path) -> None:
    plan: dict[int, tuple[str, dict]] = {1: ("rwkv7", {}), 3: ("rwkv7", {})}
    mixers, reports = transfer(load_teacher(llama), plan, 5)
    for layer in plan:
        mixer, report = transfer_layer(open_teacher(llama), plan, layer, 5)
        assert report.to_dict() == reports[layer].to_dict()
        own = mixer.state_dict()
        assert all(torch.equal(own[name], value) for name, value in mixers[layer].state_dict().items())


def test_an_index_that_leads_out_of_the_folder(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "teacher"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "../out.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="plain name"):
        open_teacher(folder)


def test_a_tensor_of_another_shape(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "teacher"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    teacher = open_teacher(folder)
    with pytest.raises(UserError, match=name), teacher.hold(2):
        pass
