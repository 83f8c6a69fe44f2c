"""What files hold, in a few characters: to notice that one is another, or that a byte changed. Torch-free."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import UserError

_CHUNK = 2**22
_STRIDE, _SAMPLE = 2**24, 2**16
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt")


def checksum(path: Path | str) -> str:
    """A hash (BLAKE2b, 128 bits) of all bytes of a file."""
    return _hash(path, None)


def fingerprint(path: Path | str) -> str:
    """A hash of a file's size and of 64 KiB out of every 16 MiB of it, the first and the last among them.

    Tells files apart that were made apart (other weights, other text) at a 256th of the reading; of a file up to
    16 MiB every byte counts. For single bytes of a larger one there is `checksum`.
    """
    return _hash(path, _SAMPLE)


def value_digest(value: Any) -> str:
    """A hash of plain values that JSON can write; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def teacher_fingerprint(folder: Path | str) -> dict[str, str]:
    """What a teacher is, by file: config.json, tokenizer files, and of every weight file size, header and samples.

    Where the folder lies, and what else is in it (README, licence, generation settings), does not matter.

    Raises:
        UserError: a file cannot be read.
    """
    folder = Path(folder)
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    index = "model.safetensors.index.json"
    found: dict[str, str] = {}
    for name in ["config.json", *_TOKENIZER, index, *weights]:
        path = folder / name
        if not path.is_file():
            continue
        try:
            found[name] = (
                _of_weights(path) if name in weights else _of_config(path) if name == "config.json" else checksum(path)
            )
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"{path}: cannot be read ({error}). Fetch the file again") from None
    return found


def files_fingerprint(paths: Iterable[Path | str]) -> str:
    """One hash of several files in their order, wherever they lie: `fingerprint` of each."""
    return value_digest([fingerprint(path) for path in paths])


def inside(name: str, what: str) -> str:
    """A file name that came from a file, refused where it would lead out of the folder that it is looked for in.

    Args:
        name: as read.
        what: where it was read, for the message.

    Raises:
        UserError: it is no plain name.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"{what}: names the file {name!r}; expected a plain name in the same folder. Fetch it again")
    return name


def _of_config(path: Path) -> str:
    """`checksum`; of our own models without what `verify` notes there later, which changes nothing."""
    note = "verified_transformers"
    text = path.read_text(encoding="utf-8")
    if note not in text:
        return checksum(path)
    return value_digest({key: value for key, value in json.loads(text).items() if key != note})


def _of_weights(path: Path) -> str:
    """`fingerprint` with the whole header: names, types and shapes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = hashlib.blake2b(file.read(length), digest_size=8).hexdigest()
    return f"{path.stat().st_size} bytes, header {header}, {fingerprint(path)}"


def _hash(path: Path | str, sample: int | None) -> str:
    path = Path(path)
    size = path.stat().st_size
    made = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if sample is None or size <= _STRIDE:
            while chunk := file.read(_CHUNK):
                made.update(chunk)
            return made.hexdigest()
        made.update(str(size).encode())
        for start in [*range(0, size - sample, _STRIDE), size - sample]:
            file.seek(start)
            made.update(file.read(sample))
    return made.hexdigest()
