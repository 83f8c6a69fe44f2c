"""`bench`: speed, as ratios measured within one run, so that they mean something on a shared machine too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...distill.errors import RunFailed, UserError
from ...recipes.units import parse_count
from ..bench_text import decode_text, ops_text
from ..output import data, data_json, only_talk, table, talk
from .common import Json, examples

if TYPE_CHECKING:
    from ...recipes.bench_ops import Settings

Threads = Annotated[int, typer.Option(min=1, help="Threads of torch; more than there are idle cores slow it down.")]
app = typer.Typer(
    help="Measure speed as ratios within one run.",
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
            "relinear bench decode runs/quickstart/all-linear/export --against embedded",
            "relinear bench decode DIR --lengths 1Ki,4Ki,32Ki --json",
            then="relinear eval DIR --against TEACHER --text FILE",
        )
    )(decode)
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


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        data_json(result)
        return
    flat = {name: value for name, value in result.items() if name != "environment"}
    rows = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in flat.items()]
    data(table(rows, ("what", "measured")))
