"""The sbatch file, executed: bash runs it with a stand-in for srun and scontrol that write down what they were told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relinear.distill.errors import UserError
from relinear.launch import main as cli
from relinear.launch.slurm import Job, script

# As Slurm's: every task gets the step's arguments and its number; signals go on to the tasks; the highest code counts.
SRUN = """#!{python}
import json, os, signal, subprocess, sys
options = []
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    options.append(arguments.pop(0))
nodes = int(dict(option.split("=") for option in options)["--ntasks"])
tasks = [subprocess.Popen(arguments, env=os.environ | {{"SLURM_NODEID": str(n)}}) for n in range(nodes)]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
json.dump(options, open("srun.json", "w"))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then
    # More than a pipe's reader would wait for: a script that reads one line only must not die of it.
    printf '%s\\n' node-a node-b
else
    echo "$@" >> scontrol.log
fi
"""
RELINEAR = """#!{python}
import json, os, signal, sys, time
node = os.environ["SLURM_NODEID"]
came = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: came.append(signal.Signals(number).name))
json.dump(sys.argv[1:], open(f"node-{{node}}.json", "w"))
until = time.monotonic() + float(os.environ.get("SECONDS_OF_WORK", "30"))
while not came and time.monotonic() < until:
    time.sleep(0.01)
time.sleep(0.4)  # saving
open(f"came-{{node}}", "w").write(" ".join(came))
sys.exit(75 if came else int(os.environ.get("CODE", "0")))
"""
HARD = 'data.source=it\'s a $(touch harmed) "file"; `touch harmed`.txt'


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with an sbatch file for two nodes, and bin/ with the stand-ins."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("relinear", RELINEAR)):
        path = tmp_path / "bin" / name
        path.write_text(text.format(python=sys.executable) if "{python}" in text else text)
        path.chmod(0o755)
    job = Job("my recipe", nodes=2, gpus=4, nproc=4, cpus=16)
    (tmp_path / "job.sbatch").write_text(script(job, "a b.yaml", [HARD], ["relinear", "slurm", "a b.yaml", HARD]))
    return tmp_path


def start(cluster: Path, **environment: str) -> subprocess.Popen[str]:
    path = f"{cluster / 'bin'}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "PATH": path, "HOME": str(cluster)}
    return subprocess.Popen(
        ["bash", "job.sbatch"], cwd=cluster, env=slurm | environment, stderr=subprocess.PIPE, text=True
    )


def requeued(cluster: Path) -> str:
    path = cluster / "scontrol.log"
    return path.read_text() if path.exists() else ""


def test_every_node_gets_the_command_as_it_was_typed(cluster):
    job = start(cluster, SECONDS_OF_WORK="0")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 0 and err == "" and requeued(cluster) == ""
    expected = ["run", "a b.yaml", HARD, "--nproc", "4", "--nodes", "2", "--resume"]
    for node in (0, 1):
        found = json.loads((cluster / f"node-{node}.json").read_text())
        assert found == [*expected, "--rendezvous", "node-a:24711"]
    options = json.loads((cluster / "srun.json").read_text())
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16"} <= set(options)
    assert "--kill-on-bad-exit=0" in options, "the first node to have saved must not end the others"
    assert not (cluster / "harmed").exists()


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGUSR1, "requeue 4711\n"), (signal.SIGTERM, "")], ids=["limit", "cancelled"]
)
def test_a_signal_to_the_script_reaches_the_processes_and_their_saving_is_waited_for(cluster, number, again):
    job = start(cluster)
    until = time.monotonic() + 30
    while not all((cluster / f"node-{n}.json").exists() for n in (0, 1)) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 75, err
    assert [(cluster / f"came-{n}").read_text() for n in (0, 1)] == [signal.Signals(number).name] * 2
    assert requeued(cluster) == again


def test_several_signals_while_it_saves(cluster):
    job = start(cluster)
    until = time.monotonic() + 30
    while not all((cluster / f"node-{n}.json").exists() for n in (0, 1)) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    for _ in range(3):
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.08)
    job.communicate(timeout=60)
    assert job.returncode == 75 and requeued(cluster) == "requeue 4711\n"
    assert (cluster / "came-1").read_text().startswith("SIGUSR1")


@pytest.mark.parametrize(("code", "again"), [("75", "requeue 4711\n"), ("1", ""), ("2", ""), ("130", "")])
def test_only_a_stopped_run_is_requeued(cluster, code, again):
    """75 without a signal: --max-hours."""
    job = start(cluster, SECONDS_OF_WORK="0", CODE=code)
    job.communicate(timeout=60)
    assert job.returncode == int(code) and requeued(cluster) == again


def test_a_failing_requeue_is_not_hidden(cluster):
    (cluster / "bin" / "scontrol").write_text(SCONTROL.replace('echo "$@" >> scontrol.log', "exit 9"))
    job = start(cluster, SECONDS_OF_WORK="0", CODE="75")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 9 and "requeueing job 4711" in err


def test_bash_takes_it_and_the_directives_come_first(cluster):
    assert subprocess.run(["bash", "-n", "job.sbatch"], cwd=cluster, check=False).returncode == 0
    lines = (cluster / "job.sbatch").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert lines[0] == "#!/bin/bash"
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command
    assert directives == [
        *("job-name=my-recipe", "nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=16"),
        *("time=24:00:00", "output=my-recipe-%j.log", "open-mode=append", "requeue", "signal=B:USR1@120"),
    ]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(cluster):
    assert subprocess.run(["shellcheck", "job.sbatch"], cwd=cluster, check=False).returncode == 0


@pytest.mark.parametrize(
    "wrong",
    [{"time": "soon"}, {"time": "1\n#SBATCH --x"}, {"partition": "a b"}, {"account": "a\nb"}, {"qos": "$(x)"}],
    ids=str,
)
def test_what_would_change_another_line_is_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        script(Job("a", 1, 1, 1, **wrong), "rwkv7", [], [])


def test_control_characters_are_refused():
    with pytest.raises(UserError, match="line break"):
        script(Job("a", 1, 1, 1), "rwkv7", ["data.source=a\nrm -r x"], [])


def test_the_command_writes_a_new_file_and_checks_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["slurm", "quickstart", "--nodes", "1", "--gpus-per-node", "1", "--partition", "gpu"]
    assert cli.main(given) == 0
    out, err = capsys.readouterr()
    assert out == "quickstart.sbatch\n" and err == "Next: sbatch quickstart.sbatch\n"
    text = Path("quickstart.sbatch").read_text()
    assert "#SBATCH --partition=gpu\n" in text and "command=(relinear run quickstart --nproc 1" in text
    assert cli.main(given) == 2
    assert "quickstart.sbatch: exists already" in capsys.readouterr().err
    assert Path("quickstart.sbatch").read_text() == text
    for wrong, words in (
        (["--nodes", "2"], "engine.parallel"),
        (["--gpus-per-node", "0"], "--nproc N"),
        (["stages.glue.tokns=2"], "tokns"),
    ):
        assert cli.main(["slurm", "quickstart", *wrong, "--out", "other"]) == 2
        assert words in capsys.readouterr().err
    assert not Path("other").exists()


def test_a_shipped_recipe_with_a_dot_in_its_name_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["slurm", "qwen2.5-7b-rwkv7", "engine.parallel=fsdp2"]) == 0
    assert capsys.readouterr().out == "qwen2.5-7b-rwkv7.sbatch\n"
    assert "#SBATCH --job-name=qwen2.5-7b-rwkv7\n" in Path("qwen2.5-7b-rwkv7.sbatch").read_text()
