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

NAME = "bench"
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
    checkpoints = {side: models.digest(side) for side in ("student", "teacher")}
    used = store.versions()
    # How long one was ready to wait makes no other figures: every row says how many turns it is of.
    binding = {name: value for name, value in given.items() if name != "max_seconds"}
    key = store.result_key(NAME, checkpoints, binding, about, used)
    place = store.Store(folder)
    before = None if again else place.find(NAME, key)
    rows = {row["length"]: row for row in (before or {}).get("lengths", [])}
    wanted = sorted(set(lengths))
    spent, begin = (before or {}).get("seconds", 0.0), time.perf_counter()

    def keep(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for side in ("student", "teacher"):
                if row[side] is not None and "predicted_cache_bytes" not in row[side]:
                    row[side]["predicted_cache_bytes"] = predict(side, row["length"])
        result = {
            "suite": NAME,
            "models": models.names,
            "checkpoints": checkpoints,
            "settings": given,
            "versions": used,
            "seconds": round(spent + time.perf_counter() - begin, 2),
            "key": key,
            "machine": about,
            "memory_is": MEMORY_IS[device.type],
            "lengths": rows,
        }
        place.put(NAME, result)

    if kept := [length for length in wanted if length in rows]:
        progress(f"measured before: {', '.join(map(str, kept))} tokens")
    if missing := [length for length in wanted if length not in rows]:
        student, _, teacher = models.pair()
        loaded = {"student": student} | ({} if teacher is None else {"teacher": teacher})
        try:
            measure(loaded, missing, settings, kept=rows, keep=keep, progress=progress)
        except ValueError as error:
            raise RunFailed(f"bench: {error}") from None
    elif before is not None:
        place.put(NAME, before)  # the newest again, if another stood in its place
    return store.read(place.path(NAME)) or {}


def bench_draft(
    models: Models,
    lengths: Iterable[int],
    settings: Any,
    folder: Path,
    *,
    text: Sequence[str] | None = None,
    hint: str,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a draft ("student") of a target ("teacher"), and keep every length as it is done.

    Args:
        models: both checkpoints.
        lengths: tokens of prompt.
        settings: `bench_draft.Settings`.
        folder: a model's results folder.
        text: files to cut prompts from; None for random tokens.
        hint: what to do where their vocabularies differ.
        progress: called with lines.

    Returns:
        What draft.json then holds: what every result file does, "machine", "shared" (fields of `distill.draft.Shared`)
        and "lengths": rows of `bench_draft.measure_length`.

    Raises:
        UserError: as loading the models does; other vocabularies; too little text.
    """
    import torch

    from ..distill.draft import share_equal
    from .bench_draft import measure
    from .bench_model import machine
    from .fidelity import check_same_vocabulary

    draft, target = models.get("student"), models.get("teacher")
    check_same_vocabulary(str(models.names["student"]), str(models.names["teacher"]), draft, target, hint=hint)
    shared = dataclasses.asdict(share_equal(draft[0], target[0]))
    about = machine(torch.device(models.place))
    given = dataclasses.asdict(settings) | {"dtype": models.dtype, "text": list(text or [])}
    checkpoints = {side: models.digest(side) for side in ("student", "teacher")}
    used, begin, place = store.versions(), time.perf_counter(), store.Store(folder)
    wanted = sorted(set(lengths))
    key = store.result_key(DRAFT, checkpoints, given | {"lengths": wanted}, about, used)

    def keep(rows: list[dict[str, Any]]) -> None:
        result = {
            "suite": DRAFT,
            "models": models.names,
            "checkpoints": checkpoints,
            "settings": given,
            "versions": used,
            "seconds": round(time.perf_counter() - begin, 2),
            "key": key,
            "machine": about,
            "shared": shared,
            "lengths": rows,
        }
        place.put(DRAFT, result)

    measure(target[0], draft[0], target[1], wanted, settings, text=text, keep=keep, progress=progress)
    return store.read(place.path(DRAFT)) or {}
