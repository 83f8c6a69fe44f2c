"""The command that makes beforehand what a run would make: `prepare`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..output import data, data_json, next_command, table
from ..progress import Progress
from ..signals import STOPPED, stoppable
from .common import Json, Overrides, Recipe, command_line, examples


def register(app: typer.Typer) -> None:
    """Add the command to the console command."""
    app.command(
        epilog=examples(
            "relinear prepare my.yaml --dry-run",
            "relinear prepare my.yaml stages.glue.teacher_logits.top_k=32",
            then="relinear run my.yaml",
        )
    )(prepare)


def prepare(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the sizes and stop before any work.")] = False,
    json: Json = False,
) -> None:
    """Cache the teacher's logits that a recipe's stages read.

    Each is made once, for all students of the same teacher, text and settings. Stopped or killed, the same command
    goes on with the next file.
    """
    from ...recipes.loader import load

    loaded = load(recipe, overrides)
    if dry_run:
        _show(_sizes(loaded), ("stage", "tokens", "bytes"), json)
        next_command(command_line("prepare", recipe, overrides))
        return
    from ...recipes.logit_caches import prepare as work
    from ...recipes.runner import stop_signals

    with stoppable(), Progress() as progress, stop_signals() as stopped:
        result = work(loaded, progress, stopped)
    _show(result["caches"], ("stage", "folder", "positions", "bytes", "tail_mass"), json)
    if result["status"] == "stopped":
        next_command(command_line("prepare", recipe, overrides))
        raise typer.Exit(STOPPED)
    next_command(command_line("run", recipe, overrides))


def _sizes(recipe: Any) -> list[dict[str, Any]]:
    """Bytes of every cache at most, from the teacher's config.json alone."""
    from ...recipes.logit_costs import logits_bytes
    from ...recipes.plan import stage_settings
    from ...recipes.schema import GlueStage
    from ...recipes.teacher_config import read_teacher_config

    teacher = read_teacher_config(recipe.teacher.model, recipe.teacher.revision, recipe.place("teacher.model"))
    found = []
    for stage in recipe.stages:
        if isinstance(stage, GlueStage) and stage.teacher_logits is not None:
            length = stage_settings(recipe, stage, teacher.context)["seq_len"]
            size = logits_bytes(stage, length, teacher.config["vocab_size"])
            found.append({"stage": stage.name, "tokens": stage.tokens, "bytes": size})
    return found


def _show(rows: list[dict[str, Any]], columns: tuple[str, ...], json: bool) -> None:
    if json:
        data_json(rows)
    elif rows:
        data(table([[_cell(row[name]) for name in columns] for row in rows], list(columns)))
    else:
        data("no stage asks for a cache of the teacher's logits; one does with teacher_logits: {top_k: 64}")


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
