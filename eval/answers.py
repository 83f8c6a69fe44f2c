"""A model's answers to the harness's requests, kept on the disk batch by batch, so that a killed evaluation goes on.

The harness asks for all answers of a task in one call, sorted and cut into batches. A line of the file is one batch:
`{"REQUEST'S HASH": answer, …}`. Batches that were finished before a kill are whole in it; the requests that are left
fall into the same batches as without the kill, so that the answers are the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..distill.files import disk_guard

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
Progress = Callable[[int, int | None], None]


class AnswerFile:
    """Answers by request, appended a batch at a time; takes the place of the harness's cache hook.

    Args:
        path: of the file; None keeps nothing.
        progress: called with (answers known so far, answers asked for so far).
    """

    def __init__(self, path: Path | None, progress: Progress | None = None) -> None:
        self.path, self.progress = path, progress
        self.known: dict[str, Any] = {} if path is None else _read(path)
        self.count = self.total = 0
        self._batch: dict[str, Any] = {}

    def add_partial(self, kind: str, arguments: Iterable[Any], answer: Any) -> None:
        """The harness's call for each answer of a batch."""
        self._batch[request_hash(kind, arguments)] = answer
        self.told(1)

    def told(self, more: int) -> None:
        """So many more answers are known."""
        self.count += more
        if self.progress is not None and more:
            self.progress(self.count, self.total)

    def flush(self) -> None:
        """Write the batch that ended."""
        if self._batch and self.path is not None:
            line = json.dumps(self._batch) + "\n"
            with disk_guard(self.path, len(line)):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line)
        self._batch = {}

    def forget(self) -> None:
        """Begin anew: what was kept is not used."""
        self.remove()
        self.known = {}

    def remove(self) -> None:
        """The task is done and stored elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def request_hash(kind: str, arguments: Iterable[Any]) -> str:
    """What a request is, whichever task asks it."""
    return hashlib.sha256(json.dumps([kind, *arguments]).encode("utf-8")).hexdigest()


def answered(model: Any, kept: AnswerFile, kind: str, requests: list[Any]) -> list[Any]:
    """The answers to requests in their order: kept ones, and the model's for the others.

    Args:
        model: a harness model whose own method answers.
        kept: where answers are looked for; the model writes there itself (`AnswerFile.add_partial`).
        kind: one of `KINDS`.
        requests: the harness's instances.
    """
    hashes = [None if _sampled(kind, request.args) else request_hash(kind, request.args) for request in requests]
    missing = [i for i, name in enumerate(hashes) if name is None or name not in kept.known]
    kept.total += len(requests)
    kept.told(len(requests) - len(missing))
    answers: list[Any] = [None if name is None else kept.known.get(name) for name in hashes]
    made = getattr(model, kind)([requests[i] for i in missing], disable_tqdm=True) if missing else []
    kept.flush()
    for i, answer in zip(missing, made, strict=True):
        answers[i] = answer
    # A log-likelihood is a pair (sum, greedy), which JSON gives back as a list.
    return [tuple(answer) if isinstance(answer, list) else answer for answer in answers]


def _sampled(kind: str, arguments: tuple[Any, ...]) -> bool:
    """Sampled texts differ each time they are asked for: none is kept."""
    return kind == "generate_until" and bool(arguments[1].get("do_sample", False))


def _read(path: Path) -> dict[str, Any]:
    """All whole lines; a last one that a kill cut short is taken out of the file, so that more can follow."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    found: dict[str, Any] = {}
    for line in whole.splitlines():
        found |= json.loads(line)
    return found
