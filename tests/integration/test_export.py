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


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox"])
def test_verify_passes(family: str, make_teacher: Any, tmp_path: Path) -> None:
    """The same checks of every family, in one process for all of them: test_families.py."""
    teacher = make_teacher(family)
    layers = [0, 1, 2, 3] if family == "qwen2" else [1, 2]
    names = registry.names()
    plan = {layer: (names[index % len(names)], {}) for index, layer in enumerate(layers)}
    export_student(converted(teacher, plan), teacher, tmp_path / "export")
    report = verify(tmp_path / "export")
    assert report["ok"], {name: check for name, check in report["checks"].items() if not check["ok"]}
    assert len(report["checks"]) == 16


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


@pytest.mark.slow
def test_verify_writes_down_what_it_saw_and_claims_no_more(export: Path) -> None:
    """Its proof covers every byte; the quick start of the card is executed; config.json names the version tried."""
    import transformers

    from relinear.distill.card import QUICK_START
    from relinear.distill.hub import proof

    assert json.loads((export / "config.json").read_text())["verified_transformers"] is None
    (export / "README.md").write_text(f"# Mine\n\n```python\n{QUICK_START.format(name='me/mine')}```\n")
    report = verify(export)
    assert report["ok"] and "characters printed" in report["checks"]["quick_start"]["detail"]
    assert "of their spread" in report["checks"]["run_logits"]["detail"]
    this = {"min": transformers.__version__, "max": transformers.__version__}
    assert report["verified"] == this == json.loads((export / "config.json").read_text())["verified_transformers"]
    assert proof.problems(export) == []
    # A proof of the same bytes under an older version counts on; of other bytes it does not.
    held = proof.read(export)
    assert held is not None
    older = {**held["transformers"], "5.0.0": held["transformers"][transformers.__version__]}
    proof.write(export, older, None)
    assert verify(export)["verified"] == {"min": "5.0.0", "max": transformers.__version__}
    (export / "recipe.yaml").write_text("schema: 1\n# another\n")
    assert proof.problems(export) != []
    assert verify(export)["verified"] == this


def test_verify_notices_weights_that_are_not_the_runs_and_a_broken_quick_start(export: Path, llama: Path) -> None:
    other = export_student(converted(llama, {0: ("rwkv7", {})}), llama, export.parent / "other")
    shutil.copyfile(other / "probe.npz", export / "probe.npz")
    (export / "README.md").write_text("```python\nmodel_id = 1\nraise SystemExit('stop')\n```\n")
    report = verify(export)
    assert {name for name, check in report["checks"].items() if not check["ok"]} == {"run_logits", "quick_start"}


def test_the_teachers_chat_template_and_licence_go_along(export: Path, llama: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(llama, tmp_path / "teacher"))
    (teacher / "LICENSE").write_text("MIT License")
    (teacher / "NOTICE.txt").write_text("of somebody")
    out = export_student(converted(llama, {1: ("rwkv7", {})}), teacher, tmp_path / "carried")
    template = load_model(out)[1].chat_template
    assert template and template == load_teacher(llama).tokenizer.chat_template
    assert (out / "LICENSE").read_text() == "MIT License" and (out / "NOTICE.txt").exists()


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 5e-2), ("float16", 1e-2)])
def test_rounded_weights_stay_near_the_run(llama: Path, tmp_path: Path, dtype: str, limit: float) -> None:
    """The tolerance of `run_logits`, with room to both sides."""
    import numpy

    student = converted(llama, {1: ("gated_deltanet", {}), 2: ("rwkv7", {})})
    out = export_student(student, llama, tmp_path / "low", dtype=dtype)
    model, _ = load_model(out)
    with numpy.load(out / "probe.npz") as held:
        ids, wanted = torch.from_numpy(held["input_ids"]), torch.from_numpy(held["logits"])
        with torch.no_grad():
            got = model(ids).logits[..., torch.from_numpy(held["vocabulary"])]
        error = ((got - wanted) ** 2).mean().sqrt() / (wanted - torch.from_numpy(held["logsumexp"])[..., None]).std()
    assert limit / 1000 < error < limit / 2


def test_shards_are_as_large_as_asked(llama: Path, tmp_path: Path) -> None:
    from relinear.distill.export import shard_bytes

    out = export_student(converted(llama, {1: ("rwkv7", {})}), llama, tmp_path / "out", max_shard_size="30KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2 and (out / "model.safetensors.index.json").exists()
    load_model(out)
    assert [shard_bytes(text) for text in ("5GB", "1.5 MB", "2GiB", 7)] == [5 * 10**9, 1_500_000, 2**31, 7]
    for wrong in ("many", "5TB", "0"):
        with pytest.raises(UserError, match="--max-shard-size"):
            shard_bytes(wrong)
