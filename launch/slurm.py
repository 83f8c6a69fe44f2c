"""An sbatch file for a recipe: one task per node, rendezvous on the first, and a requeue where the run was stopped."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from ..distill.errors import UserError
from .signals import STOPPED

_WORD = re.compile(r"[A-Za-z0-9_.,:@%+-]+")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")

_SCRIPT = """\
#!/bin/bash
# Made by: {made_by}
# Submit it with sbatch from the folder where the recipe's relative paths hold. Give the job up with: scancel JOBID
{directives}

set -euo pipefail

# What the nodes need goes here: module load ..., source venv/bin/activate, export HF_HOME=..., HF_HUB_OFFLINE=1

command=({command})

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
rendezvous="${{hosts[0]}}:$((20000 + SLURM_JOB_ID % 20000))"

# USR1 comes {grace} s before the time limit, TERM when the job is cancelled or preempted; both go on to the processes,
# which save and stop. bash runs a trap only between commands, so srun is in the background and waited for.
step="" requeue=yes signalled=no
pass_on() {{
    signalled=yes
    if [[ -n "$step" ]]; then kill -s "$1" "$step" 2>/dev/null || true; fi
}}
trap 'pass_on USR1' USR1
trap 'requeue=no; pass_on TERM' TERM # Slurm itself requeues what it preempts, and a cancelled job must not come back

srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1{cpus} --kill-on-bad-exit=0 \\
    "${{command[@]}}" --rendezvous "$rendezvous" &
step=$!

code=0
while :; do
    signalled=no
    code=0
    wait "$step" || code=$?
    if [[ "$signalled" == no ]]; then break; fi # else a signal ended the wait, not the step
done

# {stopped}: stopped before its end, everything saved. Any other code is an end, good or bad.
if [[ "$code" -eq {stopped} && "$requeue" == yes ]]; then
    echo "stopped before its end: requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """What Slurm is asked for.

    Attributes:
        name: of the job and its output file.
        nodes: how many.
        gpus: per node; 0 for none.
        nproc: processes per node.
        cpus: cores per node; None leaves them to the site.
        time: limit, as Slurm writes it.
        grace: seconds before the limit at which the run is told to save.
        partition, account, qos: as the site names them.
    """

    name: str
    nodes: int
    gpus: int
    nproc: int
    cpus: int | None = None
    time: str = "24:00:00"
    grace: int = 120
    partition: str | None = None
    account: str | None = None
    qos: str | None = None


def script(job: Job, recipe: str, changes: list[str], made_by: list[str]) -> str:
    """The sbatch file.

    Args:
        job: what is asked for.
        recipe: as `relinear run` takes it.
        changes: `key=value`.
        made_by: the command line that made it, for the first comment.

    Raises:
        UserError: a value that would end or change the line that it stands on.
    """
    if not _TIME.fullmatch(job.time):
        raise UserError(f"--time {job.time}: expected minutes, HH:MM:SS or D-HH:MM:SS, for example --time 24:00:00")
    for option in ("partition", "account", "qos"):
        value = getattr(job, option)
        if value is not None and not _WORD.fullmatch(value):
            raise UserError(f"--{option} {value!r}: expected letters, digits and _ . , : @ % + -")
    for text in (recipe, *changes):
        if not text.isprintable():
            raise UserError(f"{text!r}: a line break or control character cannot go into an sbatch file. Leave it out")
    processes = ["--nproc", str(job.nproc), "--nodes", str(job.nodes), "--resume"]
    return _SCRIPT.format(
        made_by=shlex.join(made_by),
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(job)),
        command=shlex.join(["relinear", "run", recipe, *changes, *processes]),
        nodes=job.nodes,
        # srun does not take sbatch's --cpus-per-task over since Slurm 22.05: a task would get one core.
        cpus="" if job.cpus is None else f" --cpus-per-task={job.cpus}",
        grace=job.grace,
        stopped=STOPPED,
    )


def _directives(job: Job) -> list[str]:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", job.name).strip("-") or "relinear"
    lines = [f"job-name={name}", f"nodes={job.nodes}", "ntasks-per-node=1"]
    lines += [f"gpus-per-node={job.gpus}"] if job.gpus else []
    lines += [] if job.cpus is None else [f"cpus-per-task={job.cpus}"]
    lines += [f"time={job.time}"]
    lines += [f"{key}={value}" for key in ("partition", "account", "qos") if (value := getattr(job, key))]
    # A requeued job keeps its number, so its output goes on in the same file.
    return [*lines, f"output={name}-%j.log", "open-mode=append", "requeue", f"signal=B:USR1@{job.grace}"]
