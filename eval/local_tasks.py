"""Benchmark tasks on files of one's own: the shipped definitions, filled in with where the files lie. Torch-free.

A definition is the harness's own YAML with `"DATA/…"` for paths below the data folder. A list item with `*` stands for
one task for every file that matches. What is written into the results folder are plain definitions, so that
`lm_eval --include_path RESULTS/tasks --tasks local_…` measures the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..distill import files
from ..distill.errors import UserError

PREFIX = "local_"
_PATH = re.compile(r'"DATA/([^"]+)"')


@dataclass(frozen=True)
class LocalTask:
    """A definition whose files are there.

    Attributes:
        name: of the task or group.
        text: the definition, with whole paths.
        shipped: the definition as it is shipped.
        files: that it reads.
        generates: its answers are generated texts.
    """

    name: str
    text: str
    shipped: str
    files: tuple[Path, ...]
    generates: bool


def local_tasks(data: Path) -> list[LocalTask]:
    """The shipped tasks whose files lie below `data`, by name.

    Raises:
        UserError: no such folder, or none of the files is there.
    """
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder; expected one with {', '.join(_expected()[:3])}, …")
    found = [made for text in _shipped() if (made := _filled(text, data.resolve())) is not None]
    if not found:
        raise UserError(f"--data {data}: holds none of the files of the shipped tasks: {', '.join(_expected())}")
    return sorted(found, key=lambda task: task.name)


def write_tasks(tasks: list[LocalTask], folder: Path) -> Path:
    """Write definitions, a file each, into a folder for the harness to read; returns it."""
    for task in tasks:
        path = folder / f"{task.name}.yaml"
        if not path.exists() or path.read_text(encoding="utf-8") != task.text:
            files.write_text(path, task.text)
    return folder


def _shipped() -> list[str]:
    folder = resources.files(__package__ or "") / "harness_tasks"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return [entry.read_text(encoding="utf-8") for entry in sorted(found, key=lambda entry: entry.name)]


def _expected() -> list[str]:
    """The files that the shipped tasks read."""
    return sorted({name for text in _shipped() for name in _PATH.findall(text)})


def _filled(text: str, data: Path) -> LocalTask | None:
    """A definition with the paths below `data`; None where files of it are missing."""
    lines: list[str] = []
    used: list[Path] = []
    for line in text.splitlines():
        named = _PATH.search(line)
        if named is None:
            lines.append(line)
            continue
        matches = sorted(path for path in data.glob(named[1]) if path.is_file())
        if not matches:
            return None
        before, _, after = named[1].partition("*")
        for path in matches:
            relative = path.relative_to(data).as_posix()
            stem = relative[len(before) : len(relative) - len(after)] if after else ""
            filled = _PATH.sub(lambda _, path=path: json.dumps(str(path), ensure_ascii=False), line)
            lines.append(filled.replace('"*"', f'"{stem}"'))
        used += matches
    name = re.search(r"^(?:task|group): (\S+)", text, re.MULTILINE)
    if name is None:
        raise ValueError(f"a shipped task has no name: {text[:60]}")
    return LocalTask(name[1], "\n".join(lines) + "\n", text, tuple(used), "output_type: generate_until" in text)
