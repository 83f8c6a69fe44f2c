"""verify.json: what was proved of an export, and of exactly which bytes. Torch-free.

FOLDER/verify.json
    ok            every check passed, under every version of transformers that was tried
    transformers  version -> {"python", "torch", "checks": {name: {"ok", "detail"}}}
    verified      {"min", "max"}: the versions that config.json claims, see `claim`
    quick_start   SHA-256 of the code in README.md that was executed; null where there was none
    files         name -> SHA-256 of every other file

Of README.md only the code counts: words may change after the proof.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from packaging.version import Version

from .. import files
from ..errors import UserError

PROOF = "verify.json"
CARD = "README.md"
MODEL_LINE = re.compile(r"^model_id = .*$", re.MULTILINE)
"""The line of the quick start that names the model; whoever runs or publishes it puts a name there."""


def quick_start(card: str) -> str | None:
    """The first block of Python in a model card, None where there is none."""
    found = re.search(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return found[1] if found else None


def code_hash(card: str) -> str | None:
    """A hash of the quick start, whatever model it names."""
    code = quick_start(card)
    return None if code is None else hashlib.sha256(MODEL_LINE.sub("model_id = …", code).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's bytes, as the Hub and `sha256sum` give it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an export but README.md and verify.json, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not files.is_temporary(path))
    names = [(path.relative_to(folder).as_posix(), path) for path in paths]
    return {name: sha256(path) for name, path in names if name not in (PROOF, CARD)}


def read(folder: Path) -> dict[str, Any] | None:
    """verify.json of an export, None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / PROOF
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
            raise ValueError("not a proof")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Prove the folder again: relinear verify {folder}") from None


def write(folder: Path, transformers: dict[str, dict[str, Any]], verified: dict[str, str] | None) -> dict[str, Any]:
    """Write verify.json for the folder as it is now, and return it."""
    card = folder / CARD
    proof = {
        "ok": all(check["ok"] for run in transformers.values() for check in run["checks"].values()),
        "transformers": dict(sorted(transformers.items(), key=lambda item: Version(item[0]))),
        "verified": verified,
        "quick_start": code_hash(card.read_text(encoding="utf-8")) if card.exists() else None,
        "files": hashes(folder),
    }
    files.write_json(folder / PROOF, proof)
    return proof


def problems(folder: Path) -> list[str]:
    """Why a folder does not count as verified, a sentence each; nothing where it does."""
    proof = read(folder)
    if proof is None:
        return [f"{folder}: has no {PROOF}"]
    found = []
    for version, run in proof["transformers"].items():
        failed = [name for name, check in run["checks"].items() if not check["ok"]]
        if failed:
            found.append(f"{folder}: under transformers {version} these checks failed: {', '.join(failed)}")
    now, before = hashes(folder), proof["files"]
    found += [f"{folder / name}: gone since it was verified" for name in before if name not in now]
    found += [f"{folder / name}: was not there when the folder was verified" for name in now if name not in before]
    found += [
        f"{folder / name}: changed since it was verified" for name in now if before.get(name, now[name]) != now[name]
    ]
    card = folder / CARD
    if not card.exists() or code_hash(card.read_text(encoding="utf-8")) != proof["quick_start"]:
        found.append(f"{card}: its Python code is not what was executed when the folder was verified")
    return found


def claim(transformers: dict[str, dict[str, Any]]) -> dict[str, str] | None:
    """The range of versions that may be claimed: tried ones that passed, up to the newest, with no failure between.

    Args:
        transformers: as in verify.json.

    Returns:
        {"min", "max"}; None where none passed.
    """
    passed: list[str] = []
    for version in sorted(transformers, key=Version):
        if all(check["ok"] for check in transformers[version]["checks"].values()):
            passed.append(version)
        elif passed and any(
            all(check["ok"] for check in transformers[later]["checks"].values())
            for later in transformers
            if Version(later) > Version(version)
        ):
            passed = []
    return {"min": passed[0], "max": passed[-1]} if passed else None
