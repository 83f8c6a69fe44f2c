"""The commands that the documents show, executed in their order on a tiny teacher."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from relinear.launch.main import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "stages.calibrate.tokens=1k",
    "stages.align.tokens=4k",
    "stages.glue.tokens=4k",
    "data.seq_len=64",
    "eval.tokens=1k",
]


def commands(page: Path) -> list[str]:
    """Lines of a page's bash blocks that call relinear."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip().removeprefix(".venv/bin/") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("relinear ")]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "count"), [("README.md", 7), ("docs/tutorials/convert-a-model.md", 7)])
def test_commands_of_the_documents_work(page, count, make_teacher, story_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stories = story_file.read_text().split("<|endoftext|>")
    train, valid, teacher = tmp_path / "train.txt", tmp_path / "valid.txt", make_teacher("llama")
    train.write_text("<|endoftext|>".join(stories[:350]))
    valid.write_text("<|endoftext|>".join(stories[350:]))
    places = {"FOLDER_OR_ID": teacher, "HELD_OUT_FILE": valid, "=FILE": f"={train}", "--license ID": "--license mit"}
    chats = tmp_path / "chats.jsonl"
    asked = [{"prompt": story[:40], "completion": story[40:80]} for story in map(str.strip, stories[:60])]
    chats.write_text("\n".join(map(json.dumps, asked)))
    places |= {"CHATS": chats, "$TEACHER": teacher, "$TRAIN": train, "$VALID": valid}
    lines = commands(ROOT / page)
    assert len(lines) >= count
    for line in lines:
        for word, place in places.items():
            line = line.replace(word, str(place))
        words = shlex.split(line)[1:]
        if words[0] in ("run", "select"):
            words += SMALL
        if words[0] == "posttrain":
            words += ["steps=2", "batch=4"]
        if words[0] == "select":
            words += ["--by", "restore-kl", "--tokens", "1k"]
        if words[0] == "eval":
            words += ["--samples", "1", "--tasks", "pairs"] if "recall" in words else ["--max-tokens", "500"]
        assert main(words) == 0, f"{line}\n{capsys.readouterr().err}"
