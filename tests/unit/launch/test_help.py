"""Help texts: examples and the next command in each, equal to the reference page, quick, and without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from relinear.launch import main as cli
from relinear.launch import reference

ROOT = Path(__file__).resolve().parents[3]
REQUIRED = {"quickstart", "run", "ls", "show", "check", "plan", "eval", "generate", "export", "verify"}
COMMANDS = re.findall(r"^## relinear (.+)$", reference.markdown(), re.MULTILINE)
TOP = [name for name in COMMANDS if " " not in name]
TEACHER = '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, \
"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512, \
"rms_norm_eps": 1e-5, "tie_word_embeddings": true}'


def help_of(command: list[str], capsys) -> str:
    assert cli.main([*command, "--help"]) == 0
    return capsys.readouterr().out


def command_of(line: str) -> str:
    """`bench align` for `relinear bench align FOLDER`; empty where there is no such command."""
    words = line.split()
    return next((name for name in (" ".join(words[1:3]), words[1]) if name in COMMANDS), "")


def test_the_commands_that_must_exist_do():
    assert set(TOP) >= REQUIRED


@pytest.mark.parametrize("command", [[], *(name.split() for name in COMMANDS)], ids=lambda c: " ".join(c) or "relinear")
def test_help_ends_in_examples_and_the_next_command(command, capsys):
    text = help_of(command, capsys)
    examples, _, following = text.partition("Examples:\n")[2].partition("Next:\n")
    lines = [line.strip() for line in (examples + following).splitlines() if line.strip()]
    assert len(lines) >= 2
    for line in lines:
        assert line.split()[0] == "relinear" and command_of(line), line
    assert text.rstrip().endswith(following.rstrip())


def test_help_lists_the_commands(capsys):
    listed = re.findall(r"^  ([a-z]+) {2,}\S", help_of([], capsys).partition("Commands:")[2], re.MULTILINE)
    assert listed == TOP
    assert "..." not in help_of([], capsys).partition("Commands:")[2].partition("Examples:")[0], "a summary is cut off"


def test_reference_page_is_what_help_says():
    page = ROOT / "docs" / "reference" / "cli.md"
    assert page.read_text(encoding="utf-8") == reference.markdown(), (
        "write it anew: python -m relinear.launch.reference > docs/reference/cli.md"
    )


def test_options_in_examples_exist(capsys):
    for name in COMMANDS:
        text = help_of(name.split(), capsys)
        options = text.partition("Options:")[2].partition("Examples:")[0]
        for line in text.partition("Examples:")[2].splitlines():
            if line.strip().startswith("relinear ") and command_of(line) == name:
                missing = [word for word in re.findall(r"--[a-z-]+", line) if word not in options]
                assert missing == [], line


def fenced_commands(page: Path) -> list[str]:
    """Lines of a page's bash blocks that call relinear, or make."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("#")[0].strip().removeprefix(".venv/bin/") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("relinear ", "make "))]


PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if path.name != "cli.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_documents_exist(page, capsys):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in fenced_commands(page):
        tool, name, *_ = line.split()
        if tool == "make":
            assert name in targets, line
            continue
        assert command_of(line), line
        options = help_of(command_of(line).split(), capsys).partition("Options:")[2].partition("Examples:")[0]
        assert [word for word in re.findall(r"(?<=\s)--[a-z-]+", line) if word not in options] == [], line


def test_readme_shows_both_commands():
    assert {"make quickstart", "make test"} <= set(fenced_commands(ROOT / "README.md"))


PROBE = """
import sys, time
from relinear.launch.main import main
code = main({arguments!r})
seconds = time.process_time()
heavy = [name for name in ("torch", "transformers", "numpy", "datasets") if name in sys.modules]
print(f"PROBE {{code}} {{seconds:.3f}} {{','.join(heavy) or 'light'}}", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([*name.split(), "--help"] for name in COMMANDS),
        ["ls"],
        ["ls", "recipes", "--json"],
        ["show", "rwkv7"],
        ["show", "--mixer", "gated_deltanet"],
        ["check", "rwkv7", "teacher.model=TEACHER", "data.source=TEXT"],
        ["plan", "rwkv7", "teacher.model=TEACHER", "data.source=TEXT"],
        ["plan", "rwkv7", "teacher.model=TEACHER", "data.source=TEXT", "--json"],
        ["run", "rwkv7", "teacher.model=TEACHER", "data.source=TEXT", "--dry-run"],
    ],
    ids=" ".join,
)
def test_looking_imports_no_torch(arguments, tmp_path):
    """Seconds are the processor's, from the start of Python, so that other work on the machine does not count."""
    (tmp_path / "TEACHER").mkdir()
    (tmp_path / "TEACHER" / "config.json").write_text(TEACHER)
    (tmp_path / "TEXT").write_text("Once upon a time.\n" * 5000)
    code = PROBE.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    probe = done.stderr.strip().splitlines()[-1].split(" ")
    assert probe[:2] == ["PROBE", "0"], done.stderr
    assert probe[3] == "light", f"imported {probe[3]}"
    assert float(probe[2]) < 1.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["TEACHER", "TEXT"], "looking wrote something"
