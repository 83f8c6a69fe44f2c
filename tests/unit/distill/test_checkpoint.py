"""Commits: whole or not there, resumed to the same numbers from a kill at any moment, refused where they do not fit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relinear.distill import checkpoint, files
from relinear.distill.align import align_stage
from relinear.distill.data.batch import Batch
from relinear.distill.errors import MachineError, UserError
from relinear.distill.files import read_metrics
from relinear.distill.glue import glue_stage
from relinear.distill.loop import Callbacks, Group, Stage, StageResult, StageSettings, run_stage
from relinear.distill.student import assemble
from relinear.distill.teacher import load_teacher

TOKENS = 86
SETTINGS = StageSettings(
    tokens=6 * TOKENS, batch=4, seq_len=24, lr=1e-2, warmup=2, log_every=1, save_every=2 * TOKENS, keep=2, seed=5
)


class Noisy(nn.Module):
    """A tied table and a layer, whose loss draws on every random number generator there is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(320, 6)
        self.head = nn.Linear(6, 320, bias=False)
        self.head.weight = self.embed.weight
        self.layer = nn.Linear(6, 6)
        self.kept = nn.Linear(6, 2).requires_grad_(False)

    def step(self, batch: Batch, total: int) -> dict[str, Tensor]:
        x = self.layer(self.embed(batch.input_ids))
        x = nn.functional.dropout(x, 0.3, training=self.training) * (1 + random.random() + np.random.rand())
        loss = nn.functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten())
        loss.backward()
        return {"loss": loss.detach()}

    def stage(self, name: str = "glue") -> Stage:
        parameters = {key: p for key, p in self.named_parameters() if p.requires_grad}
        return Stage(
            name, self, [Group("all", parameters)], self.step, lambda b: b.tokens, dict(self.kept.state_dict())
        )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(path: Path) -> list[dict[str, Any]]:
    clocks = ("tokens_per_second", "peak_memory")
    return [{k: v for k, v in line.items() if k not in clocks} for line in read_metrics(path)]


@pytest.fixture
def straight(source_of: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict]]:
    """Weights and metrics of a run that nothing disturbed."""
    folder, model = tmp_path_factory.mktemp("straight"), Noisy()
    run_stage(model.stage(), source_of(), SETTINGS, folder=folder)
    return tensors(model), timeless(folder / "metrics.jsonl")


def killed(work: Callable[[], object], moment: int) -> bool:
    """Run `work` in a process that is killed (SIGKILL) at its n-th dangerous moment; whether it was.

    Moments: before every sync, rename and removal, halfway through every tensor file, between batches.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = moment

    def tick() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if tick():
                die()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    save = checkpoint.save_file

    def half_a_file(held: Any, path: Path, **kwargs: Any) -> None:
        save(held, path, **kwargs)
        if tick():
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoint.save_file = half_a_file
    before(os, "fsync")
    before(Path, "rename")
    before(shutil, "rmtree")
    before(checkpoint.Checkpoints, "commit")
    before(files.MetricsLog, "append")
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_resumes_to_the_same_bits_from_a_kill_at_any_moment(
    source_of: Any, tmp_path: Path, straight: tuple[dict[str, Tensor], list[dict]], stride: int
) -> None:
    moment = resumed = 0
    while True:
        folder = tmp_path / str(moment)
        if not killed(lambda f=folder: run_stage(Noisy().stage(), source_of(), SETTINGS, folder=f), moment):
            break
        model = Noisy()
        run_stage(model.stage(), source_of(), SETTINGS, folder=folder, resume=True)
        assert same(tensors(model), straight[0]), f"killed at moment {moment}"
        assert timeless(folder / "metrics.jsonl") == straight[1], f"killed at moment {moment}"
        assert not [path for path in folder.rglob("*") if files.is_temporary(path)]
        moment += stride
        resumed += 1
    assert resumed > 50 / stride


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_survives_a_kill_while_resuming(
    source_of: Any, tmp_path: Path, straight: tuple[dict[str, Tensor], list[dict]]
) -> None:
    def work() -> StageResult:
        return run_stage(Noisy().stage(), source_of(), SETTINGS, folder=tmp_path, resume=True)

    for moment in (20, 3, 9, 14, 6):
        assert killed(work, moment)
    model = Noisy()
    run_stage(model.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True)
    assert same(tensors(model), straight[0])
    assert timeless(tmp_path / "metrics.jsonl") == straight[1]


@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7"])
def test_align_and_glue_stopped_anywhere_end_in_the_same_bits(
    llama: Path, mixers_of: Any, source_of: Any, tmp_path: Path, name: str
) -> None:
    settings = replace(SETTINGS, tokens=5 * TOKENS)
    glue_settings = replace(settings, loss={"kl": 1.0}, lr=1e-3, lr_mixers=3e-3)

    def convert(folder: Path, stops: int) -> dict[str, Tensor]:
        """Both stages; stopped after every step, `stops` times in each, with everything made anew."""
        for attempt in range(stops + 1):
            teacher = load_teacher(llama)
            mixers = mixers_of(teacher, [0, 1, 3], name)
            stop = _after_one_step() if attempt < stops else Callbacks()
            stage = align_stage(teacher, mixers, settings)
            run_stage(stage, source_of(), settings, folder=folder, resume=True, callbacks=stop)
        for attempt in range(stops + 1):
            teacher = load_teacher(llama)
            mixers = mixers_of(teacher, [0, 1, 3], name)
            run_stage(align_stage(teacher, mixers, settings), source_of(), settings, folder=folder, resume=True)
            student = assemble(teacher, mixers)
            stop = _after_one_step() if attempt < stops else Callbacks()
            stage = glue_stage(teacher, student, glue_settings)
            run_stage(stage, source_of(), glue_settings, folder=folder, resume=True, after="align", callbacks=stop)
        return tensors(student)

    assert same(convert(tmp_path / "a", 0), convert(tmp_path / "b", 3))
    assert timeless(tmp_path / "a" / "metrics.jsonl") == timeless(tmp_path / "b" / "metrics.jsonl")


def _after_one_step() -> Callbacks:
    asked = iter([False])
    return Callbacks(should_stop=lambda: next(asked, True))


def test_a_full_disk_harms_nothing(
    source_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    straight: tuple[dict[str, Tensor], list[dict]],
) -> None:
    usage = namedtuple("usage", "total used free")
    free = iter([10**9])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, next(free, 100)))
        with pytest.raises(MachineError, match=r"glue-4: no space left on the disk \([0-9,]+ bytes needed, 100 free\)"):
            run_stage(Noisy().stage(), source_of(), SETTINGS, folder=tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["glue-2"]
    model = Noisy()
    run_stage(model.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True)
    assert same(tensors(model), straight[0])


def test_a_disk_that_fills_up_while_tensors_are_written(
    source_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(MachineError, match="glue-2: no space left on the disk"):
        run_stage(Noisy().stage(), source_of(), SETTINGS, folder=tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == []


def test_keeps_the_newest_and_of_a_completed_stage_the_end_only(source_of: Any, tmp_path: Path) -> None:
    seen = []
    watch = Callbacks(progress=lambda _: seen.append(sorted(p.name for p in (tmp_path / "checkpoints").glob("*"))))
    settings = replace(SETTINGS, save_every=TOKENS)
    run_stage(Noisy().stage("align"), source_of(), settings, folder=tmp_path, callbacks=watch)
    assert seen[-1] == ["align-4", "align-5"]
    result = run_stage(Noisy().stage("glue"), source_of(), settings, folder=tmp_path, after="align")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["align-6", "glue-6"]
    assert not (result.path / "optimizer.safetensors").exists()


def test_a_complete_stage_is_loaded_not_run_again(source_of: Any, tmp_path: Path) -> None:
    first = Noisy()
    done = run_stage(first.stage(), source_of(), SETTINGS, folder=tmp_path)
    again = Noisy()
    stage = again.stage()
    stage.step = lambda batch, total: pytest.fail("must not train")
    result = run_stage(stage, source_of(), SETTINGS, folder=tmp_path, resume=True)
    assert same(tensors(again), tensors(first))
    assert result == done


def test_a_damaged_commit_is_passed_over_loudly(
    source_of: Any, tmp_path: Path, straight: tuple[dict[str, Tensor], list[dict]]
) -> None:
    asked = iter([False] * 4)
    run_stage(
        Noisy().stage(),
        source_of(),
        SETTINGS,
        folder=tmp_path,
        callbacks=Callbacks(should_stop=lambda: next(asked, True)),
    )
    newest = tmp_path / "checkpoints" / "glue-4" / "weights.safetensors"
    os.truncate(newest, newest.stat().st_size - 1)
    said: list[str] = []
    model = Noisy()
    run_stage(
        model.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True, callbacks=Callbacks(message=said.append)
    )
    assert any("glue-4: not a whole checkpoint, ignored" in line for line in said)
    assert any("goes on from" in line and "glue-2 (step 2)" in line for line in said)
    assert same(tensors(model), straight[0])


def flip(path: Path, place: int = -5) -> None:
    """Change one bit of a file; its size and time stay."""
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


FILES = ["weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_named_and_the_commit_before_taken(
    source_of: Any, tmp_path: Path, straight: tuple[dict[str, Tensor], list[dict]], name: str
) -> None:
    asked = iter([False] * 4)
    stop = Callbacks(should_stop=lambda: next(asked, True))
    run_stage(Noisy().stage(), source_of(), SETTINGS, folder=tmp_path, callbacks=stop)
    path = tmp_path / "checkpoints" / "glue-4" / name
    # state.json stays JSON: a digit of a number becomes another.
    flip(path, path.read_bytes().index(b'"tokens": ') + 10 if name == "state.json" else -5)
    said: list[str] = []
    model = Noisy()
    talk = Callbacks(message=said.append)
    run_stage(model.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True, callbacks=talk)
    warnings = [line for line in said if "glue-4" in line and ("not used" in line or "ignored" in line)]
    assert len(warnings) == 1 and (name == "state.json" or f"glue-4/{name}: other content" in warnings[0])
    assert any("goes on from" in line and "glue-2 (step 2)" in line for line in said)
    assert same(tensors(model), straight[0])
    assert timeless(tmp_path / "metrics.jsonl") == straight[1]


def test_with_every_commit_damaged_the_stage_begins_anew(
    source_of: Any, tmp_path: Path, straight: tuple[dict[str, Tensor], list[dict]]
) -> None:
    stopped(source_of(), tmp_path)
    for commit in (tmp_path / "checkpoints").iterdir():
        flip(commit / "weights.safetensors")
    said: list[str] = []
    model = Noisy()
    talk = Callbacks(message=said.append)
    run_stage(model.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True, callbacks=talk)
    assert sum("This checkpoint is not used" in line for line in said) == 2
    assert same(tensors(model), straight[0]) and timeless(tmp_path / "metrics.jsonl") == straight[1]


def test_a_damaged_end_is_needless_once_the_next_stage_has_saved(source_of: Any, tmp_path: Path) -> None:
    run_stage(Noisy().stage("align"), source_of(), SETTINGS, folder=tmp_path)
    stopped(source_of(), tmp_path)
    flip(tmp_path / "checkpoints" / "align-6" / "weights.safetensors")
    said: list[str] = []
    stage = Noisy().stage("align")
    stage.step = lambda batch, total: pytest.fail("must not train")
    talk = Callbacks(message=said.append)
    result = run_stage(stage, source_of(), SETTINGS, folder=tmp_path, resume=True, callbacks=talk)
    assert result.status == "complete" and any("align-6/weights.safetensors: other content" in line for line in said)
    assert any("needs it no more: it goes on from" in line and "glue-3" in line for line in said)
    model = Noisy()
    run_stage(model.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True, after="align")
    # Whoever asks for these weights themselves is told.
    with pytest.raises(UserError, match=r"align-6/weights\.safetensors: other content.*Remove .*align-6"):
        checkpoint.Checkpoints(tmp_path / "checkpoints").require_complete("align").weights()


def test_a_commit_that_names_files_elsewhere_is_not_read(source_of: Any, tmp_path: Path) -> None:
    stopped(source_of(), tmp_path)
    path = tmp_path / "checkpoints" / "glue-3" / "state.json"
    state = json.loads(path.read_text())
    (tmp_path / "elsewhere.safetensors").write_bytes(b"12")
    state["files"]["../../elsewhere.safetensors"] = 2
    state.pop("check")
    path.write_text(json.dumps(state))
    store = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert [commit.path.name for commit in store.all()] == ["glue-2"] and store.damaged() == [path.parent]


def stopped(source: Any, folder: Path, name: str = "glue") -> None:
    asked = iter([False] * 3)
    stop = Callbacks(should_stop=lambda: next(asked, True))
    run_stage(Noisy().stage(name), source, SETTINGS, folder=folder, callbacks=stop)


def test_a_stage_starts_only_from_a_complete_one(source_of: Any, tmp_path: Path) -> None:
    stopped(source_of(), tmp_path, "align")
    with pytest.raises(UserError, match="stage 'align' stopped at step 3, and the next stage starts only from a"):
        run_stage(Noisy().stage("glue"), source_of(), SETTINGS, folder=tmp_path, after="align")


def test_a_folder_that_holds_a_run_is_not_overwritten(source_of: Any, tmp_path: Path) -> None:
    stopped(source_of(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"already holds stage 'glue' up to step 3\. Continue it with --resume"):
        run_stage(Noisy().stage(), source_of(), SETTINGS, folder=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_another_teacher_other_settings_and_another_model_are_refused(source_of: Any, tmp_path: Path) -> None:
    stopped(source_of(), tmp_path)
    other = Noisy()
    other.kept.weight.data[0, 0] += 1
    with pytest.raises(UserError, match=r"was made with another teacher \(1 tensors differ, e.g. weight\)"):
        run_stage(other.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True)
    with pytest.raises(UserError, match=r"was made with glue\.lr = 0\.01, now it is 0\.02"):
        run_stage(Noisy().stage(), source_of(), replace(SETTINGS, lr=2e-2), folder=tmp_path, resume=True)
    wider = Noisy()
    wider.layer = nn.Linear(6, 7)
    with pytest.raises(UserError, match=r"2 tensors of another shape, e.g. layer\.bias"):
        run_stage(wider.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True)
    wider.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"2 tensors missing, e.g. extra\.bias"):
        run_stage(wider.stage(), source_of(), SETTINGS, folder=tmp_path, resume=True)
    patient = replace(SETTINGS, save_every=None, log_every=3, keep=9)
    assert run_stage(Noisy().stage(), source_of(), patient, folder=tmp_path, resume=True).status == "complete"


def test_metrics_of_another_run_are_noticed(source_of: Any, tmp_path: Path) -> None:
    stopped(source_of(), tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl: has 0 bytes, but the checkpoint was written when it had"):
        run_stage(Noisy().stage(), source_of(), SETTINGS, folder=tmp_path, resume=True)


def test_another_environment_is_recorded_and_warned_of(
    source_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = checkpoint.environment()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "environment", lambda: here | {"threads": 64})
        stopped(source_of(), tmp_path)
    state = json.loads((tmp_path / "checkpoints" / "glue-3" / "state.json").read_text())
    assert state["environment"] == here | {"threads": 64} and here["threads"] == torch.get_num_threads()
    said: list[str] = []
    talk = Callbacks(message=said.append)
    run_stage(Noisy().stage(), source_of(), SETTINGS, folder=tmp_path, resume=True, callbacks=talk)
    assert any("threads 64 -> 1" in line and "not be bit-identical" in line for line in said)


def test_tied_tensors_are_stored_once_and_stay_tied(source_of: Any, tmp_path: Path) -> None:
    stopped(source_of(), tmp_path)
    commit = checkpoint.Checkpoints(tmp_path / "checkpoints").newest()
    assert commit is not None
    assert sorted(commit.weights()) == ["embed.weight", "kept.bias", "kept.weight", "layer.bias", "layer.weight"]
    assert len([key for key in commit.optimizer() if key.startswith("embed.weight/")]) == 3
    model = Noisy()
    checkpoint.load_module(model, commit.weights(), commit.path)
    assert model.head.weight is model.embed.weight


def test_state_that_json_would_change_is_refused(tmp_path: Path) -> None:
    store = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(TypeError, match="checkpoint entry 'source' does not survive JSON"):
        store.commit("align", 1, {}, {"source": {1: 2}})
    assert os.listdir(tmp_path) == []
