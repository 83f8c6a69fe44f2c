"""`bench`: speed, as ratios within one run, which mean something on a shared machine too; and methods side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...distill.errors import RunFailed, UserError
from ...recipes.units import parse_count
from ..bench_text import decode_text, methods_text, ops_text, train_text
from ..output import data, data_json, next_command, only_talk, table, talk
from . import bench_draft, bench_logits, bench_model
from .common import Json, check_source, examples

if TYPE_CHECKING:
    from ...recipes.bench_ops import Settings

Threads = Annotated[int, typer.Option(min=1, help="Threads of torch; more than there are idle cores slow it down.")]
app = typer.Typer(
    help="Measure speed as ratios, and methods side by side.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples("relinear bench align embedded", then="relinear bench decode runs/quickstart/all-linear/export"),
)


def register(parent: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        epilog=examples(
            "relinear bench align embedded",
            "relinear bench align FOLDER --mixer rwkv7 --batch 4 --json",
            then="relinear run rwkv7 teacher.model=FOLDER data.source=FILE",
        )
    )(align)
    app.command(
        epilog=examples(
            "relinear bench ops --op gated_delta,kda --lengths 2Ki,8Ki",
            "relinear bench ops --op mlstm --max-seconds 20 --fla FOLDER --json",
            then="relinear bench align embedded",
        )
    )(ops)
    app.command(
        epilog=examples(
            "relinear bench train",
            "relinear bench train --case align --mixer all --repeats 3 --json",
            then="relinear plan rwkv7 teacher.model=FOLDER data.source=FILE",
        )
    )(train)
    app.command(
        epilog=examples(
            "relinear bench decode runs/quickstart/all-linear/export --against embedded",
            "relinear bench decode DIR --lengths 1Ki,4Ki,32Ki --json",
            then="relinear eval DIR --against TEACHER --text FILE",
        )
    )(decode)
    app.command(
        epilog=examples(
            "relinear bench methods FOLDER --text train.txt --valid valid.txt --jobs 2",
            "relinear bench methods embedded --arms relinear,radlads --seeds 1 --tokens 50k",
            "relinear bench methods --report --out docs/results/methods",
            then="relinear run methods/radlads teacher.model=FOLDER data.source=FILE",
        )
    )(methods)
    bench_logits.register(app)
    bench_model.register(app)
    bench_draft.register(app)
    parent.add_typer(app, name="bench")


def align(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Folder, Hub id, or embedded.")],
    mixer: Annotated[str, typer.Option(help="Mixer for every layer.")] = "gated_deltanet",
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence, at most the teacher's context.")] = 512,
    json: Json = False,
) -> None:
    """Compare align's training tokens/s with the teacher's forward-only tokens/s."""
    from ...mixers import registry
    from ...recipes.bench import align_ratio

    try:
        name = registry.resolve(mixer)
    except ValueError as error:
        raise UserError(f"--mixer: {error}. See: relinear ls mixers") from None
    _show(align_ratio(teacher, name, batch=batch, seq_len=seq_len), json)


def ops(
    op: Annotated[
        str | None, typer.Option("--op", metavar="NAME,…", help="Ops to measure; all by default.", show_default=False)
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="N,N", help="Tokens, forward and backward.")] = "2Ki,8Ki,32Ki",
    batches: Annotated[str, typer.Option(metavar="N,N", help="Rows, of one decoded token.")] = "1,8,64",
    heads: Annotated[int, typer.Option(min=1, help="Heads of every op.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head's keys and values.")] = 64,
    threads: Threads = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Turns at most; both sides are timed once in each.")] = 7,
    max_seconds: Annotated[
        float, typer.Option(min=1, metavar="S", help="Skip what takes longer than this, all turns included.")
    ] = 60,
    max_gb: Annotated[
        float, typer.Option("--max-gb", min=1, metavar="GB", help="Skip what takes more memory than this.")
    ] = 8,
    fla: Annotated[
        str | None,
        typer.Option(
            "--fla",
            metavar="FOLDER",
            help="flash-linear-attention's sources, where it is not installed.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare every op with the public implementations of the same recurrence.

    Forward and backward of the chunked form, and one decoded token, in fp32 on the CPU, against transformers' torch
    fallbacks and fla's naive functions: ratios of times measured in turns, and the peak of allocated memory. A pair is
    timed only after both sides gave the same output and gradients.
    """
    settings = _ops_settings(op, lengths, batches, fla)._replace(
        heads=heads, head_dim=head_dim, threads=threads, repeats=repeats, max_seconds=max_seconds, max_gb=max_gb
    )
    from ...recipes.bench_ops import failures, measure

    with only_talk():
        result = measure(settings, progress=talk)
    if json:
        data_json(result)
    else:
        data(ops_text(result))
    if failed := failures(result):
        raise RunFailed("; ".join(failed))


def _ops_settings(op: str | None, lengths: str, batches: str, fla: str | None) -> Settings:
    """Checked settings; the rest of them as they are by default."""
    counts = {"lengths": _counts("--lengths", lengths, "2Ki,8Ki"), "batches": _counts("--batches", batches, "1,8,64")}
    from ...recipes.bench_baselines import fla_root
    from ...recipes.bench_ops import OPS, Settings

    names = tuple(dict.fromkeys(part.strip() for part in op.split(","))) if op is not None else OPS
    if unknown := [name for name in names if name not in OPS]:
        raise UserError(f"--op: no op named {unknown[0]!r}. There are: {', '.join(OPS)}")
    try:
        fla_root(fla)
    except FileNotFoundError as error:
        raise UserError(
            f"--fla: {error}. Give the folder of a checkout or of an unpacked wheel of flash-linear-attention"
        ) from None
    return Settings(ops=names, fla=fla, lengths=counts["lengths"], batches=counts["batches"])


def _counts(option: str, text: str, example: str, least: int = 1) -> tuple[int, ...]:
    """Ascending numbers out of `2Ki,8Ki`."""
    try:
        found = sorted({parse_count(part.strip()) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"{option}: {error}. For example: {option} {example}") from None
    if found[0] < least:
        raise UserError(f"{option}: found {found[0]}, expected at least {least}. For example: {option} {example}")
    return tuple(found)


def train(
    case: Annotated[
        str | None,
        typer.Option("--case", metavar="NAME,…", help="Cases to measure; all by default.", show_default=False),
    ] = None,
    mixer: Annotated[str, typer.Option(metavar="NAME,…", help="Of the case align; all for every one.")] = "all",
    layers: Annotated[int, typer.Option(min=1, help="Of the teacher; its width is 768.")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 2,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; both sides are timed once in each.")] = 5,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Compare training with its limits, on a teacher of random weights.

    align: tokens/s against the teacher's forward times its share of the FLOPs. glue: against a plain transformers step.
    memory: what align holds, in layers' activations. ranks: two processes against one. loader: its share of the time.
    """
    from ...mixers import registry
    from ...recipes.bench_train import CASES, Settings, failures, measure, names

    cases = CASES if case is None else tuple(dict.fromkeys(part.strip() for part in case.split(",")))
    if unknown := [name for name in cases if name not in CASES]:
        raise UserError(f"--case: no case named {unknown[0]!r}. There are: {', '.join(CASES)}")
    try:
        chosen = names() if mixer == "all" else tuple(registry.resolve(part.strip()) for part in mixer.split(","))
    except ValueError as error:
        raise UserError(f"--mixer: {error}. See: relinear ls mixers") from None
    settings = Settings(cases, chosen, layers=layers, batch=batch, seq_len=seq_len, repeats=repeats, threads=threads)
    with only_talk():
        result = measure(settings, progress=talk)
    if json:
        data_json(result)
    else:
        data(train_text(result))
    for line in failures(result):
        talk(f"missed: {line}")


def decode(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Any causal language model.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="TEACHER", help="Folder, Hub id, or embedded: timed beside it.", show_default=False),
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="N,N", help="Contexts in tokens, comma between them.")] = "1Ki,32Ki",
    repeats: Annotated[int, typer.Option(min=1, help="Turns; every context is timed once in each.")] = 9,
    prefill: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that run for real where layers keep keys and values.")
    ] = 2048,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Compare time per decoded token and cache between contexts.

    A context whose cache does not grow is read for real. Where layers keep keys and values, what lies beyond --prefill
    tokens enters as zeros, which changes neither time nor bytes; so may a context be longer than a model was made for.
    """
    wanted = _counts("--lengths", lengths, "1Ki,32Ki", least=2)
    import torch

    from ...distill.teacher import load_model
    from ...eval.speed import decode as measure
    from ...recipes.teacher_config import locate

    torch.set_num_threads(threads)

    names = {"model": folder} if against is None else {"student": folder, "teacher": against}
    with only_talk():
        models = {name: load_model(locate(source))[0] for name, source in names.items()}
        result = measure(models, wanted, repeats, prefill=prefill, progress=talk)
    if json:
        data_json({"sources": names, "models": result})
    else:
        data(decode_text(result))


def methods(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Folder, Hub id, or embedded.")] = "embedded",
    arms: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Procedures; all by default.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Training text; needed unless embedded.", show_default=False)
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Held-out text; a twentieth of the text if left out.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every procedure.")] = 3,
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of each half of a procedure's training.")] = "300k",
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time, one thread each.")] = 1,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for results.")] = "runs/methods",
    work: Annotated[str, typer.Option(metavar="DIR", help="Folder for runs under way.")] = "runs/methods-work",
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="Leave finished runs, export included.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Look for every procedure's rates and batch, on one seed.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: table, page and plots from results.")] = False,
    json: Json = False,
) -> None:
    """Run published procedures side by side: tokens until a target, final KL, recall.

    Every procedure is a recipe (relinear ls recipes: methods/NAME) and gets the same teacher, text, tokens, seeds and
    measurement. What has its result in --out already is not run again; Ctrl-C stops, the same command goes on.
    """
    from ...recipes import bench_methods as bench
    from ...recipes import bench_methods_report as reports

    folder = Path(out)
    status: dict[str, int] = {}
    if not report:
        grid = _grid(bench, teacher, arms, text, valid, tokens)(seeds, folder, Path(work), jobs, keep_runs)
        with only_talk():
            if tune:
                bench.tune(grid, talk)
                next_command("the same command without --tune")
                return
            status = bench.run_grid(grid, talk)
    found = bench.results(folder)
    if not found:
        raise UserError(f"{out}: holds no results. Make some: relinear bench methods TEACHER --out {out}")
    with only_talk():
        summary = reports.write(folder, found, bench.read(folder / "tuned.json"))
    if json:
        data_json(summary)
    else:
        data(methods_text(summary))
    talk(f"Page: {folder.with_name(folder.name + '.md')}; plots and results: {folder}")
    if status.get("failed"):
        raise RunFailed(f"{status['failed']} of {sum(status.values())} jobs failed; the others stand. See {out}")


def _grid(
    bench: Any, teacher: str, arms: str | None, text: str | None, valid: str | None, tokens: str
) -> Callable[..., Any]:
    """The grid, once its other settings are given; checked before any work."""
    if teacher != "embedded" and text is None:
        raise UserError(f"--text: required for {teacher}, as only the embedded teacher has a text of its own")
    for option, source in (("--text", text), ("--valid", valid)):
        if source is not None:
            check_source(option, source)
    try:
        count = parse_count(tokens)
    except ValueError as error:
        raise UserError(f"--tokens: {error}. For example: --tokens 300k") from None
    place = bench.Place(teacher, text, valid, 2 * count)
    names = tuple(bench.chosen(arms))
    return lambda seeds, out, work, jobs, keep: bench.Grid(place, names, seeds, out, work, jobs, keep)


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        data_json(result)
        return
    flat = {name: value for name, value in result.items() if name != "environment"}
    rows = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in flat.items()]
    data(table(rows, ("what", "measured")))
