"""The files of a run, as far as they are there: a run under way has few, and a damaged file hides no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...distill import files, run_folder
from ...distill.errors import MachineError, UserError
from .. import loader
from ..notes import NOTES
from ..plan import Plan, plan

SUITES = ("quick", "core", "recall", "long", "generation", "mt_bench")
"""Suites of `relinear eval`; each leaves RUN/eval/SUITE.json."""


@dataclass
class Run:
    """What a run's folder says.

    Attributes:
        folder: as given.
        record: run.json.
        recipe: recipe.yaml's text, None where it is missing.
        metrics: metrics.jsonl's records.
        measured: stage -> fidelity on held-out text after it.
        transfer: transfer.json, None where there is none yet; likewise the next ones.
        calibrate: stage -> what calibrate wrote.
        result: result.json.
        suites: suite -> eval/SUITE.json.
        bench: eval/bench.json.
        notes: what the run said, as logs/notes.jsonl holds it.
        replays: names of steps that failed and were kept.
        hung: files of processes that hung.
        written: when metrics.jsonl, or else run.json, was last written: seconds since 1970.
        plan: of the recipe, None where `unplanned` says why not.
        problems: files that cannot be read, a sentence each.
    """

    folder: Path
    record: dict[str, Any]
    recipe: str | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    transfer: dict[str, dict[str, Any]] | None = None
    calibrate: dict[str, dict[str, Any]] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    bench: dict[str, Any] | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)
    replays: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    written: float = 0.0
    plan: Plan | None = None
    unplanned: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def stages(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(name, kind, settings) of the recipe's stages, in order."""
        return [
            (settings["name"], kind, settings)
            for stage in self.record["recipe"]["stages"]
            for kind, settings in stage.items()
        ]

    @property
    def teacher(self) -> str:
        """What to give commands as the teacher: the folder that it was read from, where it still lies there."""
        held = self.record["teacher"]
        return held["folder"] if held.get("revision") is None and Path(held["folder"]).is_dir() else held["source"]

    def steps(self, stage: str) -> list[dict[str, Any]]:
        """That stage's training records."""
        return [record for record in self.metrics if record["stage"] == stage and "loss" in record]

    def evaluations(self, stage: str) -> list[dict[str, Any]]:
        """That stage's records of held-out losses."""
        return [record for record in self.metrics if record["stage"] == stage and "eval" in record]


def find_runs(given: list[Path]) -> list[Path]:
    """Run folders: those given and, where a folder is none, those directly inside it.

    Raises:
        UserError: neither.
    """
    found: list[Path] = []
    for folder in given:
        if (folder / run_folder.RECORD).exists():
            found.append(folder)
            continue
        inside = sorted(path.parent for path in folder.glob(f"*/{run_folder.RECORD}")) if folder.is_dir() else []
        inside = [path for path in inside if not files.is_temporary(path)]
        if not inside:
            what = "not a run folder, and none is inside it" if folder.is_dir() else "no such folder"
            raise UserError(
                f"{folder}: {what} (no {run_folder.RECORD}). Give the folder of a run, or make one: "
                "relinear run RECIPE --out DIR"
            )
        found += inside
    return list(dict.fromkeys(found))


def read_run(folder: Path) -> Run:
    """Everything that the folder holds.

    Raises:
        UserError: run.json is missing or cannot be read. Any other such file is named in `problems`.
    """
    run = Run(folder, run_folder.read(folder))
    try:
        missing = {"recipe", "teacher", "layers", "stages", "environment"} - run.record.keys()
    except AttributeError:
        missing = {"everything"}
    if missing:
        raise UserError(f"{folder / run_folder.RECORD}: lacks {', '.join(sorted(missing))}. Give the folder of a run")

    def take(path: Path, read: Callable[[Path], Any], empty: Any = None) -> Any:
        try:
            return read(path) if path.exists() else empty
        except (OSError, ValueError, TypeError) as error:
            run.problems.append(f"{path.relative_to(folder)}: cannot be read ({error})")
            return empty

    run.recipe = take(folder / "recipe.yaml", _text)
    run.metrics = take(folder / "metrics.jsonl", files.read_metrics, [])
    run.transfer = take(folder / "transfer.json", _mapping)
    run.result = take(folder / "result.json", _mapping)
    run.bench = take(folder / "eval" / "bench.json", _mapping)
    run.notes = take(folder / NOTES, files.read_metrics, [])
    for path in sorted((folder / "measured").glob("*.json")):
        run.measured[path.stem] = take(path, _mapping, {})
    for name, kind, _ in run.stages:
        if kind == "calibrate":
            run.calibrate[name] = take(folder / f"{name}.json", _mapping, {})
    for suite in SUITES:
        found = take(folder / "eval" / f"{suite}.json", _mapping)
        if found is not None:
            run.suites[suite] = found
    run.replays = sorted(path.name for path in (folder / "replay").glob("*") if not files.is_temporary(path))
    run.hung = sorted(path.name for path in (folder / "logs").glob("hung-*") if path.stat().st_size)
    last = folder / "metrics.jsonl"
    run.written = (last if last.exists() else folder / run_folder.RECORD).stat().st_mtime
    _plan(run)
    return run


def _plan(run: Run) -> None:
    """The recipe's plan, on the teacher where it was, or where the recipe names it."""
    if run.recipe is None:
        run.unplanned = "recipe.yaml is missing"
        return
    for change in ([], [f"teacher.model={run.record['teacher']['folder']}"]):
        try:
            run.plan = plan(loader.load(str(run.folder / "recipe.yaml"), change))
            return
        except (UserError, MachineError) as error:
            run.unplanned = str(error).split("\n")[0]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _mapping(path: Path) -> dict[str, Any]:
    value = json.loads(_text(path))
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, found {type(value).__name__}")
    return value
