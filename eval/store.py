"""Where results lie, and when one that was measured before still holds. Torch-free.

FOLDER/<suite>.json        the newest result of each suite
FOLDER/earlier/            results with other settings or of another checkpoint, `SUITE-KEY.json`: never overwritten
FOLDER/parts/              finished parts of suites that go task by task or answer by answer, for later calls
FOLDER/tasks/              task definitions for local files, as they were measured

A result is reused where the checkpoints, the settings, the text and the versions are the same: all of them are hashed
into its key.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..distill import files
from ..distill.digest import checksum, teacher_fingerprint
from ..distill.errors import UserError
from ..distill.run_folder import RECORD

RESULTS = "eval-results"
"""Folder below the working folder for models that belong to no run."""

_ALSO = ("generation_config.json", "chat_template.jinja")  # what else changes a model's answers


def run_of(folder: Path | str) -> Path | None:
    """The run that a folder belongs to: itself, or the folder around an export; None where there is none."""
    folder = Path(folder)
    return next((place for place in (folder, folder.absolute().parent) if (place / RECORD).is_file()), None)


def results_folder(folder: Path | str, out: Path | None = None) -> Path:
    """Where the results of the model in `folder` go: `out`, or RUN/eval inside a run, or eval-results/NAME."""
    if out is not None:
        return out
    run = run_of(folder)
    return run / "eval" if run is not None else Path(RESULTS) / (Path(folder).absolute().name or "model")


def checkpoint_digest(folder: Path | str) -> str:
    """SHA-256 over what a checkpoint is: config, tokenizer, generation settings, and of every weight file its size,
    header and samples (`distill.digest.teacher_fingerprint`)."""
    folder = Path(folder)
    found = teacher_fingerprint(folder)
    found |= {name: checksum(folder / name) for name in _ALSO if (folder / name).is_file()}
    return _sha256(found)


def versions(*packages: str) -> dict[str, str]:
    """What a figure is measured with: relinear, torch, transformers, python, and `packages` where installed."""
    found = {"relinear": __version__}
    for name in ("torch", "transformers", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}


def result_key(
    suite: str, checkpoints: dict[str, Any], settings: dict[str, Any], inputs: Any, used: dict[str, str]
) -> str:
    """The hash by which a stored result is found again.

    Args:
        suite: its name, or a name for a part of it.
        checkpoints: digests of student and teacher.
        settings: everything that was asked for.
        inputs: digest of the text or tasks that were read.
        used: `versions`.
    """
    return _sha256([suite, checkpoints, settings, inputs, used])


class Store:
    """The results folder of one model.

    Attributes:
        folder: made when something is written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def find(self, suite: str, key: str) -> dict[str, Any] | None:
        """The stored result of that key, newest place first; None where there is none."""
        for path in (self.path(suite), self._earlier(suite, key)):
            found = read(path)
            if found is not None and found.get("key") == key:
                return found
        return None

    def put(self, suite: str, result: dict[str, Any]) -> Path:
        """Store a result under its `key`; one with another key steps aside into `earlier`.

        Raises:
            MachineError: the disk is full or the folder forbidden; what was there is untouched.
        """
        path = self.path(suite)
        before = read(path)
        if before is not None and before.get("key") != result.get("key"):
            files.write_json(self._earlier(suite, before.get("key") or _sha256(before)), before)
        files.write_json(path, result)
        return path

    def path(self, suite: str) -> Path:
        """The file of a suite's newest result."""
        return self.folder / f"{suite}.json"

    def parts(self, suite: str) -> Path:
        """Folder for finished parts of a suite."""
        return self.folder / "parts" / suite

    def _earlier(self, suite: str, key: str) -> Path:
        return self.folder / "earlier" / f"{suite}-{key[:12]}.json"


def read(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none.

    Raises:
        UserError: the file is there and is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Move it away, or choose another folder: --out DIR"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a result of relinear. Move it away, or choose another folder: --out DIR")
    return found


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()
