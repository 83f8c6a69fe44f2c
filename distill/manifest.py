"""The manifest of a run folder: every file that will not change any more, with size and hash. Torch-free.

FOLDER/manifest.json is written when a stage has ended and when the run has. `relinear verify RUN` and a run that is
asked to go on although it is complete compare the folder with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import files
from .digest import checksum
from .lock import LOCK

MANIFEST = "manifest.json"
_STATE = "state.json"
# What goes on changing: also a complete run may be resumed, and then says so in these.
_LIVE = {MANIFEST, LOCK}
_LIVE_FOLDERS = {"logs", "wandb", "tensorboard", "replay", "eval", "report"}


def write_manifest(folder: Path | str, *, complete: bool) -> dict[str, dict[str, Any]]:
    """Write manifest.json.

    Args:
        folder: of the run.
        complete: the run has ended: metrics.jsonl and all else at its top is final too. Otherwise only commits with
            which a stage ended are, and what is written once.

    Returns:
        {path in the folder: {"bytes": size, "hash": BLAKE2b of the content}}.
    """
    folder = Path(folder)
    known = _read(folder).get("files", {})
    written = (folder / MANIFEST).stat().st_mtime_ns if known else 0
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and _is_final(folder, path, complete):
            stat = path.stat()
            held = known.get(name)
            # A commit never changes once it is there: its hashes need no second reading.
            if held is None or not name.startswith("checkpoints/") or stat.st_mtime_ns > written:
                held = {"bytes": stat.st_size, "hash": checksum(path)}
            found[name] = held
    files.write_json(folder / MANIFEST, {"complete": complete, "files": found})
    return found


def check_manifest(folder: Path | str) -> list[str]:
    """What differs from manifest.json, a sentence each; nothing where all is as it was, or where there is none."""
    folder = Path(folder)
    problems = []
    for name, held in _read(folder).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            # Of a stage that went on, commits are removed by right.
            if not name.startswith("checkpoints/") or path.parent.exists():
                problems.append(f"{path}: gone; it had {held['bytes']:,} bytes")
        elif path.stat().st_size != held["bytes"]:
            problems.append(f"{path}: {path.stat().st_size:,} bytes, and had {held['bytes']:,}")
        elif checksum(path) != held["hash"]:
            problems.append(f"{path}: other content than when the run wrote it")
    return problems


def renew(paths: Iterable[Path]) -> None:
    """Let a run's manifest know that these files of it were written anew on purpose; nothing where there is none.

    Args:
        paths: files in the run's folders, e.g. RUN/export/README.md, or whole folders: what they no longer hold is
            forgotten.
    """
    for path in map(Path.absolute, paths):
        run = next((place for place in path.parents[:3] if (place / MANIFEST).is_file()), None)
        held = _read(run) if run is not None else {}
        if run is None or not held.get("complete"):
            continue
        name = path.relative_to(run).as_posix()
        kept = {known: entry for known, entry in held["files"].items() if not f"{known}/".startswith(f"{name}/")}
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and _is_final(run, file, complete=True):
                entry = {"bytes": file.stat().st_size, "hash": checksum(file)}
                kept[file.relative_to(run).as_posix()] = entry
        files.write_json(run / MANIFEST, held | {"files": kept})


def _is_final(folder: Path, path: Path, complete: bool) -> bool:
    parts = path.relative_to(folder).parts
    if any(files.TEMPORARY in part for part in parts) or parts[-1] in _LIVE or parts[0] in _LIVE_FOLDERS:
        return False
    if parts[0] == "checkpoints":
        return _ended(path.parent)
    return complete or parts[-1] in ("run.json", "transfer.json") or parts[0] == "measured"


def _ended(commit: Path) -> bool:
    """Whether a commit is one with which a stage ended."""
    try:
        return bool(json.loads((commit / _STATE).read_text(encoding="utf-8"))["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
