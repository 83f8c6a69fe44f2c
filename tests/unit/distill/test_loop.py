"""The training loop on a model of two layers: numbers, checks, stopping, reporting."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relinear.distill.checkpoint import Checkpoints
from relinear.distill.data.batch import Batch
from relinear.distill.errors import RunFailed, UserError
from relinear.distill.files import read_metrics
from relinear.distill.loop import Callbacks, Group, Stage, StageSettings, run_stage

TOKENS = 86
"""Non-padding tokens of a toy batch."""
SETTINGS = StageSettings(
    tokens=6 * TOKENS, batch=4, seq_len=24, lr=1e-2, lr_final=1e-3, warmup=1, log_every=1, clip=None
)


class Toy(nn.Module):
    """Two layers that learn, each by itself, to give a function of the token; a frozen one beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(320, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.register_buffer("table", torch.arange(3.0))
        self.embed.requires_grad_(False)
        self.break_at: tuple[int, str] | None = None
        self.calls = 0

    def step(self, batch: Batch, total: int) -> dict[str, Tensor]:
        self.calls += 1
        x = self.embed(batch.input_ids)
        metrics = {}
        for number, layer in enumerate(self.layers):
            loss = ((layer(x) - x.roll(1, -1)).square().mean(-1) * batch.real).sum() / max(1, total)
            if self.break_at == (self.calls, f"loss {number}"):
                loss = loss * float("nan")
            loss.backward()
            metrics[f"layer {number}"] = loss.detach()
        if self.break_at == (self.calls, "gradient"):
            self.layers[1].bias.grad[3] = float("inf")  # type: ignore[index, union-attr]
        return {"loss": torch.stack(list(metrics.values())).mean(), **metrics}


def toy_stage(model: Toy, **changes: Any) -> Stage:
    groups = [
        Group(f"layer {n}", {f"layers.{n}.{k}": p for k, p in layer.named_parameters()})
        for n, layer in enumerate(model.layers)
    ]
    frozen = {"embed": model.embed.weight, "table": model.table}
    stage = Stage("align", model, groups, model.step, lambda batch: batch.tokens, frozen)
    return replace(stage, **changes)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_is_adamw_as_written_down(source_of: Any, tmp_path: Path) -> None:
    """Six steps by hand: schedule by tokens, Adam's own formula, no weight decay, clipping by layer."""
    model, settings = Toy(), replace(SETTINGS, clip=0.3)
    run_stage(toy_stage(model), source_of(), settings, folder=tmp_path)
    by_hand, source = Toy(), source_of()
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in by_hand.layers.parameters()}
    clipped = 0
    for step in range(6):
        batch = source.next_batch()
        assert batch.tokens == TOKENS
        by_hand.zero_grad()
        by_hand.step(batch, batch.tokens)
        warmup = settings.batch * settings.seq_len
        done = max(0, step * TOKENS - warmup) / (6 * TOKENS - warmup)
        lr = 1e-3 + 9e-3 * (1 + math.cos(math.pi * done)) / 2
        if step * TOKENS < warmup:
            lr = 1e-2 * (0.01 + 0.99 * step * TOKENS / warmup)
        for layer in by_hand.layers:
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters()))  # type: ignore[union-attr]
            clipped += norm > 0.3
            for p in layer.parameters():
                assert p.grad is not None
                first, second = moments[p]
                g = p.grad * min(1.0, 0.3 / norm)
                first.mul_(0.9).add_(g, alpha=0.1)
                second.mul_(0.95).add_(g * g, alpha=0.05)
                unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
                p.data -= lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    assert clipped > 0
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_layers_are_clipped_apart_or_together(source_of: Any, tmp_path: Path) -> None:
    found = []
    for joint in (False, True):
        model = Toy()
        scaled = model.step

        def step(batch: Batch, total: int, model: Toy = model, scaled: Any = scaled) -> dict[str, Tensor]:
            metrics = scaled(batch, total)
            for parameter in model.layers[0].parameters():
                parameter.grad *= 1e3  # type: ignore[operator]
            return metrics

        stage = toy_stage(model, step=step, joint_clip=joint)
        settings = replace(SETTINGS, clip=1e-3, eps=1e-2, tokens=TOKENS)  # a large eps lets the size of a gradient show
        run_stage(stage, source_of(), settings, folder=tmp_path / str(joint))
        found.append((model.layers[1].weight - Toy().layers[1].weight).abs().max().item())
    assert found[1] < found[0] / 100


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_micro_batches_equal_the_whole_batch(source_of: Any, tmp_path: Path, size: int) -> None:
    whole, parts = Toy(), Toy()
    # At an eps this large Adam is a smooth function of the gradient; rounding is not blown up.
    settings = replace(SETTINGS, eps=1e-3)
    a = run_stage(toy_stage(whole), source_of(), settings, folder=tmp_path / "a")
    b = run_stage(toy_stage(parts), source_of(), replace(settings, micro_batch=size), folder=tmp_path / "b")
    assert parts.calls == 6 * math.ceil(4 / size)
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-5)
    assert a.metrics["losses"] == pytest.approx(b.metrics["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("loss 1", r"align: step 4: the loss \(layer 1\) is not finite"),
        ("gradient", r"align: step 4: the gradient of layers\.1\.bias is not finite"),
    ],
)
def test_what_is_not_finite_stops_the_run_before_the_weights(
    source_of: Any, tmp_path: Path, what: str, named: str
) -> None:
    good, bad = Toy(), Toy()
    stop = Callbacks(should_stop=lambda: good.calls == 3)
    run_stage(toy_stage(good), source_of(), SETTINGS, folder=tmp_path / "good", callbacks=stop)
    bad.break_at = 4, what
    with pytest.raises(RunFailed, match=named) as error:
        run_stage(toy_stage(bad), source_of(), SETTINGS, folder=tmp_path / "bad")
    assert "still those of step 3; the last checkpoint is" in str(error.value) and "align-3, and" in str(error.value)
    first = Toy()
    first.break_at = 1, what
    with pytest.raises(
        RunFailed, match=r"those of step 0; there is no checkpoint yet, and the step's batch is in .*-1:"
    ):
        run_stage(toy_stage(first), source_of(), SETTINGS, folder=tmp_path / "first")
    assert equal(weights(good), weights(bad))


def test_something_frozen_that_changed_fails_the_stage(source_of: Any, tmp_path: Path) -> None:
    model = Toy()
    plain = model.step

    def step(batch: Batch, total: int) -> dict[str, Tensor]:
        model.embed.weight.data[5, 2] += 1e-7
        return plain(batch, total)

    with pytest.raises(RunFailed, match=r"1 tensors that must not change did, e\.g\. embed"):
        run_stage(toy_stage(model, step=step), source_of(), SETTINGS, folder=tmp_path)
    with pytest.raises(UserError, match="has no checkpoint, and the next stage starts only from a complete one"):
        run_stage(toy_stage(Toy(), name="glue"), source_of(), SETTINGS, folder=tmp_path, after="align")


def test_a_layer_that_did_not_train_fails_the_stage(source_of: Any, tmp_path: Path) -> None:
    model = Toy()
    plain = model.step

    def step(batch: Batch, total: int) -> dict[str, Tensor]:
        metrics = plain(batch, total)
        for parameter in model.layers[1].parameters():
            parameter.grad = None
        return metrics

    with pytest.raises(RunFailed, match="layer 1 did not train: none of its 2 tensors changed in 6 steps"):
        run_stage(toy_stage(model, step=step), source_of(), SETTINGS, folder=tmp_path)


def test_a_single_parameter_that_did_not_change_is_listed(source_of: Any, tmp_path: Path) -> None:
    model = Toy()
    plain = model.step

    def step(batch: Batch, total: int) -> dict[str, Tensor]:
        metrics = plain(batch, total)
        model.layers[1].bias.grad = None
        return metrics

    result = run_stage(toy_stage(model, step=step), source_of(), SETTINGS, folder=tmp_path)
    assert result.unchanged == ["layers.1.bias"]


def test_metrics_and_progress(source_of: Any, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    said: list[str] = []
    callbacks = Callbacks(progress=told.append, message=said.append)
    settings = replace(SETTINGS, log_every=4)
    result = run_stage(toy_stage(Toy()), source_of(), settings, folder=tmp_path, callbacks=callbacks)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 4, 6]
    assert [record["step"] for record in told] == [1, 2, 3, 4, 5, 6]
    assert told[-1]["fraction"] == 1.0
    assert told[2]["seconds_left"] > 0
    assert result.metrics == lines[-1]
    assert (result.step, result.tokens, result.status) == (6, 6 * TOKENS, "complete")
    assert lines[0]["lr"] == pytest.approx(1e-4)
    assert set(lines[0]["losses"]) == set(lines[0]["grad_norm"]) == {"layer 0", "layer 1"}
    assert lines[0]["peak_memory"] > 2**20
    assert lines[1]["tokens_per_second"] > 0
    assert any("144 parameters train" in line for line in said)


def test_a_stop_signal_and_the_deadline(source_of: Any, tmp_path: Path) -> None:
    model = Toy()
    stopped = run_stage(
        toy_stage(model),
        source_of(),
        SETTINGS,
        folder=tmp_path / "a",
        callbacks=Callbacks(should_stop=lambda: model.calls == 2),
    )
    assert (stopped.status, stopped.step) == ("stopped", 2)
    assert (stopped.path / "optimizer.safetensors").exists()
    late = run_stage(toy_stage(Toy()), source_of(), SETTINGS, folder=tmp_path / "b", deadline=time.monotonic() - 1)
    assert (late.status, late.step) == ("stopped", 0)
    again = run_stage(toy_stage(Toy()), source_of(), SETTINGS, folder=tmp_path / "b", resume=True)
    assert again.status == "complete"


def test_evaluation_keeps_the_best_step(source_of: Any, tmp_path: Path) -> None:
    scores = iter([0.9, 0.5, 0.7, 0.6, float("nan"), 0.8])
    model = Toy()
    seen: list[bool] = []

    def evaluate() -> dict[str, Any]:
        seen.append(model.training)
        return {"score": next(scores), "kl": 1.0}

    settings = replace(SETTINGS, eval_every=TOKENS, keep=1)
    result = run_stage(toy_stage(model), source_of(), settings, folder=tmp_path, callbacks=Callbacks(evaluate=evaluate))
    assert result.best == {"step": 2, "score": 0.5}
    assert result.best_path is not None and result.best_path.is_dir()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["align-2", "align-6"]
    assert seen == [False] * 6
    evaluations = [line["eval"] for line in read_metrics(tmp_path / "metrics.jsonl") if "eval" in line]
    assert [e["score"] for e in evaluations] == [0.9, 0.5, 0.7, 0.6, None, 0.8]


def test_a_rate_of_its_own_for_one_group(source_of: Any, tmp_path: Path) -> None:
    stage = toy_stage(Toy())
    stage.groups[1].lr = 0.5
    result = run_stage(stage, source_of(), replace(SETTINGS, tokens=TOKENS), folder=tmp_path)
    assert result.metrics["lr"] == pytest.approx([1e-4, 5e-3])


def test_bad_stages_and_batches(source_of: Any, tmp_path: Path) -> None:
    half = Toy()
    half.layers[0].half()
    with pytest.raises(ValueError, match=r"layers\.0\.weight: what trains must be fp32"):
        run_stage(toy_stage(half), source_of(), SETTINGS, folder=tmp_path)
    source = source_of()
    empty = source.next_batch()
    empty.real[:] = False
    source.next_batch = lambda: empty
    with pytest.raises(UserError, match="step 1 got a batch of nothing but padding"):
        run_stage(toy_stage(Toy()), source, SETTINGS, folder=tmp_path)


def test_the_average_is_what_is_measured_saved_and_kept(source_of: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, average=0.6, eval_every=TOKENS, save_every=TOKENS, lr=1e-1)
    plain, model, raw, shown = Toy(), Toy(), [], []
    run_stage(
        toy_stage(plain),
        source_of(),
        replace(settings, average=None),
        folder=tmp_path / "plain",
        callbacks=Callbacks(progress=lambda record: raw.append(plain.layers[0].weight.detach().clone())),
    )

    def look() -> dict[str, float]:
        shown.append(model.layers[0].weight.detach().clone())
        return {"score": -len(shown)}

    result = run_stage(toy_stage(model), source_of(), settings, folder=tmp_path, callbacks=Callbacks(evaluate=look))
    mean = Toy().layers[0].weight.detach().clone()
    for step, (weight, seen) in enumerate(zip(raw, shown, strict=True)):
        mean.lerp_(weight, 1 - min(0.6, (step + 1) / (step + 10)))
        torch.testing.assert_close(seen, mean)
    assert (mean - raw[-1]).abs().max() > 1e-3
    torch.testing.assert_close(model.layers[0].weight.detach(), mean)
    weights = Checkpoints(tmp_path / "checkpoints").newest(result.stage).weights()  # type: ignore[union-attr]
    assert any(torch.equal(value, model.layers[0].weight) for value in weights.values())
    assert result.best_path == result.path


def test_an_averaged_stage_resumes_to_the_same_bits(source_of: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, average=0.9, save_every=2 * TOKENS)
    whole, parts = Toy(), Toy()
    run_stage(toy_stage(whole), source_of(), settings, folder=tmp_path / "whole")
    seen: list[int] = []
    stop = Callbacks(progress=lambda record: seen.append(1), should_stop=lambda: len(seen) == 3)
    run_stage(toy_stage(parts), source_of(), settings, folder=tmp_path / "parts", callbacks=stop)
    again = Toy()
    result = run_stage(toy_stage(again), source_of(), settings, folder=tmp_path / "parts", resume=True)
    assert result.status == "complete"
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
