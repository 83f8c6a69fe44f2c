"""What several commands share: the examples under each help text, and their common arguments."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ...distill.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
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
