"""Work in forks of this process, as one process or as the ranks of a run, for tests that start and kill many of them.

Tests have no packages: `runpy.run_path` gives them these classes.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

CHILD = Path(__file__).with_name("engine_child.py")


def forget_world() -> None:
    """Drop what accelerate found out in this process before it became a rank: it would go on as one process alone."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Forked:
    """Work done in a fork of this process, which has all modules loaded: a kill costs no start."""

    def __init__(self, work: Callable[[], int | None], log: Path) -> None:
        self.log = log
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            code = work() or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def alive(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def kill(self) -> None:
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)


class Ranks:
    """The ranks of a run, and what a launcher does for them: end the others when one has died."""

    GRACE = 20.0
    """Seconds that the others have to notice by themselves: not while they still wait for each other at the start."""

    def __init__(self, processes: list[Forked]) -> None:
        self.processes = processes

    @classmethod
    def of(cls, work: Callable[[], int | None], count: int, log: Path) -> Ranks:
        """That many forks which do the work as the ranks of one run."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]

        def ranked(rank: int) -> int | None:
            world = {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if count > 1:
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | world)
                forget_world()
            return work()

        return cls(
            [Forked(lambda rank=rank: ranked(rank), log.with_name(f"{log.name}-{rank}")) for rank in range(count)]
        )

    @classmethod
    def of_child(
        cls, engine: str, teacher: Path, folder: Path, count: int, log: Path, more: tuple[str, ...] = ("--resume",)
    ) -> Ranks:
        """Ranks of the engine child, by default ones that go on with what the folder holds."""

        def work() -> None:
            warnings.simplefilter("default")  # not errors, as in a process of its own
            sys.argv = [str(CHILD), engine, str(teacher), str(folder), *more]
            runpy.run_path(str(CHILD), run_name="__main__")

        return cls.of(work, count, log)

    def alive(self) -> bool:
        return all(process.alive() for process in self.processes)

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.processes[rank].kill()

    def codes(self) -> list[int | None]:
        """Exit codes, once all have ended."""
        while self.alive():
            time.sleep(0.02)
        end = time.monotonic() + self.GRACE
        while time.monotonic() < end and any(process.alive() for process in self.processes):
            time.sleep(0.02)
        self.kill([rank for rank, process in enumerate(self.processes) if process.alive()])
        return [process.code for process in self.processes]
