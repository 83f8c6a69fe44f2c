"""`select`: which layers keep their attention, by scores of one aligned all-linear student."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ...distill.errors import UserError
from ...recipes.select.methods import METHODS, parse
from ...recipes.units import parse_count
from ..output import data, data_json, next_command
from ..progress import Progress
from ..signals import STOPPED, stoppable
from .common import Json, Overrides, Recipe, command_line, examples


def register(app: typer.Typer) -> None:
    """Add the command to the console command."""
    app.command(
        epilog=examples(
            "relinear select quickstart --keep 1",
            "relinear select rwkv7 teacher.model=FOLDER data.source=FILE --keep 4 --by combined,kl-guided,lazy",
            "relinear select quickstart --keep 2 --by all --run runs/all-linear --out runs/chosen --json",
            then="relinear run quickstart 'layers.keep={scores: runs/quickstart-select/scores.json, top: 1}'",
        )
    )(select)


def select(
    recipe: Recipe,
    keep: Annotated[int, typer.Option(metavar="K", help="How many layers keep their attention.")],
    overrides: Overrides = None,
    by: Annotated[
        str,
        typer.Option(metavar="METHOD,…", help=f"The first decides: {', '.join(METHODS)}; all for all but kl-guided."),
    ] = "combined",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for everything; save.dir with -select if left out.", show_default=False
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Take the aligned mixers of this all-linear run.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished align in this folder.")] = False,
    tokens: Annotated[str, typer.Option(metavar="N", help="Held-out tokens to measure on.")] = "20k",
    tokens_per_layer: Annotated[str, typer.Option(metavar="N", help="Training tokens per layer of kl-guided.")] = "50k",
    json: Json = False,
) -> None:
    """Score layers: which ones should keep their attention.

    Aligns a student that converts every layer, as the recipe says up to its align stage, then tries each layer with
    forward passes and writes scores that layers.keep={scores: FILE, top: K} reads. Several methods share the student,
    the teacher's outputs and every measurement, and are shown beside uniform. Finished parts are taken up again.
    """
    parse(by)
    sizes = {
        "tokens": _count("--tokens", tokens, 100),
        "tokens_per_layer": _count("--tokens-per-layer", tokens_per_layer),
    }
    from ...recipes.select.run import select as work

    with stoppable(), Progress() as progress:
        result = work(recipe, overrides, keep=keep, by=by, out=out, run=run, resume=resume, progress=progress, **sizes)
    if json:
        data_json({name: value for name, value in result.items() if name != "table"})
    else:
        data(result["table"])
    if result["status"] != "complete":
        options = [
            "--keep",
            str(keep),
            "--by",
            by,
            "--tokens",
            tokens,
            "--tokens-per-layer",
            tokens_per_layer,
            *([] if out is None else ["--out", str(out)]),
        ]
        options += [] if run is None else ["--run", str(run)]
        next_command(f"{command_line('select', recipe, overrides)} {shlex.join(options)} --resume")
        raise typer.Exit(STOPPED)
    chosen = f"layers.keep={{scores: {result['scores']}, top: {keep}}}"
    start = [*(overrides or []), chosen]
    next_command(command_line("run", recipe, start))


def _count(option: str, text: str, least: int = 1) -> int:
    """A number out of `20k`."""
    try:
        found = parse_count(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}. For example: {option} 20k") from None
    if found < least:
        raise UserError(f"{option}: found {found}, expected at least {least}. For example: {option} 20k")
    return found
