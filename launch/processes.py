"""The processes of a run on this node: started, listened to, stopped, and their end made one exit code and one message.

They get the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …). torchrun itself turns every
exit code into 1, kills what takes longer than 30 seconds to save, and dies of SIGUSR1; a scheduler that must know
whether to requeue needs better, so the few lines that start processes are here.
"""

from __future__ import annotations

import codecs
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ..distill import files
from ..distill.errors import MachineError, UserError
from .output import talk
from .signals import FAILED, INTERRUPTED, STOPPED

MODULE = "relinear.recipes.run"
AFTER_DEATH = 15.0
"""Seconds that the others get to say their own error when one process died; then they are killed."""
_POLL, _POLL_NODES = 0.1, 2.0
_HARD = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL)
"""Signals that no library sends in answer to another rank's end."""


@dataclass(frozen=True)
class Place:
    """Which processes of a run are this node's.

    Attributes:
        nproc: processes on each node.
        nodes: how many nodes.
        node_rank: number of this node.
        host: address of node 0.
        port: on which its rank 0 listens.
    """

    nproc: int
    nodes: int = 1
    node_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def world(self) -> int:
        """Processes on all nodes."""
        return self.nproc * self.nodes


def place(nproc: str | None, nodes: int | None, node_rank: int | None, rendezvous: str | None) -> Place | None:
    """What the options of `relinear run` ask for; None where they ask for no other process.

    Args:
        nproc: a number or `auto`, one for every GPU.
        nodes: 1 if None.
        node_rank: SLURM_NODEID if None.
        rendezvous: HOST:PORT of node 0; a free port of this machine if None and there is one node.

    Raises:
        UserError: they do not fit together.
        MachineError: `auto` without a GPU.
    """
    if nproc is None:
        for option, value in (("--nodes", nodes), ("--node-rank", node_rank), ("--rendezvous", rendezvous)):
            if value is not None:
                raise UserError(f"{option} {value}: needs the number of processes on a node too: --nproc N")
        return None
    if "LOCAL_RANK" in os.environ:
        raise UserError(
            f"--nproc {nproc}: this process was started by a launcher already (LOCAL_RANK is set). Leave --nproc out, "
            "or start relinear run without the launcher"
        )
    count = _gpus() if nproc == "auto" else _whole(nproc)
    nodes = 1 if nodes is None else nodes
    if nodes == 1 and node_rank in (None, 0):
        host, port = _address(rendezvous) if rendezvous else ("127.0.0.1", _free_port())
        return Place(count, 1, 0, host, port)
    if node_rank is None:
        given = os.environ.get("SLURM_NODEID", "")
        if not given.isdecimal():
            raise UserError(f"--nodes {nodes}: needs the number of this node, 0 to {nodes - 1}: --node-rank R")
        node_rank = int(given)
    if not 0 <= node_rank < nodes:
        raise UserError(f"--node-rank {node_rank}: expected 0 to {nodes - 1}, as --nodes is {nodes}")
    if rendezvous is None:
        raise UserError(f"--nodes {nodes}: needs the address of node 0: --rendezvous HOST:29500")
    return Place(count, nodes, node_rank, *_address(rendezvous))


def run(command: list[str], place: Place, logs: Path) -> int:
    """Start this node's processes and wait for them.

    SIGINT, SIGTERM and SIGUSR1 are passed on; the processes save and stop. Where one dies, the others are ended.

    Args:
        command: what every process runs.
        place: how many, and which.
        logs: folder for `rank-N.log`. Rank 0's talk goes to stderr too, and its stdout is ours.

    Returns:
        0; STOPPED; INTERRUPTED; or the code of the error that ended the run, which was said.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="relinear-") as folder, ExitSignals() as signals:
        neighbours = Neighbours(logs, place)
        workers = []
        try:
            for local in range(place.nproc):
                workers.append(_start(command, place, local, logs, Path(folder)))
                signals.workers = workers
                signals.catch_up()
            _wait(workers, signals, neighbours)
        finally:
            for worker in workers:
                worker.kill()
                worker.close()
        return _outcome(workers, signals, neighbours)


@dataclass
class Worker:
    """A process of the run: its number, log, and where it leaves an error."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    error: Path
    reader: threading.Thread | None = None
    ended: float | None = None
    killed: bool = False

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        code = self.process.poll()
        if code is not None and self.ended is None:
            self.ended = time.time()
        return code

    def kill(self) -> None:
        """End it and what it started, if it still runs."""
        if self.poll() is None:
            self.killed = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Close the pipes once it ended."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.reader is not None:
            self.reader.join(timeout=5)

    def failure(self) -> Failure | None:
        """How it failed; None where it ended well, was stopped, or was killed from here."""
        code = self.process.returncode
        if code in (0, STOPPED, INTERRUPTED) or self.killed:
            return None
        told: dict[str, Any] = {}
        with suppress(OSError, ValueError, KeyError):
            told = json.loads(self.error.read_text(encoding="utf-8"))["message"]
        if told:
            extra = told.get("extraInfo", {})
            order = 1 if extra.get("known") else 2
            return Failure(order, float(extra.get("time", self.ended or 0)), self, told["message"], code)
        if code < 0:
            name = signal.Signals(-code).name
            text = f"was killed by {name}" + (" (the machine's memory ran out?)" if -code == signal.SIGKILL else "")
        else:
            text = f"ended with exit code {code} and no message"
        words = self._last_words() if code > 0 else ""
        order = 0 if -code in _HARD else 1 if words else 2
        return Failure(order, self.ended or 0, self, words or text, max(code, 1), bool(words))

    def _last_words(self) -> str:
        """An error that it could only print, as a watchdog does."""
        with suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            said = [line for line in lines if line.startswith("error: ")]
            return said[-1].removeprefix("error: ") if said else ""
        return ""


@dataclass(order=True)
class Failure:
    """A process that failed. The smallest is the cause: died by itself, said why, or the first one of the others."""

    order: int
    time: float
    worker: Worker = field(compare=False)
    text: str = field(compare=False)
    code: int = field(compare=False)
    printed: bool = field(default=False, compare=False)


@dataclass
class ExitSignals:
    """Passes signals on to the processes. A second Ctrl-C ends them at once, and kills what does not end then."""

    workers: list[Worker] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    patience: float | None = None

    def __enter__(self) -> ExitSignals:
        self._before = {}
        with suppress(ValueError):  # not in the main thread: nothing to listen to
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: Any) -> None:
        first = not self.asked
        self.asked.append(number)
        for worker in self.workers:
            worker.process.send_signal(number)
        if first:
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            talk(f"{signal.Signals(number).name}: saving and stopping{again}")
        elif number == signal.SIGINT:
            self.patience = time.monotonic() + AFTER_DEATH

    def catch_up(self) -> None:
        """Tell the process that was started last what was asked before."""
        for number in self.asked[:1]:
            self.workers[-1].process.send_signal(number)


class Neighbours:
    """The other nodes' launchers: each leaves word in the run folder when its processes fail, and looks for theirs.

    Without it a node waits for hours in a collective operation that will never come. Needs a run folder that all nodes
    see; word from an earlier start does not count.
    """

    def __init__(self, logs: Path, place: Place) -> None:
        self.own = logs / f"failed-node-{place.node_rank}.json"
        self.others = {n: logs / f"failed-node-{n}.json" for n in range(place.nodes) if n != place.node_rank}
        self.alone = place.nodes == 1
        self._before = {node: self._stamp(path) for node, path in self.others.items()}
        self._next = 0.0
        self.failed: int | None = None

    @staticmethod
    def _stamp(path: Path) -> int:
        try:
            return path.stat().st_mtime_ns
        except OSError:
            return 0

    def look(self) -> bool:
        """Whether another node failed since the start; asks the file system every two seconds at most."""
        if not self.alone and self.failed is None and time.monotonic() >= self._next:
            self._next = time.monotonic() + _POLL_NODES
            changed = (n for n, path in self.others.items() if self._stamp(path) not in (0, self._before[n]))
            self.failed = next(changed, None)
        return self.failed is not None

    def wait(self) -> bool:
        """Give another node that died the time to say so: what fails here may be the echo."""
        until = time.monotonic() + 2 * _POLL_NODES
        while not self.alone and not self.look() and time.monotonic() < until:
            time.sleep(_POLL)
        return self.failed is not None

    def tell(self, text: str) -> None:
        """Leave word that this node failed."""
        if not self.alone:
            with suppress(OSError, MachineError):
                files.write_json(self.own, {"time": time.time(), "message": text})


def _start(command: list[str], place: Place, local: int, logs: Path, folder: Path) -> Worker:
    rank = place.node_rank * place.nproc + local
    log, error = logs / f"rank-{rank}.log", folder / f"rank-{rank}.json"
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(place.nproc),
        "GROUP_RANK": str(place.node_rank),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
        "TORCHELASTIC_ERROR_FILE": str(error),
        "RELINEAR_LAUNCHER": "1",
    }
    # As many threads as there are cores in every process would fight for them.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // place.nproc)))
    file = log.open("ab")
    began = f"-- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, rank {rank} of {place.world}, {socket.gethostname()}\n"
    file.write(began.encode())
    file.flush()
    # A session of its own: the terminal's Ctrl-C comes once, from here. stdin tells the process when we are gone.
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else file,
        stderr=subprocess.PIPE if rank == 0 else file,
        start_new_session=True,
    )
    worker = Worker(rank, process, log, error)
    if process.stderr is None:
        file.close()
    else:
        worker.reader = threading.Thread(target=_show, args=(process.stderr, file), daemon=True)
        worker.reader.start()
    return worker


def _show(pipe: IO[bytes], log: IO[bytes]) -> None:
    """Copy what rank 0 says to its log and to stderr, as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with pipe, log:
        while chunk := os.read(pipe.fileno(), 65536):
            log.write(chunk)
            log.flush()
            with suppress(OSError, ValueError):  # the terminal may be gone; the log stays
                sys.stderr.write(decoder.decode(chunk))
                sys.stderr.flush()


def _wait(workers: list[Worker], signals: ExitSignals, neighbours: Neighbours) -> None:
    """Until all ended. When one failed, or another node, the others get a while and are killed."""
    until: float | None = None
    while any(worker.poll() is None for worker in workers):
        well = (None, 0, STOPPED, INTERRUPTED, *(-number for number in signals.asked))
        failed = any(worker.poll() not in well for worker in workers) or neighbours.look()
        if failed and until is None:
            until = time.monotonic() + AFTER_DEATH
        limits = [limit for limit in (until, signals.patience) if limit is not None]
        if limits and time.monotonic() >= min(limits):
            for worker in workers:
                worker.kill()
        time.sleep(_POLL)


def _outcome(workers: list[Worker], signals: ExitSignals, neighbours: Neighbours) -> int:
    """One exit code; a failure is said, with the rank and its log where it is not rank 0's."""
    asked = {-number for number in signals.asked}
    failures = sorted(f for w in workers if w.process.returncode not in asked and (f := w.failure()) is not None)
    stopped = [w for w in workers if w.process.returncode == STOPPED or w.process.returncode in asked]
    # After a signal, what one rank says when another has left already is no failure.
    if failures and not (signals.asked and stopped and min(w.ended or 0 for w in stopped) <= failures[0].time):
        cause = min((f for f in failures if f.text == failures[0].text), key=lambda f: f.worker.rank)
        if cause.order == 2 and neighbours.wait():
            return _elsewhere(neighbours)
        neighbours.tell(cause.text)
        _say(cause)
        return cause.code
    if neighbours.failed is not None:
        return _elsewhere(neighbours)
    if any(w.process.returncode == INTERRUPTED or w.killed for w in workers):
        return INTERRUPTED
    return STOPPED if stopped else 0


def _say(cause: Failure) -> None:
    """The one message; what rank 0 printed itself is on the screen already."""
    worker = cause.worker
    if worker.rank == 0:
        if not cause.printed:
            talk(f"error: {cause.text}")
        return
    who = "" if cause.text.startswith(f"rank {worker.rank} ") else f"rank {worker.rank}: "
    talk(f"error: {who}{cause.text}. Its log: {worker.log}")


def _elsewhere(neighbours: Neighbours) -> int:
    """Say which node ended the run; its own launcher has the right code."""
    node = neighbours.failed
    talk(f"error: node {node} failed, so this one was ended. Why: {neighbours.others[node or 0]}")
    return FAILED


def _whole(nproc: str) -> int:
    if not nproc.isdecimal() or int(nproc) < 1:
        raise UserError(f"--nproc {nproc}: expected a number above 0, or auto for one process per GPU")
    return int(nproc)


def _gpus() -> int:
    """GPUs that torch sees; asked in a process of its own, as this one stays free of torch."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    count = int(done.stdout) if done.stdout.strip().isdecimal() else 0
    if count == 0:
        raise MachineError("--nproc auto: torch sees no GPU here. Give a number: --nproc 2, or see: relinear doctor")
    return count


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--rendezvous {text}: expected HOST:PORT of node 0, for example node1:29500")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
