"""The commands that make a checkpoint and prove it: `export` and `verify`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ...distill.errors import RunFailed, UserError
from ..output import data, data_json, next_command, only_talk, table
from .common import Json, examples


class Dtype(StrEnum):
    """In what weights are written."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def register(app: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        epilog=examples(
            "relinear export runs/mine",
            "relinear export runs/mine --step last --out models/mine --dtype bfloat16",
            then="relinear verify runs/mine/export",
        )
    )(export)
    app.command(
        epilog=examples(
            "relinear verify runs/quickstart/hybrid/export",
            "relinear verify runs/quickstart/hybrid/export --json",
            then="relinear generate runs/quickstart/hybrid/export --prompt TEXT",
        )
    )(verify)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    step: Annotated[str, typer.Option(metavar="best|last|N", help="Which saved step.")] = "best",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to; RUN/export by default.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; decays stay float32.")] = Dtype.FLOAT32,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an export that stands there already.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a saved step for plain transformers to load."""
    if step not in ("best", "last") and not step.isdigit():
        raise UserError(f"--step {step}: expected best, last or a step's number, e.g. --step last")
    from ...distill.export import export as work

    with only_talk():
        folder = work(run, int(step) if step.isdigit() else step, out, dtype=dtype, overwrite=overwrite)
    if json:
        data_json({"export": str(folder)})
    else:
        data(str(folder))
    next_command(f"relinear verify {folder}")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An exported checkpoint, or the run that it is of.")],
    json: Json = False,
) -> None:
    """Prove that a checkpoint works with transformers alone.

    In a fresh process, offline, from a moved folder, without relinear: loading, generation with and without cache,
    padding, saving and training. Of a run, first compare every file with the run's manifest.
    """
    from ...distill.manifest import check_manifest
    from ...distill.run_folder import RECORD
    from ...distill.verify import verify as work

    if (folder / RECORD).exists():
        problems = check_manifest(folder)
        if problems:
            raise RunFailed(
                f"{folder}: {len(problems)} files are not as the run wrote them: {'; '.join(problems)}. To write the "
                f"export again: relinear export {folder} --overwrite"
            )
        folder = folder / "export"
    with only_talk():
        result = work(folder)
    checks: dict[str, dict[str, Any]] = result["checks"]
    if json:
        data_json(result)
    else:
        rows = [(name, "ok" if check["ok"] else "FAILED", check["detail"]) for name, check in checks.items()]
        data(table(rows, ("check", "result", "detail")))
    failed = [name for name, check in checks.items() if not check["ok"]]
    if failed:
        raise RunFailed(f"{folder}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    next_command(f"relinear generate {folder} --prompt 'Once upon a time'")
