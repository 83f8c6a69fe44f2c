"""Glue: the student against the teacher's logits; what trains, what changed, what counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.align import align_step
from relinear.distill.data.batch import Batch
from relinear.distill.errors import RunFailed, UserError
from relinear.distill.glue import StudentLoss, glue_stage, glue_step
from relinear.distill.loop import Callbacks, StageSettings, run_stage
from relinear.distill.student import assemble
from relinear.distill.teacher import Teacher, load_teacher

TOKENS = 86
SETTINGS = StageSettings(
    tokens=3 * TOKENS, batch=4, seq_len=24, lr=1e-3, warmup=1, loss={"kl": 1.0}, clip=1.0, log_every=1
)


@pytest.fixture
def student_of(mixers_of: Callable[..., Any]) -> Callable[..., Any]:
    """student_of(teacher, layers, mixer) -> a student with those layers converted."""

    def make(teacher: Teacher, layers: Any = None, name: str = "gated_deltanet") -> Any:
        return assemble(teacher, mixers_of(teacher, layers, name))

    return make


def naive(teacher: Teacher, student: Any, batch: Batch, weights: dict[str, float]) -> torch.Tensor:
    """The loss by its definition, from full logits."""
    call = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    counted = batch.targets[:, 1:]
    log_p = student(**call).logits[:, :-1][counted].log_softmax(-1)
    with torch.no_grad():
        log_q = teacher.model(**call).logits[:, :-1][counted].log_softmax(-1)
    labels = batch.input_ids[:, 1:][counted]
    return (
        weights.get("kl", 0) * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        + weights.get("reverse_kl", 0) * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        - weights.get("ce", 0) * log_p.gather(1, labels[:, None]).mean()
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "gpt_neox", "cohere2"])
def test_equals_the_definition_whatever_the_head(
    make_teacher: Callable[..., Path], student_of: Callable[..., Any], batch_of: Callable[..., Batch], family: str
) -> None:
    teacher = load_teacher(make_teacher(family))
    student = student_of(teacher, [0, 2])
    weights = {"kl": 0.6, "reverse_kl": 0.3, "ce": 0.2}
    batch = batch_of(1)
    stage = glue_stage(teacher, student, replace(SETTINGS, loss=weights))
    total = stage.count(batch)
    assert total == int(batch.targets.sum())
    metrics = stage.step(batch, total)
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(student.named_parameters()).keys()
    student.zero_grad()
    loss = naive(teacher, student, batch, weights)
    loss.backward()
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7"])
def test_align_beside_the_logits_is_an_align_step_and_a_glue_step(
    teacher: Teacher, student_of: Callable[..., Any], batch_of: Callable[..., Batch], name: str
) -> None:
    student, batch, weight = student_of(teacher, [1, 3], name), batch_of(1), 3.0
    stage = glue_stage(teacher, student, replace(SETTINGS, loss={"kl": 0.5, "align": weight}))
    total = stage.count(batch)
    metrics = stage.step(batch, total)
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    apart = glue_step(StudentLoss(teacher, student, {"kl": 0.5}, SETTINGS), batch, total)
    layers = align_step(teacher, student.mixers(), batch, total, "relative", backward=False)
    assert metrics["align"].item() == pytest.approx(2 * layers["loss"].item())
    assert metrics["loss"].item() == pytest.approx((apart["loss"] + weight * metrics["align"]).item())
    for mixer in student.mixers().values():
        for parameter in mixer.parameters():
            if parameter.grad is not None:
                parameter.grad /= weight
    align_step(teacher, student.mixers(), batch, total, "relative")
    for mixer in student.mixers().values():
        for parameter in mixer.parameters():
            if parameter.grad is not None:
                parameter.grad *= weight
    for key, parameter in student.named_parameters():
        if key in grads:
            torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-4, atol=1e-7, msg=key)
    with pytest.raises(ValueError, match=r"glue.loss: expected positive weights of kl, reverse_kl, ce"):
        glue_stage(teacher, student, replace(SETTINGS, loss={"align": 1.0}))


def test_kl_goes_down_in_twenty_steps(
    teacher: Teacher, student_of: Callable[..., Any], source_of: Any, batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    student = student_of(teacher)
    held_out = batch_of(999)
    with torch.no_grad():
        before = naive(teacher, student, held_out, {"kl": 1.0}).item()
    settings = replace(SETTINGS, tokens=20 * TOKENS, lr=3e-3)
    run_stage(glue_stage(teacher, student, settings), source_of(), settings, folder=tmp_path)
    with torch.no_grad():
        after = naive(teacher, student, held_out, {"kl": 1.0}).item()
    assert 0 < after < 0.9 * before


def expected_changes(student: Any, train: str) -> set[str]:
    """Names that may change, by a rule of its own."""
    names = {name for name, _ in student.named_parameters()}
    in_mixer = {n for n in names if ".self_attn." in n and n.split(".")[2] in ("0", "2")}
    return {
        "all": names,
        "no-ffn": {n for n in names if ".mlp." not in n},
        "mixers+norms": in_mixer | {n for n in names if n.endswith("layernorm.weight") or n == "model.norm.weight"},
        "mixers": in_mixer,
    }[train]


@pytest.mark.parametrize("train", ["all", "no-ffn", "mixers+norms", "mixers"])
def test_trains_what_it_says_and_lists_the_teachers_tensors_that_changed(
    teacher: Teacher, student_of: Callable[..., Any], source_of: Any, tmp_path: Path, train: str
) -> None:
    student = student_of(teacher, [0, 2])
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    original = {name: t.clone() for name, t in teacher.model.state_dict().items()}
    settings = replace(SETTINGS, train=train, lr=1e-2)
    result = run_stage(glue_stage(teacher, student, settings), source_of(), settings, folder=tmp_path)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, start[name])}
    assert changed | set(result.unchanged) == expected_changes(student, train)
    assert len(result.unchanged) < 4
    tied = {"lm_head.weight"} if train in ("all", "no-ffn") else set()
    mixers = expected_changes(student, "mixers")
    assert set(result.report["changed"]) - mixers == (changed - mixers) | tied
    assert all(torch.equal(t, original[name]) for name, t in teacher.model.state_dict().items())
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_mixers_can_have_a_rate_of_their_own(teacher: Teacher, student_of: Callable[..., Any]) -> None:
    student = student_of(teacher, [1])
    stage = glue_stage(teacher, student, replace(SETTINGS, lr_mixers=3e-3))
    assert [(group.name, group.lr) for group in stage.groups] == [("mixers", 3e-3), ("the rest", None)]
    assert stage.joint_clip  # one model, one norm
    assert all(".layers.1.self_attn." in name for name in stage.groups[0].parameters)
    assert sum(len(g.parameters) for g in stage.groups) == len(list(student.parameters()))
    assert len(glue_stage(teacher, student, replace(SETTINGS, train="mixers")).groups) == 1


def test_extend_on_text_alone_does_not_run_the_teacher(
    teacher: Teacher, student_of: Callable[..., Any], source_of: Any, tmp_path: Path
) -> None:
    student = student_of(teacher)
    teacher.model.forward = teacher.model.model.forward = lambda **_: pytest.fail("the teacher must not run")
    settings = replace(SETTINGS, loss={"ce": 1.0}, seq_len=60, tokens=2 * TOKENS)
    stage = glue_stage(teacher, student, settings, name="extend")
    result = run_stage(stage, source_of(length=60), settings, folder=tmp_path)
    assert result.stage == "extend"
    assert result.metrics["losses"].keys() == {"ce"}


def test_a_batch_without_targets_changes_nothing(
    teacher: Teacher, student_of: Callable[..., Any], source_of: Any, tmp_path: Path
) -> None:
    """Not even through the optimizer's momentum."""
    student, source = student_of(teacher), source_of()
    plain = source.next_batch

    def next_batch() -> Batch:
        batch = plain()
        if source.number == 2:
            batch.targets[:] = False
        return batch

    source.next_batch = next_batch
    after = []
    watch = Callbacks(progress=lambda _: after.append([p.detach().clone() for p in student.parameters()]))
    run_stage(glue_stage(teacher, student, SETTINGS), source, SETTINGS, folder=tmp_path, callbacks=watch)
    assert all(torch.equal(one, two) for one, two in zip(after[0], after[1], strict=True))
    assert not all(torch.equal(two, three) for two, three in zip(after[1], after[2], strict=True))


def test_a_loss_that_is_not_finite_names_the_layer_and_the_step(
    teacher: Teacher, student_of: Callable[..., Any], source_of: Any, tmp_path: Path
) -> None:
    student = student_of(teacher, [1, 2])
    stage = glue_stage(teacher, student, SETTINGS)
    plain, calls = stage.step, []

    def step(batch: Batch, total: int) -> dict[str, torch.Tensor]:
        calls.append(batch)
        if len(calls) == 2:
            student.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
        return plain(batch, total)

    stage.step = step
    with pytest.raises(RunFailed, match=r"glue: step 2: the loss \(layer 2\) is not finite"):
        run_stage(stage, source_of(), SETTINGS, folder=tmp_path)
    teacher.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    assert stage.blame(calls[0]) == "teacher layer 1"
    assert not any(layer._forward_hooks for layer in (*teacher.layers, *student.model.layers))


def test_micro_batches_with_unequal_targets_equal_the_whole(
    teacher: Teacher, student_of: Callable[..., Any], source_of: Any, tmp_path: Path
) -> None:
    found = []
    for size in (None, 1, 3):
        student = student_of(teacher)
        settings = replace(SETTINGS, micro_batch=size, eps=1e-2)  # a smooth function of the gradient
        source = source_of()
        plain = source.next_batch

        def next_batch(plain: Any = plain) -> Batch:
            batch = plain()
            batch.targets[0, 3:] = False  # as where the loss is on completions
            batch.targets[3] = False
            return batch

        source.next_batch = next_batch
        result = run_stage(glue_stage(teacher, student, settings), source, settings, folder=tmp_path / str(size))
        found.append((result.metrics["loss"], [p.detach() for p in student.parameters()]))
    for loss, parameters in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        for ours, whole in zip(parameters, found[0][1], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)


def test_the_loss_is_not_made_from_full_logits(
    teacher: Teacher, student_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    student = student_of(teacher)
    for model in (teacher.model, student):
        model.lm_head.forward = lambda *_: pytest.fail("lm_head must not run on all positions")
    batch = batch_of(1)
    glue_step(StudentLoss(teacher, student, {"kl": 1.0}, SETTINGS), batch, 10)


def test_bf16_trains_fp32_weights(
    llama: Path, student_of: Callable[..., Any], source_of: Any, batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    teacher = load_teacher(llama, dtype="bfloat16")
    student = student_of(teacher)
    settings = replace(SETTINGS, precision="bf16")
    exact = load_teacher(llama)
    batch = batch_of(1)
    rough = glue_step(StudentLoss(teacher, student, {"kl": 1.0}, settings), batch, int(batch.targets.sum()))["loss"]
    torch.testing.assert_close(rough, naive(exact, student_of(exact), batch, {"kl": 1.0}).detach(), rtol=0.2, atol=0.05)
    result = run_stage(glue_stage(teacher, student, settings), source_of(), settings, folder=tmp_path)
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert result.status == "complete"


def test_wrong_settings_and_heads(teacher: Teacher, student_of: Callable[..., Any]) -> None:
    student = student_of(teacher, [0])
    with pytest.raises(ValueError, match=r"glue cannot train 'ffn'\. Available: all, no-ffn"):
        glue_stage(teacher, student, replace(SETTINGS, train="ffn"))
    for loss in ("l2", {}, {"kl": 0.0}, {"kld": 1.0}):
        with pytest.raises(ValueError, match=r"glue\.loss: expected positive weights of kl, reverse_kl, ce"):
            glue_stage(teacher, student, replace(SETTINGS, loss=loss))
    teacher.model.lm_head = torch.nn.Sequential(teacher.model.lm_head)
    with pytest.raises(UserError, match=r"its output head is Sequential, glue knows nn\.Linear only"):
        glue_stage(teacher, student, SETTINGS)


@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7"])
def test_checkpointing_changes_no_gradient(
    teacher: Teacher, student_of: Callable[..., Any], batch_of: Callable[..., Batch], name: str
) -> None:
    """RWKV-7's v_first passes between blocks beside their outputs."""
    student, batch = student_of(teacher, [0, 1, 3], name), batch_of(1)
    found, passes = [], []
    student.base_model.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.append("forward"))
    for checkpointing in (False, True):
        stage = glue_stage(teacher, student, replace(SETTINGS, checkpointing=checkpointing))
        student.train()
        stage.step(batch, stage.count(batch))
        found.append({key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None})
        student.zero_grad()
    assert len(passes) == 1 + 2
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_mixers_train_as_others_do(
    teacher: Teacher, student_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    student, batch = student_of(teacher, [1, 3], "gated_deltanet"), batch_of(1)
    losses, grads = [], []
    for compiled in (False, True):
        stage = glue_stage(teacher, student, replace(SETTINGS, compile=compiled))
        losses.append(stage.step(batch, stage.count(batch))["loss"].item())
        grads.append({key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None})
        student.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-3, atol=1e-6, msg=key)
