"""What several commands share: the examples under each help text, and their common arguments."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ...distill.errors import UserError
from .. import worker

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Folder = Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint's folder or Hub id.")]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that a foreign model brings; relinear's own never need it."),
]
Again = Annotated[bool, typer.Option("--again", help="Measure anew what is stored already.")]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tokens of every draft; by default 5 at first, then as many as acceptance suggests.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="Of the weights; auto: as each was saved.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch on a CPU.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in this folder stopped.")]
MaxHours = Annotated[
    float | None, typer.Option(min=0, metavar="H", help="Save and stop after H hours.", show_default=False)
]
RunDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run folder; the same as save.dir=DIR.", show_default=False)
]
DRAFT_HINT = (
    "a draft needs the very tokens of its target: take an export that was made from it (relinear run RECIPE "
    "teacher.model=TARGET) or a smaller model of its family, or generate without --draft"
)
Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name (relinear ls recipes) or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, e.g. stages.glue.tokens=2M", show_default=False),
]


def examples(*commands: str, then: str) -> str:
    """The end of a help text: command lines to copy, and the one that comes next."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands), "", "\b", "Next:", f"  {then}"])


def command_line(command: str, recipe: str, overrides: list[str] | None) -> str:
    """The same recipe with the same changes under another command, ready to paste into a shell."""
    return shlex.join(["relinear", command, recipe, *(overrides or [])])


def check_engine(recipe: Any, name: str, changes: list[str] | None, started: int | None) -> None:
    """Refuse several processes for a recipe of one, and one for a recipe of several.

    Args:
        recipe: loaded.
        name: as typed.
        changes: as typed.
        started: processes that the command is to start; None where it is to be one of them itself.

    Raises:
        UserError: naming `engine.parallel` and what to type.
    """
    parallel = recipe.engine.parallel
    count = worker.size() if started is None else started
    if parallel == "single" and count > 1:
        raise UserError(
            f"{recipe.place('engine.parallel')}: single is one process, and there are to be {count}. Name an "
            "engine for several: engine.parallel=ddp, or start one process"
        )
    if parallel != "single" and started is None and "WORLD_SIZE" not in os.environ:
        again = command_line("run", name, [*(changes or []), "--nproc", "auto"])
        raise UserError(
            f"{recipe.place('engine.parallel')}: {parallel} needs processes that are started together. One for every "
            f"GPU: {again}; or for the number that you name: --nproc 2"
        )


def check_source(place: str, source: str) -> None:
    """Refuse text files that do not exist; the name of a Hub data set is not asked for.

    Raises:
        UserError: naming `place`.
    """
    from ...distill.data.documents import local_files

    try:
        local_files(source)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
