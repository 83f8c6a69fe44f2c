"""What must not leave the machine: tokens, private keys, and the folders that people's files lie in. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z]+://[^\s/:@\"']+:[^\s/:@\"']{3,}@",
}
_HOME = r"(?:/(?:home|Users)/[A-Za-z0-9._-]+|/root)(?=/)|[A-Za-z]:\\+Users\\+[^\\\s\"']+"
# Pieces of words, among which may be anything.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_LOCAL = ("/", "./", "../", "~", ".\\", "..\\")


class Leak(NamedTuple):
    """Something found.

    Attributes:
        file: path in the folder.
        line: from 1.
        what: in words; a secret itself is never repeated.
    """

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def leaks(folder: Path, private: Iterable[str] = ()) -> list[Leak]:
    """Secrets and private paths in a folder's text files.

    Args:
        folder: an export.
        private: further places whose names say something of this machine, e.g. the run's folder.
    """
    places = sorted({place for place in private if place.count("/") + place.count("\\") > 1}, key=len, reverse=True)
    paths = re.compile("|".join([_HOME, *(re.escape(place) + r"(?![\w.-])" for place in places)]))
    secrets = {what: re.compile(pattern) for what, pattern in _SECRETS.items()}
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        for number, line in enumerate(_lines(path), 1) if path.is_file() else ():
            found += [Leak(name, number, what) for what, pattern in secrets.items() if pattern.search(line)]
            if path.name not in _VOCABULARIES and (place := paths.search(line)):
                found.append(Leak(name, number, f"a path of this machine, {place[0]}"))
    return found


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, none of any other."""
    with path.open("rb") as file:
        if b"\0" in file.read(8192):
            return
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file


def public_name(value: str) -> str:
    """A local file's or folder's own name instead of its path; anything else, Hub ids among it, as it is."""
    if "\n" in value or ":/" in value:
        return value
    local = value.startswith(_LOCAL) or re.match(r"[A-Za-z]:\\", value) or ("/" in value and Path(value).exists())
    return (re.split(r"[/\\]", value.rstrip("/\\"))[-1] or value) if local else value


def public_recipe(text: str) -> str:
    """A recipe's YAML without the places where things lie on this machine."""
    changes = {value: public_name(value) for value in _strings(yaml.safe_load(text))}
    for value in sorted(changes, key=len, reverse=True):
        if changes[value] != value:
            text = text.replace(value, changes[value])
    return text


def public_values(value: Any) -> Any:
    """`public_name` of every string in plain values, keys too."""
    if isinstance(value, dict):
        return {public_values(key): public_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
    elif isinstance(value, str):
        yield value
