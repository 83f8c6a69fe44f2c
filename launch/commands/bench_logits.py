"""`bench logits`: what a cache of the teacher's k likeliest tokens loses."""

from __future__ import annotations

from typing import Annotated

import typer

from ...distill.errors import UserError
from ...recipes.units import parse_count
from ..output import data, data_json, next_command, only_talk, table
from .common import Json, check_source, examples


def register(parent: typer.Typer) -> None:
    """Add the command to `bench`."""
    parent.command(
        epilog=examples(
            "relinear bench logits runs/mine/export --against FOLDER --text valid.txt",
            "relinear bench logits DIR --against embedded --text FILE --top-k 8,32,128 --json",
            then="relinear prepare RECIPE",
        )
    )(logits)


def logits(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Folder or Hub id of a converted model.")],
    against: Annotated[str, typer.Option(metavar="TEACHER", help="Folder, Hub id, or embedded.")],
    text: Annotated[str, typer.Option(metavar="FILE", help="Held-out text.")],
    top_k: Annotated[
        str, typer.Option(metavar="K,K", help="Tokens kept, comma between them.")
    ] = "1,8,16,32,64,128,256,512",
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of the text.")] = "20k",
    seq_len: Annotated[int, typer.Option(min=2, help="Window in tokens.")] = 512,
    json: Json = False,
) -> None:
    """Compare the KL over k tokens and a tail with the full KL.

    Loss, gradient by the logits, and rounding in half precision, for a student as it is now: the further it is from
    its teacher, the more there is to miss.
    """
    check_source("--text", text)
    try:
        ks = [int(part) for part in top_k.split(",")]
        wanted = parse_count(tokens)
    except ValueError as error:
        raise UserError(f"--top-k {top_k} --tokens {tokens}: {error}; e.g. --top-k 8,64 --tokens 20k") from None
    if min(ks) < 1:
        raise UserError(f"--top-k {top_k}: expected numbers of at least 1, e.g. --top-k 8,64")
    from ...recipes.bench_logits import logit_errors

    with only_talk():
        found = logit_errors(student, against, text, ks, tokens=wanted, seq_len=seq_len)
    if json:
        data_json({"student": student, "teacher": against, **found})
    else:
        rows = [
            (
                *(str(row["k"]), f"{row['bytes']:,}", _percent(row["tail_mass"], row["tail_mass_stderr"])),
                *(_percent(row["missed"], row["missed_stderr"]), f"{row['gradient']:.2%}", f"{row['rounding']:+.3%}"),
            )
            for row in found["rows"]
        ]
        said = f"full KL {found['kl']:.4f} nats/token, {found['tokens']:,} tokens, vocabulary {found['vocab']:,}"
        header = ("k", "bytes", "tail mass", "KL missed", "gradient off by", "float16 adds")
        data(f"{said}\n\n{table(rows, header)}")
    next_command("relinear prepare RECIPE")


def _percent(value: float, stderr: float | None) -> str:
    return f"{value:.2%}" if stderr is None else f"{100 * value:.2f} ± {100 * stderr:.2f} %"
