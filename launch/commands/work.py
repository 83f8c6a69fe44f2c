"""The commands that work: `quickstart` and `run`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import processes, worker
from ..output import data, data_json, next_command
from ..progress import Progress
from ..signals import STOPPED, stoppable
from .common import Json, MaxHours, Overrides, Recipe, Resume, RunDir, check_engine, command_line, examples


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
            "relinear run my.yaml engine.parallel=ddp --nproc auto",
            then="relinear eval runs/NAME/export",
        )
    )(run)


def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/quickstart"),
    json: Json = False,
) -> None:
    """Convert the small teacher inside this package, twice.

    All of its layers, and all but one; then measure what was lost and won, export, verify and generate.

    Needs no network and no GPU; about 5 minutes on 2 cores.
    """
    from ...recipes.quickstart import quickstart as work

    with stoppable(), Progress() as progress:
        result = work(out, progress, overrides)
    _report(result, json)
    if result.get("status") == "stopped":
        next_command(shlex.join(["relinear", "quickstart", *(overrides or []), "--out", str(out)]))
        raise typer.Exit(STOPPED)


def run(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = False,
    max_hours: MaxHours = None,
    out: RunDir = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Take that run's mixers instead of transferring anew.", show_default=False),
    ] = None,
    nproc: Annotated[
        str | None,
        typer.Option(metavar="N", help="Start N processes on this node; auto: one per GPU.", show_default=False),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Nodes; the same command runs on each.", show_default=False)
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(min=0, metavar="R", help="Number of this node, from 0; SLURM_NODEID.", show_default=False),
    ] = None,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where node 0 listens.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each process would hold, and stop before any work.")
    ] = False,
    json: Json = False,
) -> None:
    """Carry out a recipe: transfer, align, glue, evaluate, export.

    SIGTERM, SIGUSR1, Ctrl-C and --max-hours save, stop and give exit code 75: the same command with --resume goes on.
    With --nproc every process has its log in RUN/logs/rank-N.log.
    """
    changes = [*(overrides or []), *([f"save.dir={out}"] if out is not None else [])]
    if dry_run:
        from .look import plan

        # `auto` counts the GPUs of a machine, which need not be this one.
        count = int(nproc) if nproc is not None and nproc.isdecimal() and int(nproc) > 0 else 1
        plan(recipe, changes, nproc=count, nodes=nodes or 1, json=json)
        return
    from ...recipes.loader import load

    loaded = load(recipe, changes)
    options = [*([] if start is None else ["--start", str(start)])]
    where = processes.place(nproc, nodes, node_rank, rendezvous)
    check_engine(loaded, recipe, changes, where.world if where else None)
    if where is not None:
        limits = [] if max_hours is None else ["--max-hours", str(max_hours)]
        flags = [*(["--resume"] if resume else []), *(["--json"] if json else [])]
        shown = ["--traceback"] if context.find_root().params.get("show_traceback") else []
        _start([*shown, recipe, *changes, *options, *limits, *flags], loaded, where, resume)
        going_on = _going_on(recipe, changes, options, where, nproc, rendezvous)
        if where.node_rank == 0:
            next_command(going_on)
        raise typer.Exit(STOPPED)
    worker.watch_launcher()
    from ...recipes.runner import run as work

    with stoppable(), Progress() as progress:
        result = work(loaded, resume=resume, max_hours=max_hours, progress=progress, start=start)
    if worker.rank() == 0:
        _report(result, json)
    if result["status"] == "stopped":
        if not worker.launched():
            next_command(command_line("run", recipe, [*changes, *options, "--resume"]))
        raise typer.Exit(STOPPED)


def _start(arguments: list[str], recipe: Any, where: processes.Place, resume: bool) -> None:
    """Start this node's processes; returns where they were stopped before their end, and only then."""
    from ...distill.run_folder import check_free

    folder = Path(str(recipe.save.dir))
    check_free(folder, resume=resume)
    # -P: what lies in the folder where the command is typed is not imported.
    code = processes.run([sys.executable, "-P", "-m", processes.MODULE, *arguments], where, folder / "logs")
    if code != STOPPED:
        raise typer.Exit(code)


def _going_on(
    recipe: str, changes: list[str], options: list[str], where: processes.Place, nproc: str | None, address: str | None
) -> str:
    """The command line that goes on with a stopped run."""
    nodes = [] if where.nodes == 1 else ["--nodes", str(where.nodes), "--node-rank", str(where.node_rank)]
    place = ["--nproc", str(nproc), *nodes, *([] if address is None else ["--rendezvous", address])]
    return command_line("run", recipe, [*changes, *options, *place, "--resume"])


def _report(result: dict[str, Any], json: bool) -> None:
    """The result as data; what to type next as talk."""
    if json:
        data_json({name: value for name, value in result.items() if name != "table"})
    else:
        data(result["table"])
    if "export" in result:
        next_command(f"relinear generate {result['export']} --prompt 'Once upon a time'")
