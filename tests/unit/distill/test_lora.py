"""Adapters in glue: only they train, weights wait for the merge, commits bring them back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill import lora
from relinear.distill.checkpoint import Checkpoints
from relinear.distill.data.batch import Batch
from relinear.distill.errors import MachineError, UserError
from relinear.distill.glue import glue_stage
from relinear.distill.loop import Callbacks, run_stage
from relinear.distill.lora import LoraSettings, add_adapters, load_student, merge_adapters
from relinear.distill.stage import StageSettings
from relinear.distill.student import assemble
from relinear.distill.teacher import Teacher
from relinear.mixers.base import Mixer

SETTINGS = StageSettings(
    tokens=6 * 86, batch=4, seq_len=24, lr=1e-2, warmup=1, loss={"kl": 1.0}, train="lora", lora={"rank": 4,
    "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]}, save_every=86, keep=9,
)  # fmt: skip


@pytest.fixture
def student_of(teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]]) -> Callable[[], Any]:
    """A student of which layers 1 and 2 are converted."""
    return lambda: assemble(teacher, mixers_of(teacher, [1, 2]))


def tensors(student: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


def test_adapters_start_at_nothing_and_merge_to_the_published_sum(
    student_of: Callable[[], Any], batch_of: Callable[..., Batch]
) -> None:
    student, ids = student_of(), batch_of(1).input_ids
    before, state = tensors(student), torch.get_rng_state()
    with torch.no_grad():
        wanted = student(ids).logits
        tuner = add_adapters(student, LoraSettings(4, 8.0, ("q_proj", "down_proj")), seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(student(ids).logits, wanted)
        assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n, p in student.named_parameters() if p.requires_grad} == {
            "q_proj", "down_proj",
        }  # fmt: skip
        pairs = {}
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
            if ".lora_" in name:
                pairs.setdefault(name.split(".lora_")[0], []).append(parameter.clone())
        adapted = student(ids).logits
        merge_adapters(tuner)
        torch.testing.assert_close(student(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    after = tensors(student)
    assert after.keys() == before.keys() and not hasattr(student, "peft_config")
    for name, value in after.items():
        if name.removesuffix(".weight") in pairs:
            down, up = pairs[name.removesuffix(".weight")]
            torch.testing.assert_close(value, before[name] + 8.0 / 4 * up @ down)
        else:
            assert torch.equal(value, before[name])
    assert len(pairs) == 8


def test_only_adapters_train_and_the_end_is_an_ordinary_student(
    teacher: Teacher, student_of: Callable[[], Any], source_of: Any, tmp_path: Path
) -> None:
    student = student_of()
    before = tensors(student)
    stage = glue_stage(teacher, student, SETTINGS)
    names = set(stage.parameters)
    assert names and all(".lora_" in name for name in names)
    assert [group.name for group in stage.groups] == ["mixers", "the rest"]
    assert sum(p.numel() for p in stage.parameters.values()) < sum(p.numel() for p in student.parameters()) / 10
    weight = dict(student.named_modules())["model.layers.1.self_attn.q_proj"].base_layer.weight
    start, seen = weight.clone(), []
    callbacks = Callbacks(progress=lambda record: seen.append(torch.equal(weight, start)))
    result = run_stage(stage, source_of(), SETTINGS, folder=tmp_path, callbacks=callbacks)
    assert result.status == "complete" and seen == [True] * 6
    after = tensors(student)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert after.keys() == before.keys()
    assert changed == {n for n in after if n.split(".")[-2] in ("q_proj", "v_proj", "down_proj")}
    assert set(result.report["changed"]) == changed
    commit = Checkpoints(tmp_path / "checkpoints").require_complete("glue")
    assert commit.weights().keys() == {name for name in after if name != "lm_head.weight"}  # tied


@pytest.mark.parametrize("average", [None, 0.9])
def test_stopped_and_resumed_gives_the_same_bits(
    teacher: Teacher, student_of: Callable[[], Any], source_of: Any, tmp_path: Path, average: float | None
) -> None:
    whole, settings = student_of(), replace(SETTINGS, average=average)
    run_stage(glue_stage(teacher, whole, settings), source_of(), settings, folder=tmp_path / "a")
    steps: list[int] = []
    callbacks = Callbacks(progress=lambda record: steps.append(record["step"]), should_stop=lambda: len(steps) == 3)
    stopped = run_stage(
        glue_stage(teacher, student_of(), settings), source_of(), settings, folder=tmp_path / "b", callbacks=callbacks
    )
    assert stopped.status == "stopped"
    for _ in range(2):  # the second time the stage is complete, and loaded
        again = student_of()
        stage = glue_stage(teacher, again, settings)
        assert run_stage(stage, source_of(), settings, folder=tmp_path / "b", resume=True).status == "complete"
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name


def test_a_commit_on_the_way_gives_an_ordinary_student(
    teacher: Teacher, student_of: Callable[[], Any], source_of: Any, tmp_path: Path, batch_of: Callable[..., Batch]
) -> None:
    student, outputs, ids = student_of(), {}, batch_of(9).input_ids

    def note(record: dict[str, Any]) -> None:
        with torch.no_grad():
            outputs[record["step"]] = student(ids).logits

    stage = glue_stage(teacher, student, SETTINGS)
    run_stage(stage, source_of(), SETTINGS, folder=tmp_path, callbacks=Callbacks(progress=note, evaluate=lambda: {
        "score": abs(len(outputs) - 4)}))  # fmt: skip
    commits = {commit.step: commit for commit in Checkpoints(tmp_path / "checkpoints").all("glue")}
    for step in commits:
        loaded = student_of()
        load_student(loaded, commits[step])
        assert loaded.state_dict().keys() == student_of().state_dict().keys()
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, outputs[step], rtol=1e-4, atol=1e-4)
    assert 6 in commits


def test_what_is_refused(teacher: Teacher, student_of: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError,
        match=r"lora\.targets: no decoder layer has a linear layer 'q'\. There are: a_proj, b_proj, down_proj",
    ):
        add_adapters(student_of(), LoraSettings(targets=("q_proj", "q")), 0)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(
        MachineError, match=r"stages\.glue\.lora: lora: the package peft .* pip install 'relinear\[lora\]'"
    ):
        glue_stage(teacher, student_of(), SETTINGS)
