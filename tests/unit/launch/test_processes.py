"""The processes of a run: their variables, logs and signals, and how their ends become one code and one message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from relinear.distill.errors import MachineError, UserError
from relinear.launch import main as cli
from relinear.launch import processes
from relinear.launch.processes import Place

# What each process does; `case` is its first argument.
STUB = """
import json, os, signal, sys, time
case, rank = sys.argv[1], int(os.environ["RANK"])

def fail(text, code, known=True):
    extra = {"timestamp": "0", "time": time.time(), "known": known}
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": {"message": text, "extraInfo": extra, "errorCode": code}}, file)
    sys.exit(code)

def until_signal(code, after=0.0):
    came = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: came.append(number))
    with open(sys.argv[2] + f"/ready-{rank}", "w") as file:
        file.write(str(os.getpid()))
    while not came:
        time.sleep(0.01)
    print("came", signal.Signals(came[0]).name, file=sys.stderr)
    time.sleep(after)
    if len(came) > 1 and came[1] == signal.SIGINT:
        sys.exit(130)
    sys.exit(code)

if case == "say":
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
    print(json.dumps({name: os.environ[name] for name in names}), flush=True)
    print("talk of", rank, file=sys.stderr)
elif case == "stop":
    until_signal(75, after=0.3 * rank)
elif case == "twice":
    until_signal(75, after=1.0)
elif case == "die":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.4)
    fail("unexpected RuntimeError: connection closed by peer", 1, known=False)
elif case == "same":
    fail("recipe.yaml:3: no", 2)
elif case == "one":
    if rank == 1:
        time.sleep(0.2)
        fail("out of memory", 3)
    fail("unexpected RuntimeError: connection closed by peer", 1, known=False)
elif case.startswith("printed"):
    if rank == int(case[-1]):
        print(f"error: rank {rank} (process 5) has made no progress", file=sys.stderr, flush=True)
        sys.exit(1)
    time.sleep(600)
elif case == "silent":
    sys.exit(4 if rank == 1 else 0)
elif case == "hang":
    if rank == 1:
        fail("NaN in layer 3", 1)
    time.sleep(600)
elif case == "orphan":
    from relinear.launch import worker
    worker.watch_launcher()
    until_signal(75)
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


@pytest.fixture
def run(stub: Path, tmp_path: Path):
    """run(case) -> exit code of two processes that do so."""

    def start(case: str, place: Place | None = None) -> int:
        command = [sys.executable, str(stub), case, str(tmp_path)]
        return processes.run(command, place or Place(2, port=29555), tmp_path / "logs")

    return start


def when_ready(folder: Path, count: int, act) -> threading.Thread:
    """Call `act` once every process waits for its signal."""

    def wait() -> None:
        until = time.monotonic() + 30
        while len(list(folder.glob("ready-*"))) < count and time.monotonic() < until:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_variables_and_logs(run, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run("say") == 0
    out, err = capfd.readouterr()
    zero = json.loads(out)
    assert zero["RANK"] == zero["LOCAL_RANK"] == zero["GROUP_RANK"] == "0" and zero["WORLD_SIZE"] == "2"
    assert zero["MASTER_ADDR"] == "127.0.0.1"
    assert int(zero["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    assert err == "talk of 0\n"
    first, second = ((tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "rank 0 of 2" in first and "talk of 0\n" in first and "{" not in first
    assert "rank 1 of 2" in second and '"RANK": "1"' in second and "talk of 1\n" in second
    assert run("say") == 0
    assert (tmp_path / "logs" / "rank-1.log").read_text().count("talk of 1") == 2, "a resumed run's log goes on"


def test_ranks_of_the_second_node(run, tmp_path, capfd):
    assert run("say", Place(2, nodes=3, node_rank=1, host="node0", port=29500)) == 0
    assert capfd.readouterr() == ("", "")
    said = [json.loads((tmp_path / "logs" / f"rank-{n}.log").read_text().splitlines()[1]) for n in (2, 3)]
    assert [(row["RANK"], row["LOCAL_RANK"], row["WORLD_SIZE"], row["GROUP_RANK"]) for row in said] == [
        ("2", "0", "6", "1"),
        ("3", "1", "6", "1"),
    ]
    assert said[0]["MASTER_ADDR"] == "node0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_stops(run, tmp_path, capfd, number):
    before = signal.getsignal(number)
    thread = when_ready(tmp_path, 2, lambda: os.kill(os.getpid(), number))
    assert run("stop") == 75
    thread.join()
    assert signal.getsignal(number) == before
    err = capfd.readouterr().err
    name = signal.Signals(number).name
    assert f"{name}: saving and stopping" in err and f"came {name}" in err and "error" not in err
    assert f"came {name}" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_a_second_interrupt_ends_at_once(run, tmp_path):
    def act() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = when_ready(tmp_path, 2, act)
    assert run("twice") == 130
    thread.join()


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("die", 1, "error: rank 1: was killed by SIGKILL"),
        ("same", 2, "error: recipe.yaml:3: no\n"),
        ("one", 3, "error: rank 1: out of memory"),
        ("hang", 1, "error: rank 1: NaN in layer 3"),
        ("printed 1", 1, "error: rank 1 (process 5) has made no progress"),
        ("printed 0", 1, "error: rank 0 (process 5) has made no progress"),
        ("silent", 4, "error: rank 1: ended with exit code 4 and no message"),
    ],
)
def test_one_message_names_the_cause(run, capfd, monkeypatch, case, code, words):
    """Not what another process says because the first one is gone."""
    monkeypatch.setattr(processes, "AFTER_DEATH", 1.0)
    assert run(case) == code
    err = capfd.readouterr().err
    assert words in err and err.count("error:") == 1, err
    assert ("rank-1.log" in err) == words.startswith("error: rank 1")


def test_another_node_that_failed_ends_this_one(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(processes, "AFTER_DEATH", 0.5)
    monkeypatch.setattr(processes, "_POLL_NODES", 0.2)
    (tmp_path / "logs").mkdir()
    word = tmp_path / "logs" / "failed-node-0.json"
    word.write_text("{}")  # of an earlier start

    def act() -> None:
        word.write_text(json.dumps({"message": "out of memory"}))

    thread = threading.Timer(1.5, act)
    thread.start()
    began = time.monotonic()
    assert run("stop", Place(1, nodes=2, node_rank=1, host="node0", port=29500)) == 1
    assert time.monotonic() - began > 1.0, "the word of an earlier start does not count"
    thread.join()
    assert "error: node 0 failed" in capfd.readouterr().err
    assert run("same", Place(1, nodes=2, node_rank=0, host="node0", port=29500)) == 2
    assert json.loads(word.read_text())["message"] == "recipe.yaml:3: no"


def test_processes_stop_when_their_launcher_is_killed(stub, tmp_path):
    code = (
        "import sys; from pathlib import Path; from relinear.launch.processes import Place, run\n"
        f"run([sys.executable, {str(stub)!r}, 'orphan', {str(tmp_path)!r}], Place(2, port=1), Path({str(tmp_path)!r}))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    when_ready(tmp_path, 2, launcher.kill).join()
    launcher.wait()
    until = time.monotonic() + 20
    pids = [int(path.read_text()) for path in tmp_path.glob("ready-*")]
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == [], "rank 0, whose stderr went through the launcher, stops as well"
    log = tmp_path / "rank-1.log"
    assert "the launcher is gone" in log.read_text() and "came SIGTERM" in log.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "2"], "--nodes 2: needs the number of processes"),
        (["--rendezvous", "a:1"], "--rendezvous a:1: needs"),
        (["--nproc", "0"], "--nproc 0"),
        (["--nproc", "many"], "--nproc many"),
        (["--nproc", "2", "--nodes", "2"], "--node-rank R"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "2"], "--node-rank 2: expected 0 to 1"),
        (["--nproc", "2", "--node-rank", "1"], "--node-rank 1: expected 0 to 0"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "0"], "--rendezvous HOST:29500"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "0", "--rendezvous", "host"], "--rendezvous host: expected"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "0", "--rendezvous", "h:70000"], "HOST:PORT"),
        (["--nproc", "2"], "engine.parallel: single is one process, and there are to be 2"),
    ],
)
def test_wrong_places_are_refused_before_anything_starts(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    assert cli.main(["run", "quickstart", *options]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_places(monkeypatch):
    assert processes.place(None, None, None, None) is None
    one = processes.place("3", None, None, None)
    assert one is not None and (one.world, one.host) == (3, "127.0.0.1") and one.port > 0
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert processes.place("4", 2, None, "[fe80::1]:29500") == Place(4, 2, 1, "fe80::1", 29500)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="started by a launcher already"):
        processes.place("2", None, None, None)


def test_auto_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(MachineError, match=r"--nproc auto.*relinear doctor"):
        processes.place("auto", None, None, None)


def test_one_of_several_processes_refuses_an_engine_of_one(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["run", "quickstart"]) == 2
    assert "engine.parallel: single" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["run", "quickstart"]) == 2
    assert capsys.readouterr() == ("", "")
