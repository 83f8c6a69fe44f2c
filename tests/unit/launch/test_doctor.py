"""`doctor` says whose kernels would run, and a run says so too."""

from __future__ import annotations

import json
import logging

import pytest

from relinear.launch import main as cli
from relinear.mixers import kernels


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("RELINEAR_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_recurrence_has_a_row(capsys, root):
    assert cli.main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["kernels"]
    files = {path.stem for path in (root / "mixers" / "ops").glob("*.py") if "\nOP = " in path.read_text()}
    assert {row["recurrence"] for row in rows} == files >= {"gated_delta", "rwkv7"}
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "recurrence" in out and all(name in out for name in files)


def test_doctor_tells_an_error_and_does_not_end_in_it(monkeypatch, capsys):
    monkeypatch.setenv("RELINEAR_KERNELS", "flash")
    assert cli.main(["doctor", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert all(row["train"] == "error" and "'flash' is none of auto" in row["why"] for row in found["kernels"])
    (check,) = [check for check in found["checks"] if check["state"] == "failure"]
    assert check["name"] == "kernels" and "'flash' is none of auto" in check["found"] and check["fix"]


def test_choices_are_shown_while_a_command_runs_and_not_after(monkeypatch, capsys):
    def ls():
        kernels.logger.info("rwkv7: plain torch (because)")
        return []

    monkeypatch.setattr("relinear.recipes.loader.shipped", ls)
    assert cli.main(["ls", "recipes"]) == 0
    assert "kernels: rwkv7: plain torch (because)\n" in capsys.readouterr().err
    kernels.logger.info("again")
    assert "again" not in capsys.readouterr().err
    assert kernels.logger.level == logging.NOTSET and not kernels.logger.handlers
