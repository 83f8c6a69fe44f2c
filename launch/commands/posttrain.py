"""The command that trains a converted model on: `posttrain`."""

from __future__ import annotations

from typing import Annotated

import typer

from ...distill.errors import UserError
from .. import worker
from ..output import data, data_json, next_command
from ..progress import Progress
from ..signals import STOPPED, stoppable
from .common import Json, MaxHours, Resume, RunDir, command_line, examples


def register(app: typer.Typer) -> None:
    """Add the command to the console command."""
    app.command(
        epilog=examples(
            "relinear posttrain sft model=runs/mine/export data.source=chats.jsonl steps=500 lr=1e-4",
            "relinear posttrain dpo model=runs/mine/export data.source=pairs.jsonl train=no-ffn --out runs/preferred",
            "relinear posttrain grpo model=runs/sums/export data.source=arithmetic grpo.read=line --dry-run",
            "relinear posttrain mine.yaml --resume",
            then="relinear verify runs/NAME/export",
        )
    )(posttrain)


def posttrain(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="sft, dpo, grpo, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, e.g. lr=1e-4", show_default=False),
    ] = None,
    resume: Resume = False,
    max_hours: MaxHours = None,
    out: RunDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open and check everything, and stop before anything is written.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a converted model on, by TRL: SFT, DPO or GRPO.

    Measures the method's own metric on held-out examples before and after, checks that what was frozen did not change,
    and exports. SIGTERM, SIGUSR1, Ctrl-C and --max-hours save, stop and give exit code 75: the same command with
    --resume goes on. Needs the extra relinear[posttrain].
    """
    from ...recipes.posttrain.schema import load

    changes = [*(overrides or []), *([f"save.dir={out}"] if out is not None else [])]
    loaded = load(recipe, changes)
    if worker.size() > 1:
        raise UserError(f"posttrain is one process, and there are {worker.size()}. Start it without a launcher")
    from ...recipes.posttrain.run import run

    with stoppable(), Progress() as progress:
        result = run(loaded, resume=resume, max_hours=max_hours, progress=progress, dry=dry_run)
    if json:
        data_json({name: value for name, value in result.items() if name != "table"})
    elif result["table"]:
        data(result["table"])
    if result["status"] == "stopped":
        next_command(command_line("posttrain", recipe, [*changes, "--resume"]))
        raise typer.Exit(STOPPED)
    if result["status"] == "dry":
        next_command(command_line("posttrain", recipe, changes))
    else:
        next_command(f"relinear verify {result['export']}")
