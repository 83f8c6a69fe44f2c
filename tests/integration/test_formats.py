"""`relinear export --format`: what is written of a run and of an exported folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relinear.distill.errors import UserError
from relinear.distill.export import export_student
from relinear.distill.formats.run import export_as
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.launch.main import main
from relinear.recipes import loader, runner

OPTIONS = {"rope": False, "qk_norm": "none"}


@pytest.fixture(scope="module")
def run(make_teacher: Any, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages on a tiny llama, all layers rwkv6."""
    out = tmp_path_factory.mktemp("runs") / "run"
    changes = [
        f"teacher.model={make_teacher('llama', num_hidden_layers=2)}", f"data.source={story_file}", f"save.dir={out}",
        "layers.mixer=rwkv6", "mixers.rwkv6={rope: false, qk_norm: none}", "layers.convert=all", "data.seq_len=32",
        "stages.calibrate.tokens=1k", "stages.align.tokens=1k", "stages.glue.tokens=1k", "engine.device=cpu",
    ]  # fmt: skip
    runner.run(loader.load("convert", changes))
    return out


def test_a_run_is_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "rwkv6qwen2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    folder = run / "exports" / "rwkv6qwen2"
    assert told["export"] == str(folder) and told["format"] == "rwkv6qwen2"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["RWKV6Qwen2ForCausalLM"] and not config["tie_word_embeddings"]
    ours, theirs = load_file(run / "export/model.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(theirs["lm_head.weight"], ours["model.embed_tokens.weight"])
    mu = ours["model.layers.1.self_attn.mu"]
    assert torch.equal(theirs["model.layers.1.self_attn.time_maa_w"].flatten(), mu[3])
    assert torch.equal(
        theirs["model.layers.0.self_attn.o_proj.weight"], 2 * ours["model.layers.0.self_attn.o_proj.weight"]
    )
    assert {"tokenizer.json", "format.json", "recipe.yaml"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in (run / "exports").iterdir()] == ["rwkv6qwen2"]
    assert main(["export", str(run), "--format", "rwkv6qwen2"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_another_step_and_another_dtype(run: Path) -> None:
    folder, _ = export_as(run, "rwkv6qwen2", "last", dtype="bfloat16")
    assert folder.parent == run / "exports" and folder.name.endswith("-rwkv6qwen2")
    weights = load_file(folder / "model.safetensors")
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert weights["model.layers.0.self_attn.time_decay"].dtype == torch.float32


def test_an_exported_folder_is_written_in_shards(run: Path, tmp_path: Path) -> None:
    folder, _ = export_as(run / "export", "rwkv6qwen2", out=tmp_path / "there", max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert (run / "export").exists()


@pytest.mark.parametrize("name", ["arwkv7", "fla-gla", "fla-mamba2", "nonsense"])
def test_refusals_write_nothing(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    assert main(["export", str(run), "--format", name]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("error:") == 1
    assert sorted(run.rglob("*")) == before


def test_what_is_no_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match="neither a run nor an exported student"):
        export_as(tmp_path, "rwkv6qwen2")
    with pytest.raises(UserError, match="--step and --stage are for runs"):
        export_as(run / "export", "rwkv6qwen2", "last")


def test_a_decay_beyond_the_floor_is_told(llama: Path, tmp_path: Path) -> None:
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, dict.fromkeys(range(teacher.num_layers), ("rwkv6", OPTIONS)))
    with torch.no_grad():
        mixers[2].get_parameter("w0")[5] = 2.0
    export_student(assemble(teacher, mixers), llama, tmp_path / "export")
    _, record = export_as(tmp_path / "export", "rwkv6qwen2")
    assert [note.split(":")[0] for note in record["notes"]] == ["layer 2"]
