"""`bench.json` and `draft.json`: what `bench model` and `bench draft` measured, kept length by length."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..distill.errors import RunFailed
from . import store
from .models import Models
from .texts import text_files

BENCH = "bench"
DRAFT = "draft"


def bench(
    models: Models,
    lengths: Iterable[int],
    settings: Any,
    folder: Path,
    *,
    predict: Callable[[str, int], int | None] = lambda side, length: None,
    again: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the lengths that `folder` does not hold yet, and keep each as it is done.

    Figures are taken up again where checkpoints, settings, machine and versions are the same.

    Args:
        models: one or two checkpoints.
        lengths: tokens of context.
        settings: `bench_model.Settings`.
        folder: a model's results folder.
        predict: bytes that the plan of (side, length) says the cache takes, None where nothing does.
        again: measure all of them anew.
        progress: called with lines.

    Returns:
        What bench.json then holds: what every result file does, "machine", "memory_is" and "lengths": rows of
        `bench_model.measure`, each model's with "predicted_cache_bytes" (None where there is no plan). Of the rows
        that the file holds, all are returned, those of other lengths too.

    Raises:
        UserError: as loading the models does.
        RunFailed: a model has no cache.
    """
    import torch

    from .bench_model import MEMORY_IS, machine, measure

    device = torch.device(models.place)
    about = machine(device)
    given = dataclasses.asdict(settings) | {"dtype": models.dtype}
    # How long one was ready to wait makes no other figures: every row says how many turns it is of.
    binding = {name: value for name, value in given.items() if name != "max_seconds"}
    rows = _Rows(BENCH, models, given, folder, about, bound=(binding, about), again=again)

    def keep(found: list[dict[str, Any]]) -> None:
        for row in found:
            for side in ("student", "teacher"):
                if row[side] is not None and "predicted_cache_bytes" not in row[side]:
                    row[side]["predicted_cache_bytes"] = predict(side, row["length"])
        rows.keep(*found, memory_is=MEMORY_IS[device.type])

    if missing := rows.missing(lengths, progress):
        student, _, teacher = models.pair()
        loaded = {"student": student} | ({} if teacher is None else {"teacher": teacher})
        try:
            measure(loaded, missing, settings, kept=rows.kept, keep=keep, progress=progress)
        except ValueError as error:
            raise RunFailed(f"bench: {error}") from None
    return rows.result()


def bench_draft(
    models: Models,
    lengths: Iterable[int],
    settings: Any,
    folder: Path,
    *,
    text: Sequence[str] | None = None,
    hint: str,
    again: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the lengths that `folder` does not hold yet with a draft ("student") of a target ("teacher").

    Each is kept as it is done, and taken up again as `bench` does, where the text is the same too.

    Args:
        models: both checkpoints.
        lengths: tokens of prompt.
        settings: `bench_draft.Settings`.
        folder: a model's results folder.
        text: files to cut prompts from; None for random tokens.
        hint: what to do where their vocabularies differ.
        again: measure all of them anew.
        progress: called with lines.

    Returns:
        What draft.json then holds: what every result file does, "machine", "shared" (fields of `distill.draft.Shared`)
        and "lengths": rows of `bench_draft.measure_length`, those of other lengths too.

    Raises:
        UserError: as loading the models does; other vocabularies; too little text.
    """
    import torch

    from ..distill.draft import share_equal
    from .bench_draft import measure_length, prompts_of
    from .bench_model import machine
    from .fidelity import check_same_vocabulary

    about = machine(torch.device(models.place))
    given = dataclasses.asdict(settings) | {"dtype": models.dtype, "text": list(text or [])}
    binding = {**given, "text": None if text is None else [text_files(source).digest for source in text]}
    rows = _Rows(DRAFT, models, given, folder, about, bound=(binding, about), again=again)
    if missing := rows.missing(lengths, progress):
        draft, target = models.get("student"), models.get("teacher")
        check_same_vocabulary(str(models.names["student"]), str(models.names["teacher"]), draft, target, hint=hint)
        shared = dataclasses.asdict(share_equal(draft[0], target[0]))
        vocabulary = target[0].get_output_embeddings().weight.shape[0]
        for length in missing:
            progress(f"{length} tokens of context, {settings.prompts} prompts")
            prompts = prompts_of(target[1], text, length, settings, vocabulary)
            rows.keep(measure_length(target[0], draft[0], prompts, settings), shared=shared)
    return rows.result()


class _Rows:
    """A result file of one row for every length, each kept as it is done.

    Args:
        name: of the file.
        models: their digests are part of what binds.
        given: settings, as the file says them.
        folder: a model's results folder.
        about: the machine.
        bound: settings and inputs that must be the same for a row to be taken up again.
        again: forget what is stored.
    """

    def __init__(
        self,
        name: str,
        models: Models,
        given: dict[str, Any],
        folder: Path,
        about: Any,
        *,
        bound: tuple[dict[str, Any], Any],
        again: bool,
    ) -> None:
        checkpoints = {side: models.digest(side) for side in ("student", "teacher")}
        used = store.versions()
        key = store.result_key(name, checkpoints, *bound, used)
        self._name, self._place, self._begin = name, store.Store(folder), time.perf_counter()
        self._before = None if again else self._place.find(name, key)
        self._spent = (self._before or {}).get("seconds", 0.0)
        self._head = {"suite": name, "models": models.names, "checkpoints": checkpoints, "settings": given}
        self._head |= {"versions": used, "key": key, "machine": about}
        self.kept = {row["length"]: row for row in (self._before or {}).get("lengths", [])}

    def missing(self, lengths: Iterable[int], progress: Callable[[str], None]) -> list[int]:
        """Those that are not stored; without any, what is stored is the newest result again."""
        wanted = sorted(set(lengths))
        if kept := [length for length in wanted if length in self.kept]:
            progress(f"measured before: {', '.join(map(str, kept))} tokens")
        missing = [length for length in wanted if length not in self.kept]
        if not missing and self._before is not None:
            self._place.put(self._name, self._before)
        return missing

    def keep(self, *rows: dict[str, Any], **more: Any) -> None:
        """Store rows beside those that are kept, by ascending length."""
        self.kept |= {row["length"]: row for row in rows}
        seconds = round(self._spent + time.perf_counter() - self._begin, 2)
        lengths = [self.kept[length] for length in sorted(self.kept)]
        self._place.put(self._name, {**self._head, "seconds": seconds, **more, "lengths": lengths})

    def result(self) -> dict[str, Any]:
        """What the file holds."""
        return store.read(self._place.path(self._name)) or {}
