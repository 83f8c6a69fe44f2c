"""`report`: a run's figures as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..output import data, data_json, next_command, table, talk
from .common import Json, examples


def register(app: typer.Typer) -> None:
    """Add the command to the console command."""
    app.command(
        epilog=examples(
            "relinear report runs/mine",
            "relinear report runs/mine --price 2.50 --out mine-report",
            "relinear report runs/mine runs/other --out both",
            "relinear report runs/quickstart",
            then="relinear eval runs/mine/export --suite recall",
        )
    )(report)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or a folder with some in it.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the page; RUN/report by default.", show_default=False),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Of an hour of one device: what it cost.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Write a run's figures as one HTML page.

    The page holds its pictures and needs no network: verdict, layer map, losses, recall, benchmarks, speed, cost,
    warnings, recipe, versions. A run under way is shown so far; what is missing stands there with the command that
    makes it. Several runs are put beside each other. An earlier report in the same folder is replaced.
    """
    from ...recipes.report.page import report as work

    result = work(runs, out, price)
    if json:
        data_json(result)
    else:
        data(result["report"])
        for key, run in result["runs"].items():
            rows = list(run["verdict"].items())
            talk((f"{key}: " if len(result["runs"]) > 1 else "") + run["state"])
            talk(table(rows, ("figure", "value")))
            for warning in run["warnings"]:
                talk(f"warning: {warning}")
    next_command(_next(result))


def _next(result: dict[str, Any]) -> str:
    """The first command that would fill a gap; without gaps, the proof that the export loads."""
    for run in result["runs"].values():
        for gap in run["missing"]:
            if gap["command"] is not None:
                return gap["command"]
    return f"relinear verify {next(iter(result['runs'].values()))['run']}"
