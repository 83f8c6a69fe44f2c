"""The matrix stage: what it computes, what it holds, what it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill import matrix as matrix_module
from relinear.distill.attention import attention_weights
from relinear.distill.data.batch import Batch
from relinear.distill.errors import RunFailed, UserError
from relinear.distill.loop import Callbacks, StageSettings, run_stage
from relinear.distill.matrix import choose_parameters, matrix_loss, matrix_rows, matrix_stage, matrix_step
from relinear.distill.student import transfer
from relinear.distill.teacher import Teacher
from relinear.mixers import registry
from relinear.mixers.base import Mixer, MixerInputs

SETTINGS = StageSettings(tokens=6 * 86, batch=4, seq_len=24, lr=1e-3, warmup=1)
MATERIALISE = [n for n in registry.names() if not registry.spec(n).no_matrix(registry.spec(n).options())]


def test_the_loss_is_the_mean_of_frobenius_norms(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch]
) -> None:
    batch, mixers, seen = batch_of(1), mixers_of(teacher, [0, 2]), {}
    for layer in mixers:
        teacher.attention(layer).register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: seen.__setitem__(layer, kwargs), with_kwargs=True
        )
    metrics = matrix_step(teacher, mixers, batch, matrix_rows(batch))
    assert set(metrics) == {"loss", "layer 0", "layer 2"} and matrix_rows(batch) == 4
    for layer, mixer in mixers.items():
        given, rotary = seen[layer]["hidden_states"], seen[layer]["position_embeddings"]
        made = mixer.matrix(given, rotary, MixerInputs(batch.real, batch.segments))
        wanted = attention_weights(teacher, layer, given, rotary, batch)
        norms = [
            (made[row, head] - wanted[row, head])[batch.real[row]].square().sum().sqrt()
            for row in range(4)
            for head in range(made.shape[1])
        ]
        assert metrics[f"layer {layer}"].item() == pytest.approx(torch.stack(norms).mean().item(), rel=1e-5)
    assert metrics["loss"].item() == pytest.approx((metrics["layer 0"] + metrics["layer 2"]).item() / 2)


def test_parts_of_a_batch_sum_to_the_whole(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch]
) -> None:
    batch, mixers = batch_of(3), mixers_of(teacher)
    whole = matrix_step(teacher, mixers, batch, 4)
    grads = {key: p.grad.clone() for key, p in mixers[0].named_parameters() if p.grad is not None}
    for mixer in mixers.values():
        mixer.zero_grad()
    parts = [matrix_step(teacher, mixers, batch.rows(start, start + 2), 4) for start in (0, 2)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)
    for key, grad in grads.items():
        torch.testing.assert_close(mixers[0].get_parameter(key).grad, grad, rtol=1e-3, atol=1e-6)


def test_a_window_as_long_as_the_text_starts_at_nothing_to_learn(
    teacher: Teacher, batch_of: Callable[..., Batch]
) -> None:
    """Sliding-window attention over everything is the teacher's own: distance 0, and a gradient that is no NaN."""
    mixers, _ = transfer(teacher, {1: ("swa", {"window": 64})})
    matrix_stage(teacher, mixers, SETTINGS)
    assert matrix_step(teacher, mixers, batch_of(1), 4)["loss"] < 1e-5
    made = torch.zeros(1, 2, 4, 4, requires_grad=True)
    matrix_loss(made, torch.zeros(1, 2, 4, 4), torch.ones(1, 4, dtype=torch.bool), 1).backward()
    assert made.grad is not None and not made.grad.any()


@pytest.mark.parametrize("name", MATERIALISE)
def test_what_the_matrix_does_not_depend_on_is_left_alone(
    name: str, teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], source_of: Any, tmp_path: Path
) -> None:
    mixers = mixers_of(teacher, [0, 2], name)
    before = {key: p.detach().clone() for key, p in mixers[2].named_parameters()}
    settings = replace(SETTINGS, tokens=2 * 86)
    stage = matrix_stage(teacher, mixers, settings)
    assert [group.name for group in stage.groups] == ["layer 0", "layer 2"]
    result = run_stage(stage, source_of(), settings, folder=tmp_path)
    assert result.status == "complete"
    changed = {key for key, p in mixers[2].named_parameters() if not torch.equal(p, before[key])}
    trained = {key for key, p in mixers[2].named_parameters() if p.requires_grad}
    assert {"q_proj.weight", "k_proj.weight"} <= changed <= trained == set(choose_parameters(mixers[2]))
    assert not {"v_proj.weight", "o_proj.weight", "g_proj.weight", "out_norm.weight", "v0", "g0"} & changed


def test_it_learns_and_evaluates_without_gradients(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch], tmp_path: Path,
    source_of: Any,
) -> None:  # fmt: skip
    mixers = mixers_of(teacher, [0, 1])
    settings = replace(SETTINGS, tokens=30 * 86, lr=5e-3)
    measured = matrix_step(teacher, mixers, batch_of(1), 4, backward=False)
    assert all(p.grad is None for mixer in mixers.values() for p in mixer.parameters())
    stage = matrix_stage(teacher, mixers, settings)
    source = source_of()
    source.next_batch = lambda: batch_of(1)  # the same text again and again
    run_stage(stage, source, settings, folder=tmp_path)
    after = matrix_step(teacher, mixers, batch_of(1), 4, backward=False)
    assert all(after[name] < 0.9 * measured[name] for name in ("layer 0", "layer 1"))


def test_stopped_and_resumed_gives_the_same_bits(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], source_of: Any, tmp_path: Path
) -> None:
    whole = mixers_of(teacher, [0, 3])
    run_stage(matrix_stage(teacher, whole, SETTINGS), source_of(), SETTINGS, folder=tmp_path / "a")
    steps: list[int] = []
    callbacks = Callbacks(progress=lambda record: steps.append(record["step"]), should_stop=lambda: len(steps) == 3)
    first = mixers_of(teacher, [0, 3])
    stopped = run_stage(
        matrix_stage(teacher, first, SETTINGS), source_of(), SETTINGS, folder=tmp_path / "b", callbacks=callbacks
    )
    assert stopped.status == "stopped"
    again = mixers_of(teacher, [0, 3])
    stage = matrix_stage(teacher, again, SETTINGS)
    assert run_stage(stage, source_of(), SETTINGS, folder=tmp_path / "b", resume=True).status == "complete"
    for layer, mixer in whole.items():
        for key, parameter in mixer.named_parameters():
            assert torch.equal(parameter, again[layer].get_parameter(key))


def test_a_loss_that_is_not_finite_names_the_layer(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], source_of: Any, tmp_path: Path
) -> None:
    mixers = mixers_of(teacher, [0, 3])
    stage = matrix_stage(teacher, mixers, SETTINGS)
    with torch.no_grad():
        mixers[3].get_parameter("q_proj.weight")[0, 0] = float("nan")
    with pytest.raises(RunFailed, match=r"matrix: step 1: the loss \(layer 3\) is not finite"):
        run_stage(stage, source_of(), SETTINGS, folder=tmp_path)


def test_one_layers_graph_at_a_time(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """When a layer's target is computed, the layer before has its gradients, and the one itself has none."""
    mixers = mixers_of(teacher, [0, 1, 3])
    state: list[list[bool]] = []

    def noting(*args: Any) -> torch.Tensor:
        state.append([m.get_parameter("q_proj.weight").grad is not None for m in mixers.values()])
        return attention_weights(*args)

    monkeypatch.setattr(matrix_module, "attention_weights", noting)
    matrix_step(teacher, mixers, batch_of(1), 4)
    assert state == [[False] * 3, [True, False, False], [True, True, False]]


@pytest.mark.parametrize(
    ("name", "reason"), [("mamba", "every channel of a head decays"), ("identity", "it mixes no tokens")]
)
def test_mixers_without_a_matrix_are_refused(name: str, reason: str, teacher: Teacher) -> None:
    mixers, _ = transfer(teacher, {0: ("gla", {}), 2: (name, {})})
    with pytest.raises(UserError, match=rf"stages\.matrix: layer 2: {name} has no mixing matrix to train: {reason}"):
        matrix_stage(teacher, mixers, SETTINGS)
    with pytest.raises(ValueError, match="at least one converted layer"):
        matrix_stage(teacher, {}, SETTINGS)


def test_bf16_keeps_losses_and_gradients_in_fp32(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch]
) -> None:
    batch, mixers = batch_of(1), mixers_of(teacher, [0, 1])
    exact = matrix_step(teacher, mixers, batch, 4)
    for mixer in mixers.values():
        mixer.zero_grad()
    rough = matrix_step(teacher, mixers, batch, 4, "bf16")
    assert rough["loss"].dtype == torch.float32 and rough["loss"] != exact["loss"]
    torch.testing.assert_close(rough["loss"], exact["loss"], rtol=0.05, atol=0.01)
    assert mixers[0].get_parameter("q_proj.weight").grad.dtype == torch.float32  # type: ignore[union-attr]
