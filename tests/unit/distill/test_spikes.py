"""Spikes of the loss, and steps that are kept to be looked at: decided and carried out the same after any stop."""

from __future__ import annotations

import errno
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relinear.distill import checkpoint, replay
from relinear.distill.data.batch import Batch
from relinear.distill.errors import RunFailed, UserError
from relinear.distill.files import read_metrics
from relinear.distill.loop import Callbacks, Group, Stage, StageResult, StageSettings, run_stage
from relinear.distill.replay import read_replay
from relinear.distill.spikes import Spikes, SpikeSettings

TOKENS = 86
SPIKE = {"factor": 3.0, "window": 3, "action": "skip"}
SETTINGS = StageSettings(
    tokens=12 * TOKENS, batch=4, seq_len=24, lr=1e-2, warmup=0, log_every=1, save_every=4 * TOKENS, seed=5, spike=SPIKE
)


def test_a_spike_is_far_above_the_median_of_what_was_usual() -> None:
    spikes = Spikes(SpikeSettings(factor=2.0, window=3))
    assert [spikes.judge(loss) for loss in (9.0, 1.0, 1.0, 1.9, 2.1)] == [None, None, None, None, 1.0]
    assert spikes.losses == [1.0, 1.0, 1.9] and spikes.row == 1
    again = Spikes(SpikeSettings(factor=2.0, window=3))
    again.load_state_dict(spikes.state_dict())
    assert [again.judge(5.0), again.hopeless, again.judge(5.0), again.hopeless] == [1.0, False, 1.0, True]
    assert again.judge(1.0) is None and not again.hopeless


class Model(nn.Module):
    """A layer whose loss is what the test says at some batches; it draws random numbers."""

    def __init__(self, special: dict[int, float]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(320, 6)
        self.special = special

    def stage(self, source: Any) -> Stage:
        def step(batch: Batch, total: int) -> dict[str, Tensor]:
            x = nn.functional.dropout(self.embed(batch.input_ids), 0.2, training=self.training)
            loss = (x.mean(-1) - 1).square().mean() * self.special.get(source.number, 1.0)
            loss.backward()
            return {"loss": loss.detach()}

        return Stage("glue", self, [Group("all", dict(self.named_parameters()))], step, lambda b: b.tokens)


def go(
    source: Any, folder: Path, special: dict[int, float], settings: StageSettings = SETTINGS, steps: int = 99
) -> tuple[Model, StageResult, list[str]]:
    model, said = Model(special), []
    asked = iter([False] * steps)
    talk = Callbacks(message=said.append, should_stop=lambda: next(asked, True))
    result = run_stage(model.stage(source), source, settings, folder=folder, resume=True, callbacks=talk)
    return model, result, said


def weight(model: Model) -> Tensor:
    return model.embed.weight.detach().clone()


def test_a_spike_is_left_out_said_and_written_down(source_of: Any, tmp_path: Path) -> None:
    model, result, said = go(source_of(), tmp_path / "a", {7: 50.0})
    spikes = [line for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if "spike" in line]
    assert [line["step"] for line in spikes] == [7] and spikes[0]["loss"] > 3 * spikes[0]["spike"]["usual"]
    assert [line for line in said if "step 7: loss" in line and "its batch is left out" in line]
    assert result.step == 12 and math.isfinite(result.metrics["loss"])
    # Not left out, the same batch moves the weights elsewhere.
    other, _, _ = go(source_of(), tmp_path / "b", {7: 50.0}, replace(SETTINGS, spike=None))
    assert not torch.equal(weight(model), weight(other))


def test_a_rollback_goes_back_to_the_last_commit_and_leaves_out_what_came_since(source_of: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, spike=SPIKE | {"action": "rollback"}, keep=9)
    _, _, said = go(source_of(), tmp_path, {7: 50.0}, settings, steps=7)
    assert [line for line in said if "weights go back to glue-4" in line]
    store = {c.step: c for c in checkpoint.Checkpoints(tmp_path / "checkpoints").all()}
    assert torch.equal(store[7].weights()["embed.weight"], store[4].weights()["embed.weight"])
    assert store[7].source()["feeds"][0]["number"].item() == 7
    assert same(store[7].optimizer(), store[4].optimizer())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("average", [None, 0.9])
def test_spikes_are_decided_the_same_after_a_stop_anywhere(
    source_of: Any, tmp_path: Path, action: str, average: float | None
) -> None:
    special = {6: 40.0, 9: 60.0, 10: 50.0}
    settings = replace(SETTINGS, spike=SPIKE | {"action": action}, average=average)
    straight, _, _ = go(source_of(), tmp_path / "straight", special, settings)
    for steps in range(1, 12):
        folder = tmp_path / str(steps)
        go(source_of(), folder, special, settings, steps)
        model, result, _ = go(source_of(), folder, special, settings)
        assert result.status == "complete" and torch.equal(weight(model), weight(straight)), steps


def test_a_loss_that_stays_high_is_no_spike(source_of: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"step 8: loss .* and so were the 2 steps before: this is no spike"):
        go(source_of(), tmp_path, dict.fromkeys(range(6, 99), 50.0))


def test_a_step_that_is_not_finite_is_kept_and_happens_again(source_of: Any, tmp_path: Path, batch_of: Any) -> None:
    special = {7: float("nan")}
    seen: list[str] = []
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"step 7: the loss is not finite") as failed:
            go(source_of(), tmp_path, special, replace(SETTINGS, spike=None))
        seen.append(str(failed.value))
    # Both times: once from the commit at step 4 on, once from the one that the failure itself left.
    assert seen[0] == seen[1] and "the last checkpoint is" in seen[0] and "replay/glue-7" in seen[0]
    commit = checkpoint.Checkpoints(tmp_path / "checkpoints").newest("glue")
    assert commit is not None and commit.step == 6 and commit.source()["feeds"][0]["number"].item() == 6
    batch, record = read_replay(tmp_path / "replay" / "glue-7")
    assert torch.equal(batch.input_ids, batch_of(7).input_ids) and torch.equal(batch.targets, batch_of(7).targets)
    assert (record["step"], record["not_finite"], record["losses"]) == (7, "the loss", {"loss": None})
    assert torch.equal(torch.get_rng_state(), commit.rng(0)["torch"])
    # With its cause mended, the run ends as one that never failed.
    model, _, _ = go(source_of(), tmp_path, {}, replace(SETTINGS, spike=None))
    straight, _, _ = go(source_of(), tmp_path / "straight", {}, replace(SETTINGS, spike=None))
    assert torch.equal(weight(model), weight(straight))


def test_a_full_disk_does_not_hide_what_was_not_finite(
    source_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(replay, "save_file", full)
    with pytest.raises(RunFailed, match=r"the loss is not finite.*could be kept \(.*no space left on the disk"):
        go(source_of(), tmp_path, {7: float("nan")})


def test_what_is_no_replay_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a replay folder"):
        read_replay(tmp_path)
