"""An exported folder in a process that knows only transformers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.errors import RunFailed, UserError
from relinear.distill.export import export_student
from relinear.distill.families import FAMILIES
from relinear.distill.flatten import modelling_files
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_model, load_teacher
from relinear.distill.verify import verify
from relinear.mixers import registry


def converted(folder: Path, plan: dict[int, tuple[str, dict[str, Any]]]) -> Any:
    teacher = load_teacher(folder)
    mixers, _ = transfer(teacher, plan)
    return assemble(teacher, mixers)


@pytest.fixture
def export(llama: Path, tmp_path: Path) -> Path:
    student = converted(llama, {1: ("gated_deltanet", {}), 2: ("rwkv7", {})})
    return export_student(student, llama, tmp_path / "export", extra={"recipe.yaml": "schema: 1\n"})


def test_verify_passes_for_every_family(any_teacher: Path, tmp_path: Path) -> None:
    # Half of the families with every layer converted, half with attention at both ends.
    layers = [0, 1, 2, 3] if "qwen" in any_teacher.name else [1, 2]
    names = registry.names()
    plan = {layer: (names[index % len(names)], {}) for index, layer in enumerate(layers)}
    export_student(converted(any_teacher, plan), any_teacher, tmp_path / "export")
    report = verify(tmp_path / "export")
    assert report["ok"], {name: check for name, check in report["checks"].items() if not check["ok"]}
    assert len(report["checks"]) == 12


def test_the_folder_is_what_transformers_and_people_expect(export: Path, llama: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    teacher = json.loads((llama / "config.json").read_text())
    assert config["model_type"] == "relinear" and config["base_model_type"] == "llama"
    assert config["layer_types"] == ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    assert config["mixer_types"] == [None, "gated_deltanet", "rwkv7", None]
    assert set(config["mixers"]) == {"gated_deltanet", "rwkv7"}
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "rope_parameters", "vocab_size"):
        assert config[key] == teacher[key]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (export / name).read_bytes() == (llama / name).read_bytes()
    assert (export / "recipe.yaml").read_text() == "schema: 1\n"
    from safetensors import safe_open

    with safe_open(export / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (safe_open is no mapping) tied: stored once


def test_modelling_files_need_only_torch_and_transformers(export: Path) -> None:
    import ast

    files = sorted(export.glob("*.py"))
    assert {"configuration_relinear.py", "modeling_relinear.py"} < {file.name for file in files}
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and (export / f"{node.module}.py").exists(), file.name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {str(name).split(".")[0] for name in names} <= allowed, file.name


def test_only_the_mixers_in_use_are_written() -> None:
    files = modelling_files(FAMILIES["llama"], ["gated_deltanet"])
    assert "relinear_mixers_gated_deltanet.py" in files and "relinear_mixers_rwkv7.py" not in files


def test_installed_classes_load_it_without_its_code(export: Path) -> None:
    for file in export.glob("*.py"):
        file.unlink()
    model, tokenizer = load_model(export)
    assert type(model).__module__.startswith("relinear.")
    assert tokenizer.decode(tokenizer("hello")["input_ids"], skip_special_tokens=True) == "hello"


def test_servers_with_attention_of_their_own_are_told_no(export: Path, llama: Path) -> None:
    """vLLM and SGLang ask this before they put their attention in; a mixer's state would be lost without a word."""
    from transformers import AutoModel

    assert load_teacher(llama).model.is_backend_compatible()
    assert not AutoModel.from_pretrained(export, trust_remote_code=True).is_backend_compatible()
    assert not load_model(export)[0].is_backend_compatible()


def test_verify_notices_broken_code(export: Path) -> None:
    """A state that is forgotten between tokens must fail the checks that compare with and without cache."""
    path = export / "relinear_distill_modeling_cache.py"
    text = path.read_text()
    assert "return self.states" in text
    path.write_text(text.replace("return self.states", "return None"))
    report = verify(export)
    assert not report["ok"]
    failed = {name for name, check in report["checks"].items() if not check["ok"]}
    assert {"greedy", "chunked_prefill"} <= failed and "loads" not in failed


def test_verify_notices_missing_weights_and_code(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "other")
    (tmp_path / "other" / "relinear_mixers_base.py").unlink()
    with pytest.raises(RunFailed, match="fresh process"):
        verify(tmp_path / "other")
    with pytest.raises(UserError, match="model_type is not relinear"):
        (export / "config.json").write_text('{"model_type": "llama"}')
        verify(export)


def test_bfloat16_export_keeps_decays(llama: Path, tmp_path: Path) -> None:
    student = converted(llama, {0: ("gated_deltanet", {})})
    export_student(student, llama, tmp_path / "low", dtype="bfloat16")
    from safetensors.torch import load_file

    keep = student.mixers()[0].fp32_parameter_names()
    for name, value in load_file(tmp_path / "low" / "model.safetensors").items():
        kept = ".self_attn." in name and name.split("self_attn.")[1] in keep
        assert value.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_kernels_asked_for_in_training_are_not_asked_of_who_loads_it(llama: Path, tmp_path: Path) -> None:
    plan = {1: ("rwkv7", {"form": "fused"}), 2: ("gated_deltanet", {"form": "fused"}), 3: ("gated_deltanet", {})}
    out = export_student(converted(llama, plan), llama, tmp_path / "export")
    assert "fused" not in (out / "config.json").read_text()
    load_model(out)[0](torch.arange(3, 20)[None])


def test_an_export_is_not_overwritten_by_accident(export: Path, llama: Path) -> None:
    before = (export / "model.safetensors").read_bytes()
    student = converted(llama, {0: ("gated_deltanet", {})})
    with pytest.raises(UserError, match="already exists"):
        export_student(student, llama, export)
    assert (export / "model.safetensors").read_bytes() == before
    export_student(student, llama, export, overwrite=True)
    assert (export / "model.safetensors").read_bytes() != before
