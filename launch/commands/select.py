"""`select`: which layers keep their attention, by scores of one aligned all-linear student."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ...recipes.select.methods import METHODS, parse
from ..output import data, data_json, next_command
from ..progress import Progress
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
    overrides: Overrides = None,
    keep: Annotated[int, typer.Option(metavar="K", help="Layers that keep their attention.")] = 1,
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
    tokens: Annotated[int, typer.Option(min=100, metavar="N", help="Held-out tokens to measure on.")] = 20_000,
    tokens_per_layer: Annotated[
        int, typer.Option(min=1, metavar="N", help="Training tokens per layer of kl-guided.")
    ] = 50_000,
    json: Json = False,
) -> None:
    """Score layers: which ones should keep their attention.

    Aligns a student that converts every layer, as the recipe says up to its align stage, then tries each layer with
    forward passes and writes scores that layers.keep={scores: FILE, top: K} reads. Several methods share the student,
    the teacher's outputs and every measurement, and are shown beside uniform. Finished parts are taken up again.
    """
    parse(by)
    from ...recipes.select.run import select as work

    with Progress() as progress:
        result = work(
            recipe,
            overrides,
            keep=keep,
            by=by,
            out=out,
            run=run,
            resume=resume,
            tokens=tokens,
            tokens_per_layer=tokens_per_layer,
            progress=progress,
        )
    if json:
        data_json({name: value for name, value in result.items() if name != "table"})
    else:
        data(result["table"])
    if result["status"] != "complete":
        options = ["--keep", str(keep), "--by", by, *([] if out is None else ["--out", str(out)])]
        options += [] if run is None else ["--run", str(run)]
        next_command(f"{command_line('select', recipe, overrides)} {shlex.join(options)} --resume")
        return
    chosen = f"layers.keep={{scores: {result['scores']}, top: {keep}}}"
    start = [*(overrides or []), chosen]
    next_command(command_line("run", recipe, start))
