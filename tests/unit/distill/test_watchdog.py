"""What hangs is ended with its stacks; what works, waits or was suspended is not."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relinear.distill import watchdog
from relinear.distill.watchdog import Watchdog

HANG = """
import sys, threading, time
from relinear.distill.watchdog import Watchdog, beat

def a_function_that_hangs():
    HOW

def another_thread():
    time.sleep(60)

threading.Thread(target=another_thread, daemon=True).start()
with Watchdog(0.6, sys.argv[1], rank=3):
    beat("align")
    print("on", flush=True)
    a_function_that_hangs()
"""


def hang(folder: Path, how: str) -> tuple[int, str]:
    command = [sys.executable, "-c", HANG.replace("HOW", how), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_hang_ends_with_every_threads_stack(tmp_path: Path) -> None:
    code, said = hang(tmp_path, "time.sleep(60)")
    assert code == watchdog.EXIT_CODE
    assert said.count("error: ") == 1 and "error: rank 3 (process " in said and "in align (engine.timeout)" in said
    assert str(tmp_path / "hung-rank-3.txt") in said
    stacks = (tmp_path / "hung-rank-3.txt").read_text()
    assert "a_function_that_hangs" in stacks and "another_thread" in stacks


def test_a_hang_that_lets_no_python_run_is_ended_too(tmp_path: Path) -> None:
    """PyDLL keeps Python's lock while it calls: no thread of Python's can run, as in a broken extension."""
    how = "import ctypes; ctypes.PyDLL(None).sleep(60)"
    code, _ = hang(tmp_path, how)
    assert code == 1
    assert "a_function_that_hangs" in (tmp_path / "hung-rank-3.txt").read_text()


def test_beats_waiting_and_pauses_keep_it_quiet(tmp_path: Path) -> None:
    ended: list[int] = []
    with Watchdog(0.4, tmp_path, end=ended.append):
        for _ in range(8):
            time.sleep(0.1)
            watchdog.beat()
        with watchdog.waiting():
            time.sleep(0.8)
    assert ended == [] and list(tmp_path.iterdir()) == []
    watchdog.beat("nothing")  # without one, nothing happens


def test_without_a_beat_it_fires(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    with Watchdog(0.3, tmp_path, end=ended.append):
        time.sleep(0.8)
    assert ended == [watchdog.EXIT_CODE] and "no progress" in capsys.readouterr().err
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_suspended_process_is_not_hung(tmp_path: Path) -> None:
    code = HANG.replace("HOW", "[(time.sleep(0.05), beat()) for _ in range(20)]").replace("0.6", "1.0")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.3)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode == 0
