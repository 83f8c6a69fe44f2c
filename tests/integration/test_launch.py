"""Two real processes on the CPU: started by relinear and by torchrun, stopped by a signal, gone on with, one dying."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from relinear.launch.main import main

SMALL = [
    *("layers.mixer=gated_deltanet", "engine.parallel=ddp", "data.seq_len=64", "eval.tokens=1k"),
    "stages=[{transfer: {}}, {align: {tokens: 8k, batch: 4}}, {glue: {tokens: 2k, batch: 4, lr: 1e-3}}]",
    *("save.every=1k", "eval.every=4k"),
]
CODE = "import sys; from relinear.launch.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def given(make_teacher, story_file) -> list[str]:
    """The recipe and its changes, without a run folder."""
    teacher = make_teacher("llama", num_hidden_layers=2)
    return ["convert", f"teacher.model={teacher}", f"data.source={story_file}", *SMALL]


def command(given: list[str], out: Path, *more: str) -> list[str]:
    return [sys.executable, "-c", CODE, "run", *given, "--out", str(out), "--nproc", "2", *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def steps(folder: Path) -> int:
    """Steps that the run has written down."""
    with contextlib.suppress(OSError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory) -> Path:
    """A run folder of two processes that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "first"
    done = subprocess.run(command(given, out, "--json"), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "complete", "stdout is rank 0's data and nothing else"
    assert done.stderr.count("engine ddp: 2 processes") == 1
    return out


def test_each_rank_has_a_log(undisturbed):
    logs = {path.name: path.read_text() for path in (undisturbed / "logs").glob("rank-*.log")}
    assert logs.keys() == {"rank-0.log", "rank-1.log"}
    assert "align done" in logs["rank-0.log"] and "rank 1 of 2" in logs["rank-1.log"]
    assert "error" not in logs["rank-1.log"].lower()
    environment = json.loads((undisturbed / "run.json").read_text())["environment"]
    assert environment["world_size"] == 2


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_to_the_launcher_saves_and_the_resumed_run_ends_at_the_same_weights(
    given, undisturbed, tmp_path, number
):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(given, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while steps(out) < 2 and process.poll() is None:
        time.sleep(0.005)
    # As a terminal does on Ctrl-C: the whole foreground group. The processes are not in it.
    os.killpg(process.pid, number)
    stdout, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped at step" in stdout and "error" not in err
    assert err.rstrip().splitlines()[-1].startswith("Next: relinear run convert") and err.rstrip().endswith("--resume")
    assert not (out / "export").exists() and list((out / "checkpoints").iterdir())
    done = subprocess.run(command(given, out, "--resume"), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    again, before = weights(out), weights(undisturbed)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_one_message_and_it_goes_on(given, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(command(given, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while steps(out) < 3 and process.poll() is None:
        time.sleep(0.005)
    os.kill(child(process.pid, "1"), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.count("error:") == 1 and "error: rank 1: was killed by SIGKILL" in err and "rank-1.log" in err
    assert "Traceback" not in err
    done = subprocess.run(command(given, out, "--resume"), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(undisturbed).items())


def child(parent: int, rank: str) -> int:
    """The process of that rank."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            mine = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == parent
            if mine and f"\0RANK={rank}\0" in "\0" + entry.joinpath("environ").read_text():
                return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_torchrun_does_the_same(given, undisturbed, tmp_path):
    out = tmp_path / "run"
    arguments = [*given, "--out", str(out), "--json"]
    done = torchrun(arguments, "relinear.recipes.run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "complete"
    assert done.stderr.count("engine ddp: 2 processes") == 1
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(undisturbed).items())


def test_under_torchrun_a_mistake_is_said_once(given, tmp_path):
    done = torchrun([*given, "stages.glue.tokns=1", "--out", str(tmp_path / "run")], "relinear.recipes.run")
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.count("error: ") <= 1
    assert "stages.glue.tokns: unknown key" in done.stderr, "in torchrun's own summary at least"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_nodes_stop_together_and_go_on(given, undisturbed, tmp_path):
    """Two launchers of one process each; the signal comes to one of them alone, as a preempted node gets it."""
    out = tmp_path / "run"
    nodes = start_nodes(given, out)
    while steps(out) < 2 and nodes[0].poll() is None:
        time.sleep(0.005)
    nodes[1].send_signal(signal.SIGTERM)
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], said
    assert said[1][0] == "" and "stopped at step" in said[0][0]
    assert "--nodes 2 --node-rank 0 --rendezvous 127.0.0.1:" in said[0][1] and "Next" not in said[1][1]
    nodes = start_nodes(given, out, "--resume")
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert {path.name for path in (out / "logs").iterdir()} >= {"rank-0.log", "rank-1.log"}
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(undisturbed).items())


@pytest.mark.slow
def test_a_node_that_fails_ends_the_others(given, tmp_path):
    out = tmp_path / "run"
    nodes = start_nodes(given, out)
    while steps(out) < 2 and nodes[0].poll() is None:
        time.sleep(0.005)
    os.kill(child(nodes[1].pid, "1"), signal.SIGKILL)
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], said
    assert "error: node 1 failed" in said[0] and said[0].count("error:") == 1
    assert "error: rank 1: was killed by SIGKILL" in said[1]
    assert "SIGKILL" in (out / "logs" / "failed-node-1.json").read_text()


def start_nodes(given: list[str], out: Path, *more: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    alone = [word if word != "2" else "1" for word in command(given, out, *more)]
    commands = [[*alone, "--nodes", "2", "--node-rank", str(node), "--rendezvous", address] for node in (0, 1)]
    return [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]


SRUN = """#!/bin/bash
# One task per node, as Slurm starts them; signals go on to the tasks.
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -USR1 $first $second' USR1
code=0
for task in $first $second; do
    while :; do
        wait $task; ended=$?
        kill -0 $task 2>/dev/null || break
    done
    wait $task; ended=$?
    (( ended > code )) && code=$ended
done
exit $code
"""


@pytest.mark.slow
def test_an_sbatch_file_runs_is_requeued_and_ends(given, undisturbed, tmp_path, monkeypatch):
    """The file that `relinear slurm` writes, by bash, with real processes; srun and scontrol are stand-ins."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    options = ["--nodes", "2", "--gpus-per-node", "0", "--nproc", "1", "--out", "job.sbatch"]
    assert main(["slurm", *given, f"save.dir={out}", *options]) == 0
    scripts = {
        "srun": SRUN,
        "scontrol": '#!/bin/bash\n[[ $1 == show ]] && printf "127.0.0.1\\nother\\n" || echo "$@" >> requeued\n',
        "relinear": f"#!{sys.executable}\n{CODE}\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "x"}
    job = subprocess.Popen(["bash", "job.sbatch"], env=os.environ | slurm, stderr=subprocess.PIPE, text=True)
    while steps(out) < 2 and job.poll() is None:
        time.sleep(0.005)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 75, err
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    done = subprocess.run(["bash", "job.sbatch"], env=os.environ | slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(undisturbed).items())


def torchrun(arguments: list[str], module: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    return subprocess.run([*start, *arguments], capture_output=True, text=True, check=False, timeout=300)


def test_a_stop_in_one_process_has_the_code_that_requeues(given, tmp_path, capsys):
    single = [*given, "engine.parallel=single", "--out", str(tmp_path / "run"), "--max-hours", "1e-6"]
    assert main(["run", *single]) == 75
    out, err = capsys.readouterr()
    assert "stopped at step" in out and err.rstrip().endswith("--resume")


def test_a_folder_in_use_or_with_other_things_gets_no_logs(given, undisturbed, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("words")
    assert main(["run", *given, "--out", str(tmp_path), "--nproc", "2"]) == 2
    assert "is not a run of relinear" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert main(["run", *given, "--out", str(undisturbed), "--nproc", "2"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}


def test_several_processes_need_an_engine_and_an_engine_needs_processes(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["run", *given]) == 2
    err = capsys.readouterr().err
    assert "engine.parallel: ddp needs processes" in err and "--nproc auto" in err
    assert main(["run", *given, "engine.parallel=single", "--nproc", "2"]) == 2
    assert "engine.parallel: single is one process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
