"""The suite core: benchmark tasks for student and teacher, in one process, on the same requests in the same batches.

Each model's figures on each task are a part of their own, kept as soon as they are there: a killed evaluation goes on
within the task, another list of tasks or another teacher measures only what is new.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distill import files
from ..distill.errors import RunFailed
from . import recovery
from .answers import AnswerFile
from .harness import TaskChoice, harness_model, load_tasks, require_harness, run_task
from .models import Models
from .store import read, result_key, versions

BATCH = 8
HEADLINE = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "local_arc_challenge": "acc_norm"}
"""The figure a task is known by, where it is not the first one of which more is better."""

Progress = Callable[[int, int | None], None]


def harness_versions() -> dict[str, str]:
    """What figures of this suite depend on."""
    require_harness()
    return versions("lm-eval", "datasets")


def core_suite(
    models: Models,
    choice: TaskChoice,
    parts: Path,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch: int = BATCH,
    chat: bool = False,
    allow_code: bool = False,
    again: bool = False,
    stage: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure student and teacher on every chosen task.

    Args:
        models: what is measured; loaded only where a part is missing.
        choice: of `harness.choose_tasks`.
        parts: folder where finished parts are kept and looked for.
        limit: first so many documents of each task; all if None.
        num_fewshot: examples in each prompt; the tasks' own numbers if None.
        batch: requests per forward pass.
        chat: use the tokenizer's chat template.
        allow_code: let tasks run code that the model wrote.
        again: measure anew what is there already.
        stage: told the name of each task and model as it begins.
        progress: called with (requests answered, requests in all as far as known) of that task.

    Returns:
        {"tasks": {NAME: {"metric", "n", "version", "fewshot", "higher_is_better", "chance", "student": {"value",
        "stderr"}, "teacher": likewise or None, "recovery", "recovery_above_chance", "figures": every other figure,
        "subtasks": likewise of a group}}, "mean": likewise over tasks, "limit", "harness": {"seconds"}}.

    Raises:
        UserError, MachineError: as `load_tasks` and `run_task`.
        RunFailed: student and teacher were asked different questions.
    """
    began = time.monotonic()
    settings = {"limit": limit, "num_fewshot": num_fewshot, "batch": batch, "chat": chat, "dtype": models.dtype}
    places = {
        (name, side): _place(parts, name, side, models, settings, choice)
        for name in choice.names
        for side in models.sides
    }
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for asked, (path, key) in places.items():
        held = None if again else read(path)
        if held is not None and held.get("key") == key:
            found[asked] = held
    missing = [asked for asked in places if asked not in found]
    if missing:
        loaded = load_tasks(choice)
        wrapped: dict[str, Any] = {}
        done: dict[Path, dict[str, Any]] = {}
        for name, side in missing:
            path, key = places[name, side]
            if path in done:  # both sides are one checkpoint
                found[name, side] = done[path]
                continue
            if side not in wrapped:
                wrapped[side] = harness_model(*models.get(side), batch)
            if stage is not None:
                stage(f"{name}, {side}")
            kept = AnswerFile(path.with_suffix(".answers.jsonl"), progress)
            if again:
                kept.forget()
            wrapped[side].keep(kept)
            part = run_task(
                wrapped[side],
                loaded[name],
                limit=limit,
                num_fewshot=num_fewshot,
                chat=chat,
                allow_code=allow_code,
            )
            found[name, side] = done[path] = {"task": name, "model": models.digest(side), "key": key, **part}
            files.write_json(path, files.finite(done[path]))
            kept.remove()
    tasks, covariances = {}, []
    for name in choice.names:
        tasks[name], cov = _entry(name, found[name, "student"], found.get((name, "teacher")), chat)
        if tasks[name]["higher_is_better"]:
            covariances.append(cov)
    better = [task for task in tasks.values() if task["higher_is_better"]]
    return {
        "tasks": tasks,
        "mean": recovery.mean(better, covariances),
        "limit": limit,
        "measured_seconds": round(time.monotonic() - began, 2),
    }


def _place(
    parts: Path, name: str, side: str, models: Models, settings: dict[str, Any], choice: TaskChoice
) -> tuple[Path, str]:
    """(file of a part, its key)."""
    model, content = {"model": models.digest(side)}, choice.digests[name]
    key = result_key(f"task {name}", model, settings, content, harness_versions())
    return parts / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}-{key[:12]}.json", key


def _entry(
    name: str, student: dict[str, Any], teacher: dict[str, Any] | None, chat: bool
) -> tuple[dict[str, Any], float | None]:
    """(a task's or group's entry in the result, covariance of its headline figure)."""
    if teacher is not None and not chat:  # under chat templates models of different tokenizers differ by right
        for leaf, mine in student["leaves"].items():
            if mine["asked"] != teacher["leaves"][leaf]["asked"]:
                raise RunFailed(
                    f"{leaf}: student and teacher were asked different questions; measure anew with --again"
                )
    if name not in student["groups"]:
        if len(student["leaves"]) == 1:
            leaf = next(iter(student["leaves"]))
            return _leaf_entry(name, student["leaves"][leaf], None if teacher is None else teacher["leaves"][leaf])
        return _union(name, student, teacher)
    return _union(name, student, teacher)


def _leaf_entry(name: str, mine: dict[str, Any], theirs: dict[str, Any] | None) -> tuple[dict[str, Any], float | None]:
    figures, covs = {}, {}
    for key, figure in mine["figures"].items():
        other = None if theirs is None else theirs["figures"].get(key)
        cov = None
        if other is not None and figure["values"] and other["values"]:
            cov = recovery.covariance(figure["values"], other["values"])
        covs[key] = cov
        chance = mine["chance"] if key.startswith(("acc,", "acc_norm,")) else None
        figures[key] = _figure(figure, other, cov, chance)
    about = {"n": mine["n"], "version": mine["version"], "fewshot": mine["fewshot"]}
    return _headed(name, figures, about, covs)


def _union(name: str, student: dict[str, Any], teacher: dict[str, Any] | None) -> tuple[dict[str, Any], float | None]:
    """A group's entry: the harness's own aggregate, or over a tag's tasks the mean over documents."""
    leaves = {
        leaf: _leaf_entry(leaf, mine, None if teacher is None else teacher["leaves"][leaf])
        for leaf, mine in student["leaves"].items()
    }
    subtasks = {leaf: entry for leaf, (entry, _) in leaves.items()}
    n = sum(entry["n"] for entry in subtasks.values())
    figures, covs = {}, {}
    for key in student["groups"].get(name) or _common(subtasks):
        shares = {leaf: entry["n"] / n for leaf, entry in subtasks.items() if key in entry["figures"]}
        mine = _aggregate(student, name, key, subtasks, shares, "student")
        theirs = None if teacher is None else _aggregate(teacher, name, key, subtasks, shares, "teacher")
        if mine is None:
            continue
        # Only of the mean over documents is the covariance that of the documents.
        weighted = sum(share * subtasks[leaf]["figures"][key]["student"]["value"] for leaf, share in shares.items())
        own = [student["leaves"][leaf]["figures"][key]["values"] for leaf in shares]
        others = [None if teacher is None else teacher["leaves"][leaf]["figures"][key]["values"] for leaf in shares]
        cov = None
        if abs(weighted - mine["value"]) < 1e-9 and all(own) and all(others):
            terms = [
                share**2 * (recovery.covariance(a, b or []) or 0.0)
                for share, a, b in zip(shares.values(), own, others, strict=True)
            ]
            cov = sum(terms)
        chances = [entry["chance"] for entry in subtasks.values()]
        chance = None if None in chances else sum(shares.get(leaf, 0) * subtasks[leaf]["chance"] for leaf in subtasks)
        covs[key] = cov
        figures[key] = _figure(mine, theirs, cov, chance if key.startswith(("acc,", "acc_norm,")) else None)
    about = {"n": n, "version": None, "fewshot": next(iter(subtasks.values()))["fewshot"]}
    entry, cov = _headed(name, figures, about, covs)
    return {**entry, "subtasks": subtasks}, cov


def _aggregate(
    part: dict[str, Any], name: str, key: str, subtasks: dict[str, Any], shares: dict[str, float], side: str
) -> dict[str, Any] | None:
    """A group's figure: what the harness says, else the mean over documents with the errors of its tasks."""
    given = part["groups"].get(name, {}).get(key)
    if given is not None:
        return given
    rows = {leaf: subtasks[leaf]["figures"][key] for leaf in shares}
    if any(row[side] is None for row in rows.values()):
        return None
    errors = [row[side]["stderr"] for row in rows.values()]
    value = sum(share * rows[leaf][side]["value"] for leaf, share in shares.items())
    spread = None
    if None not in errors:
        spread = sum((share * error) ** 2 for share, error in zip(shares.values(), errors, strict=True)) ** 0.5
    first = next(iter(rows.values()))
    return {"value": value, "stderr": spread, "higher_is_better": first["higher_is_better"]}


def _common(subtasks: dict[str, Any]) -> list[str]:
    """Figures that all tasks have."""
    first, *others = subtasks.values()
    return [key for key in first["figures"] if all(key in other["figures"] for other in others)]


def _figure(
    mine: dict[str, Any], theirs: dict[str, Any] | None, cov: float | None, chance: float | None
) -> dict[str, Any]:
    student = recovery.estimate(mine["value"], mine["stderr"])
    teacher = None if theirs is None else recovery.estimate(theirs["value"], theirs["stderr"])
    higher = mine["higher_is_better"]
    return {
        "higher_is_better": higher,
        "chance": chance,
        "student": student,
        "teacher": teacher,
        **recovery.recoveries(student, teacher, cov, chance, higher),
    }


def _headed(
    name: str, figures: dict[str, Any], about: dict[str, Any], covs: dict[str, float | None]
) -> tuple[dict[str, Any], float | None]:
    """An entry with its headline figure in front, and that one's covariance."""
    if not figures:
        raise RunFailed(f"{name}: the harness gave no figure. Look at its definition: lm_eval ls tasks")
    wanted = HEADLINE.get(name)
    named = [key for key in figures if wanted is not None and key.startswith(f"{wanted},")]
    rising = [key for key in figures if figures[key]["higher_is_better"]]
    head = (named or rising or list(figures))[0]
    metric, _, chosen = head.partition(",")
    filtered = {} if chosen == "none" else {"filter": chosen}
    return {"metric": metric, **filtered, **about, **figures[head], "figures": figures}, covs[head]
