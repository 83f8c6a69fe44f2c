"""How the console command ends: exit codes, one message per error, data on stdout and talk on stderr."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from relinear.distill.errors import MachineError, RunFailed, UserError
from relinear.launch import main as cli
from relinear.launch.commands import look
from relinear.mixers.errors import KernelMissing, KernelRefused
from relinear.recipes import loader

ROOT = Path(__file__).resolve().parents[3]


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


def failing(monkeypatch, error):
    """`relinear ls recipes` ends in this error."""

    def fail():
        raise error

    monkeypatch.setattr(loader, "shipped", fail)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("a.yaml:3: stages: found x"), 2, "a.yaml:3: stages: found x"),
        (MachineError("fla is not installed"), 3, "fla is not installed"),
        (KernelMissing("form: fused: fla not installed"), 3, "form: fused: fla not installed"),
        (KernelRefused("heads of 320"), 2, "heads of 320"),
        (RunFailed("layer 3, step 17: NaN"), 1, "layer 3, step 17: NaN"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/weights"), 3, "runs/x/weights"),
        (MemoryError(), 3, "out of memory"),
        (OutOfMemoryError("CUDA out of memory.\nmore"), 3, "CUDA out of memory"),
        (RuntimeError("boom\nsecond line"), 1, "unexpected RuntimeError: boom"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_codes_and_one_message(monkeypatch, capsys, error, code, words):
    failing(monkeypatch, error)
    assert cli.main(["ls", "recipes"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "Traceback (most recent" not in err
    assert err.count("error:") == (0 if code == 130 else 1)


def test_an_unexpected_error_leaves_its_traceback_in_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(monkeypatch, RuntimeError("boom"))
    assert cli.main(["ls", "recipes"]) == 1
    (kept,) = tmp_path.glob("relinear-*.txt")
    assert str(kept) in capsys.readouterr().err
    assert "Traceback" in kept.read_text() and "RuntimeError: boom" in kept.read_text()


def test_traceback_option_shows_it(monkeypatch, capsys):
    failing(monkeypatch, RuntimeError("boom"))
    assert cli.main(["--traceback", "ls", "recipes"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runn"], "Did you mean 'run'?"),
        (["run"], "RECIPE"),
        (["run", "quickstart", "--max-hours", "soon"], "max-hours"),
        (["plan", "--jsn"], "--jsn"),
        (["ls", "everything"], "everything"),
        (["generate", "folder"], "--prompt"),
        (["show", "--mixer", "mamba9"], "unknown mixer 'mamba9'"),
        (["show", "no-such-recipe"], "no-such-recipe"),
        (["show", "--mixer", "rwkv7", "a=b"], "a=b"),
        (["export", "folder", "--step", "newest"], "--step newest"),
    ],
)
def test_wrong_input_is_one_message_and_code_2(capsys, arguments, words):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_usage_errors_name_the_help_of_their_command(capsys):
    cli.main(["run"])
    assert "relinear run --help" in capsys.readouterr().err


def test_a_bare_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_and_version_are_data(capsys, option):
    assert cli.main([option]) == 0
    out, err = capsys.readouterr()
    assert "relinear" in out and err == ""


@pytest.mark.parametrize("kind", [[], *([str(kind)] for kind in look.Kind)])
def test_lists_are_json(capsys, kind):
    assert cli.main(["ls", *kind, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(k) for k in look.Kind] if not kind else isinstance(found, list)


def test_lists_are_tables(capsys):
    assert cli.main(["ls", "mixers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mixer ")
    assert [line.split()[0] for line in lines[1:]] == look.registry.names()
    assert cli.main(["ls"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert [text.split()[0] for text in tables] == ["mixer", "recipe", "family", "teacher"]


@pytest.mark.parametrize("name", look.registry.names())
def test_a_mixer_shows_its_card(capsys, name):
    assert cli.main(["show", "--mixer", name]) == 0
    text = capsys.readouterr().out
    assert cli.main(["show", "--mixer", name, "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    spec = look.registry.spec(name)
    assert card["name"] == name and (card["state_bytes"] > 0) == (spec.reach(spec.options()) != 0)
    for row in card["tensors"]:
        assert row["name"] in text and row["source"] in ("copied", "derived", "new")
    for option in card["options"]:
        assert option["help"] and option["name"] in text


def test_the_reader_of_stdout_may_leave():
    code = "import sys; from relinear.launch.main import main; sys.exit(main(['show', '--mixer', 'rwkv7']))"
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT.parent
    )
    assert reader.stdout is not None and reader.stderr is not None
    reader.stdout.close()
    assert reader.wait() == 1
    assert reader.stderr.read() == b""
    reader.stderr.close()


def test_no_colour_codes_where_there_is_no_terminal(capsys):
    for arguments in (["--help"], ["ls"], ["nonsense"]):
        cli.main(arguments)
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err


def test_a_traceback_is_asked_of_every_process(tmp_path, monkeypatch, capsys):
    from relinear.launch import processes
    from relinear.recipes import run as process

    seen = []
    monkeypatch.setattr(processes, "run", lambda command, *rest: seen.append(command) or 0)
    given = ["rwkv7", "teacher.model=here", "data.source=there", "engine.parallel=ddp", "--out", str(tmp_path / "run")]
    assert cli.main(["--traceback", "run", *given, "--nproc", "2"]) == 0
    (command,) = seen
    handed = command[command.index(processes.MODULE) + 1 :]
    assert handed[:2] == ["--traceback", "rwkv7"]
    monkeypatch.setattr("sys.argv", ["run", "--traceback", "no-such-recipe"])
    assert process.main() == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
