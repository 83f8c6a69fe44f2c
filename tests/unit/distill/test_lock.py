"""Two runs never share a folder, and a dead one holds nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from relinear.distill import lock, run_folder
from relinear.distill.errors import MachineError, UserError

HOLD = """
import sys, time
from pathlib import Path
from relinear.distill import run_folder
held = run_folder.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path):
    """A process that has the lock on `tmp_path / "run"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_holder_is_named_and_a_kill_frees_the_folder(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=rf"run: in use by another run \(process {other.pid} on .+, since 20"):
        run_folder.take(folder)
    found = lock.holder(folder)
    assert found is not None and (found["pid"], found["host"]) == (other.pid, socket.gethostname())
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert lock.holder(folder) is None
    run_folder.take(folder).release()


def test_looking_takes_nothing(tmp_path: Path) -> None:
    assert lock.holder(tmp_path / "nothing") is None
    assert lock.holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_within_a_process_it_is_counted(tmp_path: Path) -> None:
    first, second = lock.RunLock(tmp_path), lock.RunLock(tmp_path)
    first.release()
    first.release()
    assert lock.holder(tmp_path) is not None
    second.release()
    assert lock.holder(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_carry_it_on(tmp_path: Path) -> None:
    held = lock.RunLock(tmp_path)
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        os.write(told, b"1")
        signal.pause()
    os.read(ready, 1)
    held.release()
    try:
        assert lock.holder(tmp_path) is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_with_other_things_gets_no_lock_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="is not a run of relinear"):
        run_folder.take(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_lock_file_alone_is_no_other_run(tmp_path: Path) -> None:
    run_folder.take(tmp_path).release()
    with run_folder.take(tmp_path):
        assert not run_folder.claim(tmp_path, {"recipe": {}}, "", resume=False)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(MachineError, match=r"deep: cannot be written \(Permission denied\)\. Choose another folder"):
        run_folder.take(tmp_path / "deep")


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    held = lock.RunLock(tmp_path)
    assert held.unsupported == "No locks available"
    held.release()
