"""What a run measures at its end goes to RUN/eval, as `relinear eval` stores it; the recipe's other suites too.

A suite that cannot run is said and left out: the run is complete without it.
"""

from __future__ import annotations

from typing import Any

from ..distill.errors import MachineError, RunFailed, UserError
from ..eval import suites
from ..eval.models import Models
from ..eval.store import Store
from .held_out import recipe_text
from .session import Session

OWN = ("quick", "recall")
"""Suites that the run measures itself, before it exports."""


def store_results(
    session: Session, fidelity: dict[str, Any] | None, recall: dict[str, Any] | None, seconds: dict[str, float]
) -> dict[str, str]:
    """Store what was measured, and measure the recipe's other suites.

    Args:
        session: of a run whose student is exported.
        fidelity: of the student, None where it was not measured.
        recall: likewise.
        seconds: that each of the two took.

    Returns:
        {suite: file in RUN/eval}.
    """
    ask = _ask(session)
    made = {"quick": fidelity, "recall": recall}
    stored = {}
    for name, result in made.items():
        if result is not None:
            stored[name] = _kept(name, ask, result, seconds.get(name, 0.0))
    for name in session.recipe.eval.suite:
        if name in OWN:
            continue
        command = f"relinear eval {session.folder / 'export'} --suite {name}"
        try:
            suites.evaluate(name, ask)
            stored[name] = str(ask.store.path(name))
        except (UserError, MachineError, RunFailed) as error:
            session.progress.note(f"warning: the suite {name} was not measured: {error}. Later: {command}")
    return stored


def _kept(name: str, ask: suites.Ask, result: dict[str, Any], seconds: float) -> str:
    text = ask.text
    if name == "quick" and text is not None:
        result = {**result, "seq_len": text.seq_len, "text": text.label}
    suites.keep(name, ask, result, seconds)
    return str(ask.store.path(name))


def _ask(session: Session) -> suites.Ask:
    recipe, folder = session.recipe, session.folder
    export, teacher = folder / "export", session.teacher
    device = str(next(session.student.parameters()).device)
    # A result counts for `relinear eval` too where that would load the same: fp32 both, and the device that it takes.
    dtype = "float32" if recipe.teacher.dtype == "float32" else f"float32, teacher {recipe.teacher.dtype}"
    names: dict[str, str | None] = {"student": str(export), "teacher": None}
    folders = {"student": export}
    loaded = {"student": (session.student, teacher.tokenizer)}
    if recipe.eval.against == "teacher":
        names["teacher"], folders["teacher"] = recipe.teacher.model, teacher.folder
        loaded["teacher"] = (teacher.model, teacher.tokenizer)
    models = Models(names, folders, dtype, "auto" if recipe.engine.device == "auto" else device, loaded=loaded)
    wanted = {"tasks": recipe.eval.tasks, "limit": recipe.eval.limit, "data": recipe.eval.data}
    options = {**wanted, "task_dir": recipe.eval.task_dir}
    given = {name: value for name, value in options.items() if value is not None}
    text = recipe_text(recipe, teacher.context, folder, folder / "eval") if len(session.corpus.valid) else None
    return suites.Ask(models, Store(folder / "eval"), text, given, progress=_Told(session))


class _Told:
    """A session's progress, as suites speak to it."""

    def __init__(self, session: Session) -> None:
        self.progress = session.progress

    def stage(self, name: str, total_tokens: int | None = None, done_tokens: int = 0, unit: str = "tokens") -> None:
        """A suite, or a task of it, begins."""
        self.progress.note(f"eval: {name}")

    def counted(self, done: int, total: int | None) -> None:
        """Nothing: the notes are enough at the end of a run."""

    def note(self, text: str) -> None:
        """A sentence."""
        self.progress.note(text)

    def done(self) -> None:
        """Nothing."""
