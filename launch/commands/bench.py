"""`bench`: speed, as ratios measured within one run, so that they mean something on a shared machine too."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...distill.errors import UserError
from ...recipes.units import parse_count
from ..output import data, data_json, table
from .common import Json, examples

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
            "relinear bench decode runs/quickstart/all-linear/export",
            "relinear bench decode DIR --lengths 1k,4k,16k --json",
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


def decode(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Any causal language model.")],
    lengths: Annotated[str, typer.Option(metavar="N,N", help="Contexts in tokens, comma between them.")] = "1Ki,16Ki",
    repeats: Annotated[int, typer.Option(min=1, help="Turns; every context is timed once in each.")] = 9,
    json: Json = False,
) -> None:
    """Compare the time per decoded token between contexts."""
    from ...distill.teacher import load_model
    from ...eval.speed import decode_ms_per_token, decode_ratio

    try:
        wanted = sorted({parse_count(part.strip()) for part in lengths.split(",")})
    except ValueError as error:
        raise UserError(f"--lengths: {error}. For example: --lengths 1Ki,16Ki") from None
    model, _ = load_model(folder)
    if len(wanted) == 2:
        _show({"lengths": wanted, **decode_ratio(model, wanted[0], wanted[1], repeats)}, json)
        return
    timed = decode_ms_per_token(model, wanted, repeats)
    _show({f"{length} tokens": values["median_ms"] for length, values in timed.items()} | {"unit": "ms/token"}, json)


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        data_json(result)
        return
    flat = {name: value for name, value in result.items() if name != "environment"}
    rows = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in flat.items()]
    data(table(rows, ("what", "measured")))
