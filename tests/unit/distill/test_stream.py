"""Streamed align: the mixers of align in memory, whatever is killed, damaged or shared among workers."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relinear.distill import checkpoint, files
from relinear.distill.align import align_module, align_stage
from relinear.distill.data.batch import Batch
from relinear.distill.errors import RunFailed, UserError
from relinear.distill.loop import run_stage
from relinear.distill.stage import Callbacks, StageSettings
from relinear.distill.stream import layer as stream_layer
from relinear.distill.stream.borders import Border
from relinear.distill.stream.teacher import open_teacher
from relinear.distill.stream.work import Work, complete, prepare, take_blocks
from relinear.distill.student import transfer
from relinear.distill.teacher import load_teacher

SETTINGS = StageSettings(
    tokens=600, batch=4, seq_len=24, lr=1e-3, warmup=1, micro_batch=2, log_every=1, eval_every=200, save_every=200
)


@pytest.fixture
def work_of(llama: Path, tmp_path: Path) -> Callable[..., Work]:
    def make(layers: list[int] | None = None, mixer: str = "rwkv7", **changes: Any) -> Work:
        plan: dict[int, tuple[str, dict[str, Any]]] = {layer: (mixer, {}) for layer in layers or [0, 1, 2, 3]}
        run = changes.pop("run", tmp_path / "run")
        made = Work(open_teacher(llama), plan, SETTINGS, "align", run, run / "borders", "key", wait=0.05)
        return dataclasses.replace(made, **changes)

    return make


@pytest.fixture
def carry_out(source_of: Callable[..., Any], batch_of: Callable[..., Batch]) -> Callable[[Work], dict[str, Tensor]]:
    """Everything in one process; the mixers of the stage's commit."""

    def whole(work: Work) -> dict[str, Tensor]:
        assert prepare(work, source_of(), [batch_of(100), batch_of(101)])
        assert take_blocks(work)
        return checkpoint.Checkpoints(complete(work).path.parent).require_complete("align").weights()

    return whole


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("mixer", ["rwkv7", "gated_deltanet"])
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3]], ids=["all", "some"])
@pytest.mark.parametrize("block", [None, 2])
def test_equals_align_in_memory(
    llama: Path,
    tmp_path: Path,
    work_of: Callable[..., Work],
    carry_out: Any,
    source_of: Callable[..., Any],
    mixer: str,
    layers: list[int],
    block: int | None,
) -> None:
    work = work_of(layers, mixer, block=block)
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, work.plan, work.seed)
    stage = align_stage(teacher, mixers, SETTINGS)
    wanted = run_stage(stage, source_of(), SETTINGS, folder=tmp_path / "memory")
    found = carry_out(work)
    for name, value in align_module(mixers).state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0)
    result = checkpoint.Checkpoints(work.run / "checkpoints").require_complete("align").state["result"]
    assert (result["step"], result["tokens"]) == (wanted.step, wanted.tokens)
    assert result["metrics"]["losses"] == wanted.metrics["losses"]
    lines = files.read_metrics(work.run / "metrics.jsonl")
    steps = [line["losses"] for line in lines if "losses" in line]
    plain = files.read_metrics(tmp_path / "memory" / "metrics.jsonl")
    assert steps == [line["losses"] for line in plain if "losses" in line]
    assert sum("eval" in line for line in lines) > 1
    assert not work.folder.exists()  # borders are not kept


@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
def test_rounded_borders_change_little(work_of: Callable[..., Work], carry_out: Any, tmp_path: Path, kind: str) -> None:
    plain, rounded = work_of(run=tmp_path / "a"), work_of(run=tmp_path / "b", kind=kind)
    assert not same(carry_out(plain), carry_out(rounded))
    losses = [files.read_metrics(work.run / "metrics.jsonl")[-1]["eval"]["score"] for work in (plain, rounded)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("kind", ["compute", "bfloat16", "float8"])
def test_a_border_gives_back_what_was_written(tmp_path: Path, kind: str) -> None:
    border = Border(tmp_path / "b", "k", kind)
    hidden = torch.randn(2, 5, 256) * torch.logspace(-3, 3, 256)
    border.write("train", 0, {"hidden": hidden, "ids": torch.arange(4)})
    border.finish({"train": 1, "valid": 0})
    found = Border(tmp_path / "b", "k", kind).read("train", 0)
    assert torch.equal(found["ids"], torch.arange(4))
    error = (found["hidden"].float() - hidden).abs()
    assert (error <= {"compute": 0, "bfloat16": 2**-8, "float8": 2**-3}[kind] * hidden.abs()).float().mean() > 0.9
    assert error.max() <= 2**-4 * hidden.abs().max()
    with pytest.raises(UserError, match="another teacher"):
        Border(tmp_path / "b", "other", kind)


def test_float8_at_zero_and_at_an_odd_width(tmp_path: Path) -> None:
    border = Border(tmp_path / "b", "k", "float8")
    border.write("train", 0, {"hidden": torch.zeros(1, 2, 24)})
    assert torch.equal(border.read("train", 0)["hidden"], torch.zeros(1, 2, 24))


class Killed(BaseException):
    """As SIGKILL: nothing is tidied up that a process would have to do itself."""


@pytest.mark.parametrize("block", [None, 2])
def test_goes_on_after_a_kill_at_any_chunk(
    work_of: Callable[..., Work],
    carry_out: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int | None,
) -> None:
    wanted = carry_out(work_of(run=tmp_path / "whole", block=block))
    trained: list[int] = []
    train = stream_layer.run_stage
    write = Border.write

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = train(*args, **kwargs)
        trained.append(int(Path(kwargs["folder"]).name.removeprefix("layer-")))
        return result

    monkeypatch.setattr(stream_layer, "run_stage", counted)
    allowed = 0
    for attempt in range(100):
        left = [7 + attempt]

        def killed(self: Border, part: str, number: int, tensors: Any, left: list[int] = left, **how: Any) -> None:
            left[0] -= 1
            if not left[0]:  # half a chunk is there, as after a power failure
                write(self, part, number, tensors, **how)
                path = self.path(part, number)
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                raise Killed
            write(self, part, number, tensors, **how)

        monkeypatch.setattr(Border, "write", killed)
        try:
            found = carry_out(work_of(run=tmp_path / "killed", block=block))
            break
        except Killed:
            allowed += 1
    assert allowed > 3
    assert same(found, wanted)
    assert sorted(trained) == [0, 1, 2, 3]


def test_a_stop_within_a_layer_goes_on_to_the_same_numbers(
    work_of: Callable[..., Work], carry_out: Any, tmp_path: Path, source_of: Any, batch_of: Any
) -> None:
    wanted = carry_out(work_of(run=tmp_path / "whole"))
    steps: list[Any] = []
    stopping = Callbacks(progress=steps.append, should_stop=lambda: len(steps) >= 10)
    work = work_of(run=tmp_path / "stopped", callbacks=stopping)
    assert prepare(work, source_of(), [batch_of(100), batch_of(101)])
    assert not take_blocks(work)
    assert len(steps) == 10 and not work.done(1)
    with pytest.raises(UserError, match="not done"):
        complete(work)
    assert same(carry_out(work_of(run=tmp_path / "stopped")), wanted)


def test_a_flipped_byte_is_named(work_of: Callable[..., Work], source_of: Any) -> None:
    work = work_of([2, 3])
    assert prepare(work, source_of(), [])
    path = work.border(0).path("train", 3)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000003.*not as it was written.*border-000") as raised:
        take_blocks(work)
    assert str(path) in str(raised.value)
    shutil.rmtree(work.border(0).folder)  # what the message says
    assert prepare(work, source_of(), []) and take_blocks(work)


def test_a_finished_border_is_not_made_again(work_of: Callable[..., Work], carry_out: Any) -> None:
    work = work_of(keep=True)
    first = carry_out(work)
    before = {path: path.stat().st_mtime_ns for path in work.folder.rglob("*.safetensors")}
    assert {p.parent.name for p in before} >= {"batches", "border-000", "border-001", "border-002", "border-003"}
    shutil.rmtree(work.stage_folder / "layer-002")
    shutil.rmtree(work.run / "checkpoints")
    (work.stage_folder / "done.json").unlink()
    assert same(carry_out(work_of(keep=True)), first)
    assert before == {path: path.stat().st_mtime_ns for path in work.folder.rglob("*.safetensors")}


def test_nan_names_the_layer(work_of: Callable[..., Work], source_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of(keep=True)
    assert prepare(work, source_of(), [])
    made = stream_layer.transfer_layer

    def broken(teacher: Any, plan: Any, layer: int, seed: int) -> Any:
        mixer, report = made(teacher, plan, layer, seed)
        if layer == 1:
            with torch.no_grad():
                mixer.o_proj.weight[0] = float("nan")
        return mixer, report

    monkeypatch.setattr(stream_layer, "transfer_layer", broken)
    with pytest.raises(RunFailed, match="layer 1"):
        take_blocks(work)
    assert work.done(0) and not work.done(1)


def _worker(llama: Path, run: Path, plan: Any, layers: list[int] | None) -> None:
    torch.set_num_threads(1)
    work = Work(open_teacher(llama), plan, SETTINGS, "align", run, run / "borders", "key", block=2, wait=0.05)
    take_blocks(work, layers)


def test_two_processes_share_the_blocks(
    llama: Path, tmp_path: Path, work_of: Callable[..., Work], carry_out: Any, source_of: Any, batch_of: Any
) -> None:
    wanted = carry_out(work_of(run=tmp_path / "one", block=2))
    work = work_of(run=tmp_path / "two", block=2)
    assert prepare(work, source_of(), [batch_of(100), batch_of(101)])
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(llama, work.run, work.plan, [n, n + 1])) for n in (2, 0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert {path.name for path in work.stage_folder.glob("block-*")} == {"block-000", "block-002"}
    complete(work)
    assert same(checkpoint.Checkpoints(work.run / "checkpoints").require_complete("align").weights(), wanted)
