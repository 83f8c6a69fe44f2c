"""The commands that work: `quickstart` and `run`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..output import data, data_json, next_command
from ..progress import Progress
from .common import Json, Overrides, Recipe, command_line, examples


def register(app: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        epilog=examples(
            "relinear quickstart",
            "relinear quickstart --out runs/first --json > first.json",
            then="relinear generate runs/quickstart/hybrid/export --prompt 'Once upon a time'",
        )
    )(quickstart)
    app.command(
        epilog=examples(
            "relinear run rwkv7 teacher.model=FOLDER data.source=stories.txt",
            "relinear run my.yaml stages.glue.tokens=2M --out runs/second",
            "relinear run my.yaml --resume --max-hours 8",
            then="relinear eval runs/NAME/export --against FOLDER --text valid.txt",
        )
    )(run)


def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/quickstart"),
    json: Json = False,
) -> None:
    """Convert the small teacher inside this package, twice.

    All of its layers, and all but one; then measure what was lost and won, export, verify and generate.

    Needs no network and no GPU; about 4 minutes on 2 cores.
    """
    from ...recipes.quickstart import quickstart as work

    with Progress() as progress:
        result = work(out, progress, overrides)
    _report(result, json)
    if result.get("status") == "stopped":
        next_command(shlex.join(["relinear", "quickstart", *(overrides or []), "--out", str(out)]))


def run(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in this folder stopped.")] = False,
    max_hours: Annotated[
        float | None, typer.Option(min=0, metavar="H", help="Save and stop after H hours.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder; the same as save.dir=DIR.", show_default=False)
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Take that run's mixers instead of transferring anew.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop before any work.")] = False,
    json: Json = False,
) -> None:
    """Carry out a recipe: transfer, align, glue, evaluate, export."""
    changes = [*(overrides or []), *([f"save.dir={out}"] if out is not None else [])]
    if dry_run:
        from .look import plan

        plan(recipe, changes, json=json)
        return
    from ...recipes.loader import load
    from ...recipes.runner import run as work

    with Progress() as progress:
        result = work(load(recipe, changes), resume=resume, max_hours=max_hours, progress=progress, start=start)
    _report(result, json)
    if result["status"] == "stopped":
        going_on = [*changes, *([] if start is None else ["--start", str(start)]), "--resume"]
        next_command(command_line("run", recipe, going_on))


def _report(result: dict[str, Any], json: bool) -> None:
    """The result as data; what to type next as talk."""
    if json:
        data_json({name: value for name, value in result.items() if name != "table"})
    else:
        data(result["table"])
    if "export" in result:
        next_command(f"relinear generate {result['export']} --prompt 'Once upon a time'")
