"""Runs survive: kill -9 at random moments, damaged and foreign files, full disks, dead and hung ranks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relinear.distill import checkpoint, files, lock, manifest
from relinear.distill.errors import UserError
from relinear.launch.main import main
from relinear.recipes import loader, runner

KILLS = int(os.environ.get("RELINEAR_TEST_KILLS", "10"))
"""Kills of each kill test; `RELINEAR_TEST_KILLS=200` is the full measure (docs/results/trust.md)."""

SMALL = [
    "stages.calibrate.tokens=1k",
    "stages.align.tokens=3k",
    "stages.glue.tokens=3k",
    "stages.align.batch=4",
    "stages.glue.batch=4",
    "data.seq_len=64",
    "eval.tokens=1k",
    "save.every=600",
    "eval.every=1k",
]
FORKS = runpy.run_path(str(Path(__file__).with_name("forks.py")))
Forked, Ranks = FORKS["Forked"], FORKS["Ranks"]


@pytest.fixture(scope="module")
def teacher(make_teacher: Any) -> Path:
    return make_teacher("llama", num_hidden_layers=2)


def arguments(teacher: Path, text: Path, out: Path, *changes: str) -> list[str]:
    given = [f"teacher.model={teacher}", f"data.source={text}", *SMALL, *changes]
    return ["run", "gated_deltanet", *given, "--out", str(out)]


def recipe(teacher: Path, text: Path, out: Path, *changes: str) -> Any:
    given = [f"teacher.model={teacher}", f"data.source={text}", f"save.dir={out}"]
    return loader.load("gated_deltanet", [*given, *SMALL, *changes])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or a process's memory says."""
    clocks = ("tokens_per_second", "peak_memory")
    lines = files.read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def flip(path: Path, place: int = -5) -> None:
    """Change one bit of a file; its size and time stay."""
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def first(teacher: Path, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "first"
    runner.run(recipe(teacher, story_file, out))
    return out


# Kill -9 at random moments.


def changes(alive: Callable[[], bool], folder: Path, count: int) -> bool:
    """Wait until files below `folder` appeared, vanished or grew `count` times; False where the process ended first."""
    before: dict[str, int] = {}
    while alive():
        now: dict[str, int] = {}
        for place, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):  # gone again
                    now[f"{place}/{name}"] = os.stat(f"{place}/{name}").st_size
        count -= now != before
        if count <= 0:
            return True
        before = now
        time.sleep(0.002)
    return False


def await_moment(alive: Callable[[], bool], folder: Path, rng: random.Random, usual: float) -> None:
    """Wait for a random time, or for a random change of the folder (which is while something is saved)."""
    if rng.random() < 0.5:
        end = time.monotonic() + rng.uniform(0.0, usual)
        while time.monotonic() < end and alive():
            time.sleep(0.002)
    else:
        changes(alive, folder, rng.randint(1, 40))
        time.sleep(rng.uniform(0, 0.02))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(
    first: Path, teacher: Path, story_file: Path, tmp_path: Path
) -> None:
    """The real command, killed again and again in every stage, while it saves, measures and exports, and resumed."""
    began = time.monotonic()
    assert main(arguments(teacher, story_file, tmp_path / "timed")) == 0
    usual = time.monotonic() - began
    rng = random.Random(5)
    kills, ended, where = 0, 0, {}
    while kills < KILLS:
        out = tmp_path / f"run-{ended}"
        for attempt in range(60):
            argv = [*arguments(teacher, story_file, out), "--resume"]
            process = Forked(lambda argv=argv: main(argv), tmp_path / "log")
            if attempt < 59 and kills < KILLS:
                await_moment(process.alive, out, rng, usual)
                process.kill()
            while process.alive():
                time.sleep(0.01)
            if process.code != -signal.SIGKILL:
                assert process.code == 0, process.log.read_text()
                break
            kills += 1
            newest = checkpoint.Checkpoints(out / "checkpoints").newest() if (out / "checkpoints").is_dir() else None
            place = "before any save" if newest is None else newest.stage + (" ended" if newest.complete else "")
            where[place] = where.get(place, 0) + 1
        assert same(weights(out), weights(first)), f"run {ended} after {kills} kills"
        assert numbers(out) == numbers(first), f"run {ended} after {kills} kills"
        assert manifest.check_manifest(out) == []
        assert not [path for path in out.rglob("*") if files.is_temporary(path)]
        shutil.rmtree(out)
        ended += 1
    print(f"\n{kills} kills in {ended} runs, newest save at the kill: {where}; {time.monotonic() - began:.0f} s")


ENGINES = ("ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")


@pytest.fixture(scope="module")
def two_ranks(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, float]]:
    """Engine -> a run of two processes under it, undisturbed, and the seconds that it took."""
    from accelerate import PartialState  # noqa: F401  (forks have it then)

    made: dict[str, tuple[Path, float]] = {}

    def straight(engine: str) -> tuple[Path, float]:
        if engine not in made:
            if engine.startswith("deepspeed"):
                import deepspeed  # noqa: F401  (likewise)
            folder = tmp_path_factory.mktemp("two") / "run"
            began = time.monotonic()
            ranks = Ranks.of_child(engine, teacher, folder, 2, folder.parent / "log")
            assert ranks.codes() == [0, 0], (folder.parent / "log-0").read_text()
            made[engine] = folder, time.monotonic() - began
        return made[engine]

    return straight


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_at_random_moments_two_ranks_end_in_the_same_bits(
    engine: str, two_ranks: Callable[[str], tuple[Path, float]], teacher: Path, tmp_path: Path
) -> None:
    """One rank or both are killed, whichever it is; the one that is left ends by itself."""
    straight, usual = two_ranks(engine)
    began, rng = time.monotonic(), random.Random(7 + ENGINES.index(engine))
    kills, alone, ended, wanted, where = 0, 0, 0, max(3, KILLS // 8), {}
    while kills < wanted:
        out = tmp_path / f"run-{ended}"
        for attempt in range(40):
            ranks = Ranks.of_child(engine, teacher, out, 2, tmp_path / "log")
            killed = False
            if attempt < 39 and kills < wanted:
                await_moment(ranks.alive, out, rng, usual)
                if ranks.alive():
                    ranks.kill(rng.choice([[0], [1], [0, 1]]))
                    killed = True
            codes = ranks.codes()
            if codes == [0, 0]:
                break
            assert killed, "".join((tmp_path / f"log-{rank}").read_text() for rank in (0, 1))
            alone += 1 in codes
            kills += 1
            newest = checkpoint.Checkpoints(out / "checkpoints").newest() if (out / "checkpoints").is_dir() else None
            place = "before any save" if newest is None else newest.stage + (" ended" if newest.complete else "")
            where[place] = where.get(place, 0) + 1
        for stage in ("align", "glue"):
            made, held = (checkpoint.Checkpoints(f / "checkpoints").require_complete(stage) for f in (out, straight))
            assert same(made.weights(), held.weights()), f"run {ended} after {kills} kills, {stage}"
        losses = [[line["loss"] for line in files.read_metrics(f / "metrics.jsonl")] for f in (out, straight)]
        assert losses[0] == losses[1], f"run {ended} after {kills} kills"
        shutil.rmtree(out)
        ended += 1
    seconds = time.monotonic() - began
    print(f"\n{engine}: {kills} kills of one or both of two ranks in {ended} runs, newest save at the kill: {where}; "
          f"{alone} times the other ended by itself; {seconds:.0f} s")  # fmt: skip


def test_a_rank_that_dies_ends_the_other_and_harms_nothing(
    two_ranks: Callable[[str], tuple[Path, float]], teacher: Path, tmp_path: Path
) -> None:
    straight, _ = two_ranks("ddp")
    ranks = Ranks.of_child("ddp", teacher, tmp_path / "run", 2, tmp_path / "log")
    assert changes(ranks.alive, tmp_path / "run", 12)
    ranks.kill([1])
    codes = ranks.codes()
    assert codes[1] == -signal.SIGKILL and codes[0] == 1  # by itself, as the message of a lost peer came
    assert Ranks.of_child("ddp", teacher, tmp_path / "run", 2, tmp_path / "log").codes() == [0, 0]
    for stage in ("align", "glue"):
        made, held = (
            checkpoint.Checkpoints(f / "checkpoints").require_complete(stage) for f in (tmp_path / "run", straight)
        )
        assert same(made.weights(), held.weights())


# One run, one folder; what is in it is what was written.


def test_two_runs_never_share_a_folder(
    first: Path, teacher: Path, story_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with lock.RunLock(first):
        code = "import sys; from relinear.launch.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *arguments(teacher, story_file, first), "--resume"]
        assert subprocess.run(command, check=False).returncode == 2
        said = errors(capfd.readouterr().err)
        assert len(said) == 1 and f"in use by another run (process {os.getpid()} on {socket.gethostname()}" in said[0]
        # Reading needs no lock.
        assert main(["generate", str(first / "export"), "--prompt", "Once", "--max-new-tokens", "1"]) == 0
    assert lock.holder(first) is None


def test_a_finished_run_knows_its_files(
    first: Path, teacher: Path, story_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert manifest.check_manifest(first) == []
    listed = json.loads((first / manifest.MANIFEST).read_text())
    assert listed["complete"] and {"run.json", "metrics.jsonl", "export/model.safetensors"} <= listed["files"].keys()
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    flip(copy / "export" / "model.safetensors")
    assert main(["verify", str(copy)]) == 1
    assert "1 files are not as the run wrote them" in errors(capsys.readouterr().err)[-1]

    class Listener(runner.Silent):
        said: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.said.append(text)

    runner.run(recipe(teacher, story_file, copy), resume=True, progress=Listener())
    assert [line for line in Listener.said if "export/model.safetensors: other content than when" in line]


def test_a_flipped_byte_in_a_checkpoint_is_found_and_the_run_goes_on(
    first: Path, teacher: Path, story_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    class Stopper(runner.Silent):
        def update(self, tokens: int, **metrics: float) -> None:
            if tokens > 2000:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    assert runner.run(recipe(teacher, story_file, out), progress=Stopper())["status"] == "stopped"
    newest = checkpoint.Checkpoints(out / "checkpoints").newest("align")
    assert newest is not None
    flip(newest.path / "weights.safetensors")
    capsys.readouterr()
    assert main([*arguments(teacher, story_file, out), "--resume"]) == 0
    said = capsys.readouterr().err
    assert f"{newest.path.name}/weights.safetensors: other content than when it was saved" in said
    assert same(weights(out), weights(first)) and numbers(out) == numbers(first)


def test_a_swapped_teacher_is_found_before_any_work(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    copy, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, copy)
    runner.run(recipe(copy, story_file, out), max_hours=0.0)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"run: holds another run.*teacher\.fingerprint\.model\.safetensors was"):
        runner.run(recipe(copy, story_file, out), resume=True)


def test_a_truncated_teacher_shard_ends_before_work(
    teacher: Path, story_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    path = copy / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    assert main(arguments(copy, story_file, tmp_path / "run")) == 2
    said = errors(capsys.readouterr().err)
    assert len(said) == 1 and str(path) in said[0] and "truncated" in said[0]
    assert not (tmp_path / "run").exists()


def test_a_changed_data_file_is_found_when_resuming(teacher: Path, story_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copyfile(story_file, text)
    out = tmp_path / "run"

    class Stopper(runner.Silent):
        def update(self, tokens: int, **metrics: float) -> None:
            if tokens > 1500:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    runner.run(recipe(teacher, text, out, "data.valid=0.2"), progress=Stopper())
    text.write_text(text.read_text().replace("the", "a"))
    with pytest.raises(UserError, match="data: the checkpoint was made with data"):
        runner.run(recipe(teacher, text, out, "data.valid=0.2"), resume=True)


# Disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.2 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no permission to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_ends_with_one_message_and_a_larger_one_goes_on(
    first: Path, teacher: Path, story_file: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "run"
    assert main(arguments(teacher, story_file, out)) == 3
    said = errors(capsys.readouterr().err)
    assert len(said) == 1 and "no space left on the disk" in said[0] and "--resume" in said[0]
    assert (out / "run.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main([*arguments(teacher, story_file, out), "--resume"]) == 0
    assert same(weights(out), weights(first)) and numbers(out) == numbers(first)


def test_a_read_only_disk_is_named(
    teacher: Path, story_file: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(arguments(teacher, story_file, small_disk / "run")) == 3
    said = errors(capsys.readouterr().err)
    assert len(said) == 1 and "cannot be written (Read-only file system). Choose another folder" in said[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_files_that_may_not_grow_further_end_with_one_message(
    first: Path, teacher: Path, story_file: Path, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE: what a quota does, for any user."""
    out = tmp_path / "run"
    resource_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource_limit[1]))
    try:
        process = Forked(lambda: main(arguments(teacher, story_file, out)), tmp_path / "log")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, resource_limit)
    while process.alive():
        time.sleep(0.05)
    said = errors((tmp_path / "log").read_text())
    assert process.code == 3 and len(said) == 1 and "no space left on the disk" in said[0]
    assert main([*arguments(teacher, story_file, out), "--resume"]) == 0
    assert same(weights(out), weights(first))


# Hanging.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_hung_step_ends_with_stacks_and_measuring_does_not(
    first: Path, teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relinear.distill import loop
    from relinear.recipes import schema

    assert schema.EngineSection().timeout >= 3600
    held = {"seconds": 0.0}
    step = loop._Run._one_step

    def slow(self: Any) -> None:
        if self.step == 4:
            time.sleep(held["seconds"])
        step(self)

    monkeypatch.setattr(loop._Run, "_one_step", slow)
    watched = runner.Watchdog
    monkeypatch.setattr(runner, "Watchdog", lambda seconds, *more: watched(min(seconds, 3.0), *more))
    held["seconds"] = 60.0
    out = tmp_path / "run"
    process = Forked(lambda: main(arguments(teacher, story_file, out)), tmp_path / "log")
    while process.alive():
        time.sleep(0.05)
    said = errors((tmp_path / "log").read_text())
    assert process.code == 1 and len(said) == 1 and "has made no progress for" in said[0] and "in align" in said[0]
    assert "in slow" in (out / "logs" / "hung-rank-0.txt").read_text()
    held["seconds"] = 0.0
    assert main([*arguments(teacher, story_file, out), "--resume"]) == 0
    assert same(weights(out), weights(first))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_rank_that_hangs_ends_the_run_with_the_others_stacks(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = runner.Watchdog
    monkeypatch.setattr(runner, "Watchdog", lambda seconds, *more: watched(min(seconds, 6.0), *more))
    out = tmp_path / "run"
    argv = arguments(teacher, story_file, out, "engine.parallel=ddp")
    ranks = Ranks.of(lambda: main(argv), 2, tmp_path / "log")
    while ranks.alive() and not list(out.glob("checkpoints/align-*/state.json")):
        time.sleep(0.01)
    assert ranks.alive(), (tmp_path / "log-0").read_text()
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    while ranks.processes[0].alive():
        time.sleep(0.05)
    ranks.kill([1])
    said = errors((tmp_path / "log-0").read_text())
    assert ranks.processes[0].code == 1 and len(said) == 1, said
    assert said[0].startswith("error: rank 0 (process ") and "has made no progress for" in said[0]
    assert "distributed_c10d.py" in (out / "logs" / "hung-rank-0.txt").read_text()  # it waits for the other
