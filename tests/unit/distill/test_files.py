"""Atomic writing, full disks and the metrics file."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from relinear.distill import files
from relinear.distill.errors import MachineError, UserError


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_written_file_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    files.write_json(tmp_path / "deep" / "a.json", {"x": [1, "é"]})
    assert json.loads((tmp_path / "deep" / "a.json").read_text(encoding="utf-8")) == {"x": [1, "é"]}
    assert os.listdir(tmp_path / "deep") == ["a.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"a\.txt: no space left on the disk \(3 bytes needed"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_that_others_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not os.listdir(tmp_path)


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "step-1"

    def write(folder: Path) -> None:
        (folder / "a").write_text("1")
        assert not target.exists()
        assert files.is_temporary(folder)

    files.commit_directory(target, write)
    assert (target / "a").read_text() == "1"

    def broken(folder: Path) -> None:
        (folder / "a").write_text("2")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        files.commit_directory(target, broken)
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["step-1"]
    files.commit_directory(target, lambda folder: (folder / "b").write_text("3") and None)
    assert os.listdir(target) == ["b"]


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(MachineError, match=r"step-1: no space left on the disk \(2,000 bytes needed, 10 free\)"):
        files.commit_directory(tmp_path / "step-1", lambda _: pytest.fail("must not write"), needed=2000)
    assert not os.listdir(tmp_path)


def test_leftovers_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / f"align-4{files.TEMPORARY}77").mkdir()
    (tmp_path / f"result.json{files.TEMPORARY}77").write_text("{")
    (tmp_path / "align-3").mkdir()
    assert len(files.clean_temporaries(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["align-3"]
    assert files.clean_temporaries(tmp_path / "none") == []


def test_metrics_are_cut_back_to_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with files.MetricsLog(path) as log:
        log.append({"step": 1, "loss": float("nan")})
        offset = log.offset()
        log.append({"step": 2})
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')  # a kill in the middle of a line
    assert [line["step"] for line in files.read_metrics(path)] == [1, 2]
    with files.MetricsLog(path) as log:
        log.truncate(offset)
        log.append({"step": 2, "again": True})
    assert files.read_metrics(path) == [{"step": 1, "loss": None}, {"step": 2, "again": True}]
    with files.MetricsLog(path) as log, pytest.raises(UserError, match=r"metrics\.jsonl: has"):
        log.truncate(10_000)


def test_metrics_of_a_killed_first_attempt_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with files.MetricsLog(path) as log:
        for stage in ("align", "align", "glue"):
            log.append({"stage": stage})
    with path.open("ab") as file:
        file.write(b'{"stage": "gl')
    with files.MetricsLog(path) as log:
        log.truncate_at_stage("glue")
    assert files.read_metrics(path) == [{"stage": "align"}, {"stage": "align"}]


def test_a_folder_that_cannot_be_written_is_the_environments_fault(tmp_path: Path) -> None:
    def forbidden(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(MachineError, match="cannot be written"):
        files.commit_directory(tmp_path / "a", forbidden)
