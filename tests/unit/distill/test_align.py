"""Align: what it computes, what it holds, what it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.align import align_stage, align_step
from relinear.distill.data.batch import Batch
from relinear.distill.errors import UserError
from relinear.distill.loop import StageSettings, run_stage
from relinear.distill.losses import align_loss
from relinear.distill.stage import Stage
from relinear.distill.student import transfer
from relinear.distill.teacher import Teacher, load_teacher
from relinear.mixers.base import Mixer, MixerInputs

SETTINGS = StageSettings(tokens=4 * 86, batch=4, seq_len=24, lr=1e-3, warmup=1)


def recorded(teacher: Teacher, batch: Batch) -> dict[int, tuple[Any, Any, Any]]:
    """Every attention layer's input, rotary embedding and output, from a plain forward of the whole teacher."""
    seen = {}

    def hook(layer: int) -> Any:
        def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[layer] = (kwargs["hidden_states"], kwargs["position_embeddings"], output[0])

        return note

    handles = [
        teacher.attention(layer).register_forward_hook(hook(layer), with_kwargs=True)
        for layer in range(teacher.num_layers)
    ]
    with torch.no_grad():
        teacher.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("loss", ["l2", "mse", "cosine"])
def test_equals_each_layer_trained_alone_on_what_the_teacher_does(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch], loss: str
) -> None:
    batch = batch_of(1)
    mixers = mixers_of(teacher, [0, 2])
    metrics = align_step(teacher, mixers, batch, batch.tokens, loss)
    assert set(metrics) == {"loss", "layer 0", "layer 2"}
    for layer, (given, rotary, wanted) in recorded(teacher, batch).items():
        if layer not in mixers:
            continue
        grads = [p.grad for p in mixers[layer].parameters()]
        mixers[layer].zero_grad()
        made, _ = mixers[layer](given, rotary, mixer_inputs=MixerInputs(batch.real, batch.segments))
        value = align_loss(loss, made, wanted, batch.real, batch.tokens)
        value.backward()
        assert torch.equal(value, metrics[f"layer {layer}"])
        for ours, theirs in zip(grads, mixers[layer].parameters(), strict=True):
            assert ours is not None and theirs.grad is not None
            assert torch.equal(ours, theirs.grad)


def test_the_teacher_stops_after_the_highest_converted_layer(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch]
) -> None:
    ran = []
    for layer in range(teacher.num_layers):
        teacher.layers[layer].mlp.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    align_step(teacher, mixers_of(teacher, [1]), batch_of(1), 1, "l2")
    assert ran == [0]
    assert not teacher.attention(1)._forward_hooks
    batch = batch_of(1)
    teacher.model(input_ids=batch.input_ids, position_ids=batch.position_ids)  # runs on as before
    assert ran == [0, 0, 1, 2, 3]


def saved_peak(teacher: Teacher, mixers: dict[int, Mixer], batch: Batch, deferred: bool = False) -> tuple[int, int]:
    """(most bytes saved for backward at one time, bytes saved in all) during an align step."""
    held = peak = total = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal held, peak, total
            self.tensor = tensor.detach()
            self.size = tensor.numel() * tensor.element_size()
            held, total = held + self.size, total + self.size
            peak = max(peak, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.size

    backward = torch.Tensor.backward
    waiting: list[torch.Tensor] = []
    if deferred:
        torch.Tensor.backward = lambda self: waiting.append(self)  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            align_step(teacher, mixers, batch, batch.tokens, "l2")
    finally:
        torch.Tensor.backward = backward
    waiting.clear()
    assert held == 0
    return peak, total


@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7"])
def test_activation_memory_is_flat_in_depth(
    make_teacher: Callable[..., Path],
    mixers_of: Callable[..., dict[int, Mixer]],
    batch_of: Callable[..., Batch],
    name: str,
) -> None:
    peaks, totals = {}, {}
    for depth in (4, 16):
        teacher = load_teacher(make_teacher("llama", num_hidden_layers=depth))
        mixers = mixers_of(teacher, name=name)
        peaks[depth], totals[depth] = saved_peak(teacher, mixers, batch_of(1))
        if depth == 16:
            assert saved_peak(teacher, mixers, batch_of(1), deferred=True)[0] > 10 * peaks[16]  # the measure can fail
    assert totals[16] > 3.5 * totals[4]
    assert peaks[16] <= 1.02 * peaks[4]


def test_padding_and_packing(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch]
) -> None:
    """Each document alone gives the same sum of losses and gradients as all of them packed and padded."""
    batch = batch_of(5)
    mixers = mixers_of(teacher)
    packed = align_step(teacher, mixers, batch, batch.tokens, "mse")
    grads = {name: p.grad.clone() for layer, m in mixers.items() for name, p in _named(layer, m)}
    for mixer in mixers.values():
        mixer.zero_grad()
    alone = 0.0
    for row in range(batch.shape[0]):
        for number in range(2):
            inside = (batch.segments[row] == number) & batch.real[row]
            ids = batch.input_ids[row, inside][None]
            place = torch.arange(ids.shape[1])[None]
            ones = torch.ones_like(ids, dtype=torch.bool)
            document = Batch(ids, place, torch.zeros_like(ids), ones, place > 0)
            alone += align_step(teacher, mixers, document, batch.tokens, "mse")["loss"].item()
    assert packed["loss"].item() == pytest.approx(alone, rel=1e-5)
    for layer, mixer in mixers.items():
        for name, parameter in _named(layer, mixer):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-6)


def _named(layer: int, mixer: Mixer) -> list[tuple[str, Any]]:
    return [(f"{layer}.{name}", p) for name, p in mixer.named_parameters()]


def test_layers_are_independent_although_rwkv7_shares_a_value(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch]
) -> None:
    batch = batch_of(2)
    mixers = mixers_of(teacher, name="rwkv7")
    align_step(teacher, mixers, batch, batch.tokens, "l2")
    together = [p.grad.clone() for p in mixers[0].parameters() if p.grad is not None]
    mixers[0].zero_grad()
    align_step(teacher, {0: mixers[0]}, batch, batch.tokens, "l2")
    alone = [p.grad for p in mixers[0].parameters() if p.grad is not None]
    assert len(together) == len(alone) > 0
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_the_stage_trains_the_mixers_and_nothing_else(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], source_of: Any, tmp_path: Path
) -> None:
    before = {name: t.clone() for name, t in teacher.model.state_dict().items()}
    mixers = mixers_of(teacher, [0, 3])
    start = {name: p.detach().clone() for layer, m in mixers.items() for name, p in _named(layer, m)}
    stage = align_stage(teacher, mixers, SETTINGS)
    assert [group.name for group in stage.groups] == ["layer 0", "layer 3"]
    result = run_stage(stage, source_of(), SETTINGS, folder=tmp_path)
    assert result.status == "complete"
    assert all(torch.equal(t, before[name]) for name, t in teacher.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    changed = {name for layer, m in mixers.items() for name, p in _named(layer, m) if not torch.equal(p, start[name])}
    assert changed | set(result.unchanged) == set(start)
    assert len(changed) > len(start) / 2


def test_only_what_attention_did_not_have_can_train(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], source_of: Any, tmp_path: Path
) -> None:
    mixers = mixers_of(teacher, [0, 3])
    start = {name: p.detach().clone() for layer, m in mixers.items() for name, p in _named(layer, m)}
    new = {f"{layer}.{row.name}" for layer, m in mixers.items() for row in m.table() if row.source == "new"}
    settings = replace(SETTINGS, train="new")
    stage = align_stage(teacher, mixers, settings)
    assert set(stage.parameters) == new
    assert {name for name in stage.frozen if not name.startswith("teacher ")} == set(start) - new
    run_stage(stage, source_of(), settings, folder=tmp_path)
    changed = {name for layer, m in mixers.items() for name, p in _named(layer, m) if not torch.equal(p, start[name])}
    assert changed and changed <= new
    with pytest.raises(ValueError, match="cannot train 'old'"):
        align_stage(teacher, mixers, replace(SETTINGS, train="old"))


def test_align_learns(
    teacher: Teacher,
    mixers_of: Callable[..., dict[int, Mixer]],
    source_of: Any,
    batch_of: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    settings = StageSettings(tokens=40 * 86, batch=4, seq_len=24, lr=1e-2, warmup=2, log_every=1)
    seen: list[dict[str, float]] = []
    stage: Stage = align_stage(teacher, mixers_of(teacher), settings)
    step = stage.step

    def noting(batch: Batch, total: int) -> dict[str, torch.Tensor]:
        metrics = step(batch, total)
        seen.append({name: value.item() for name, value in metrics.items()})
        return metrics

    stage.step = noting
    source = source_of()
    source.next_batch = lambda: batch_of(1)  # the same text again and again
    run_stage(stage, source, settings, folder=tmp_path)
    for layer in range(4):
        assert seen[-1][f"layer {layer}"] < 0.7 * seen[0][f"layer {layer}"]


def test_bf16_keeps_weights_and_losses_in_fp32(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch]
) -> None:
    batch, mixers = batch_of(1), mixers_of(teacher)
    exact = align_step(teacher, mixers, batch, batch.tokens, "l2")
    for mixer in mixers.values():
        mixer.zero_grad()
    rough = align_step(teacher, mixers, batch, batch.tokens, "l2", "bf16")
    assert rough["loss"].dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixers[0].parameters())
    assert rough["loss"] != exact["loss"]
    torch.testing.assert_close(rough["loss"], exact["loss"], rtol=0.05, atol=0.01)


def test_measuring_alone_leaves_no_gradient(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], batch_of: Callable[..., Batch]
) -> None:
    batch, mixers = batch_of(1), mixers_of(teacher)
    measured = align_step(teacher, mixers, batch, batch.tokens, "l2", backward=False)
    assert all(p.grad is None for mixer in mixers.values() for p in mixer.parameters())
    assert measured == align_step(teacher, mixers, batch, batch.tokens, "l2")


def test_wrong_settings(teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]]) -> None:
    with pytest.raises(ValueError, match="at least one converted layer"):
        align_stage(teacher, {}, SETTINGS)
    with pytest.raises(ValueError, match=r"align has no loss 'kl'\. Available: l2, mse, relative, cosine"):
        align_stage(teacher, mixers_of(teacher, [0]), StageSettings(tokens=1, loss="kl"))


def test_layers_without_parameters_stand_beside_others(
    teacher: Teacher, mixers_of: Callable[..., dict[int, Mixer]], source_of: Any, tmp_path: Path
) -> None:
    skipped, _ = transfer(teacher, {1: ("identity", {"skip": True})})
    stage = align_stage(teacher, {**mixers_of(teacher, [0]), **skipped}, SETTINGS)
    assert [group.name for group in stage.groups] == ["layer 0"]
    assert run_stage(stage, source_of(), SETTINGS, folder=tmp_path).status == "complete"
    with pytest.raises(UserError, match=r"stages\.align: no converted layer has anything to train \(mixer identity\)"):
        align_stage(teacher, skipped, SETTINGS)
