"""What a run folder says of itself: `run.json`, written once, before any work. Torch-free.

FOLDER/run.json            which run this is: recipe, teacher, layers, versions
FOLDER/recipe.yaml         the resolved recipe
FOLDER/metrics.jsonl       every stage's metrics
FOLDER/transfer.json       where every parameter of every mixer came from
FOLDER/calibrate.json      what calibrate found and did in every layer; calibrate.png shows it
FOLDER/checkpoints/        commits, `STAGE-STEP`
FOLDER/export/             the converted model; FOLDER/exports/STAGE-STEP/ other saved steps
FOLDER/logs/               what the run said; stacks of a process that hung
FOLDER/replay/             batch and generators of a step that failed
FOLDER/manifest.json       every final file, with size and hash
FOLDER/run.lock            who is at work here now
FOLDER/result.json         what came out
FOLDER/eval/               what `relinear eval` and `bench model` measured of the export
FOLDER/report/             the page that `relinear report` writes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import files
from .errors import UserError
from .lock import LOCK, RunLock

RECORD = "run.json"
# A run may be continued with other values of these: they change neither the data nor the weights.
_FREE = ("eval", "save", "track", "publish", "max_hours")
# Of `engine` this alone changes more than the last bits; commits warn of another environment.
_ENGINE = ("precision",)


def take(folder: Path, name: str = RECORD) -> RunLock:
    """Make a folder, where there is none, and lock it, before anything in it is read or written.

    What a killed process left half-written, there and in the folders below, is cleared away.

    Args:
        folder: of the run.
        name: of the file that says which run it is.

    Raises:
        UserError: it holds other files than a run's, or another process works in it.
        MachineError: it cannot be made or written.
    """
    if not (folder / name).exists():
        _check_empty(folder)
    with files.disk_guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        if place == folder or not (place / LOCK).exists():  # what another process may be at work in
            files.clean_temporaries(place)
    return lock


def claim(folder: Path, record: dict[str, Any], recipe_text: str, *, resume: bool, name: str = RECORD) -> bool:
    """Make `folder` the home of the run that `record` describes, or check that it already is.

    Args:
        folder: the run folder.
        record: `recipe` (resolved, plain values), `teacher`, `layers`, `stages`, `versions`, …
        recipe_text: written to recipe.yaml.
        resume: the folder may already hold this run.
        name: of the file that the record goes to.

    Returns:
        True where the folder already held the run.

    Raises:
        UserError: the folder holds a run and `resume` is False, or it holds another run, or other files.
    """
    if (folder / name).exists():
        before = read(folder, name)
        check_free(folder, resume=resume, name=name)
        different = _differences(before, record)
        if different:
            raise UserError(
                f"{folder}: holds another run; these differ: {'; '.join(different)}. Set them back to resume, or "
                "choose another folder: --out DIR"
            )
        files.write_text(folder / "recipe.yaml", recipe_text)
        return True
    _check_empty(folder)
    with files.disk_guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / name, record)
    files.write_text(folder / "recipe.yaml", recipe_text)
    return False


def read(folder: Path, name: str = RECORD) -> dict[str, Any]:
    """run.json of a run folder, or the record of that name.

    Raises:
        UserError: there is none, or it is not readable.
    """
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a run folder (no {name}). To make one: relinear run RECIPE --out DIR") from None
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Choose another folder: --out DIR") from None


def check_free(folder: Path, *, resume: bool, name: str = RECORD) -> None:
    """What `take` and `claim` would refuse whatever the run, before any process of it starts; writes nothing.

    Raises:
        UserError: the folder holds a run and `resume` is False, or other files.
    """
    if not (folder / name).exists():
        _check_empty(folder)
    elif not resume:
        raise UserError(
            f"{folder}: already holds a run. Continue it with --resume, or choose another folder: --out DIR"
        )


def _check_empty(folder: Path) -> None:
    if not folder.exists():
        return
    free = (LOCK, "logs")  # made before the run is
    if not folder.is_dir() or any(p for p in folder.iterdir() if not files.is_temporary(p) and p.name not in free):
        raise UserError(f"{folder}: exists and is not a run of relinear. Choose another folder: --out DIR")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: was X, is Y` for everything that must be equal for the same run to go on."""
    found: list[str] = []
    for key in ("recipe", "teacher", "layers", "start"):
        old, new = before.get(key), json.loads(json.dumps(now.get(key)))
        if key == "teacher":  # the same one may lie elsewhere now; its tensors are compared when a stage resumes
            # A run that began before fingerprints were kept has none.
            free = {"folder"} | ({"fingerprint"} if "fingerprint" not in (old or {}) else set())
            old, new = ({k: v for k, v in (entry or {}).items() if k not in free} for entry in (old, new))
        if key == "recipe":
            old, new = _binding(old or {}), _binding(new or {})
        _compare(key, old, new, found)
    return found


def _binding(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe must stay as it is. Spikes count from the resumed step on."""
    made = {key: value for key, value in recipe.items() if key not in _FREE}
    made["engine"] = {key: value for key, value in (made.get("engine") or {}).items() if key in _ENGINE}
    made["stages"] = [
        {kind: {k: v for k, v in settings.items() if k != "spike"} for kind, settings in stage.items()}
        for stage in made.get("stages", [])
    ]
    return made


def _compare(path: str, old: Any, new: Any, found: list[str]) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            _compare(f"{path}.{key}", old.get(key), new.get(key), found)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            _compare(f"{path}[{index}]", a, b, found)
    elif old != new:
        found.append(f"{path} was {old!r}, is {new!r}")
