"""`bench model`: how fast a converted model reads and writes beside its teacher, and what memory that takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...distill.errors import UserError
from ...recipes.cache_plan import predicted_cache_bytes
from ...recipes.teacher_config import locate
from ...recipes.units import parse_count
from ..bench_text import model_text
from ..output import data, data_json, next_command, only_talk, talk
from .common import Again, Device, Dtype, Json, Threads, examples

if TYPE_CHECKING:
    from ...eval.models import Models

LENGTHS = "1Ki,2Ki,4Ki,8Ki,16Ki,32Ki,64Ki,128Ki"
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def register(parent: typer.Typer) -> None:
    """Add the command to `bench`."""
    parent.command(
        epilog=examples(
            "relinear bench model runs/mine/export --against FOLDER",
            "relinear bench model runs/mine/export --against FOLDER --lengths 1k,4k,16k --memory 24GB --json",
            then="relinear report runs/mine",
        )
    )(model)


def model(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint's folder or Hub id.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="TEACHER", help="Folder, Hub id, or embedded: measured beside it.", show_default=False),
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="N,N", help="Contexts in tokens; k is 1000, Ki 1024.")] = LENGTHS,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens decoded behind each context.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Turns at most, after one that warms up.")] = 3,
    max_seconds: Annotated[
        float, typer.Option(min=1, metavar="S", help="No further turn of a length that would end later.")
    ] = 600,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens of one prefill call; all by default.", show_default=False),
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="For the largest batch, weights included.")] = "16GB",
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where bench.json and plots go; RUN/eval, or eval-results/NAME outside a run.",
            show_default=False,
        ),
    ] = None,
    again: Again = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that a foreign model brings.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure prefill, time to first token, decoding, memory, cache and batch over the context.

    Student and teacher run in turns in one process; figures are medians over the turns, ratios are taken within a turn.
    Every length is stored when it is done: a run that was stopped goes on where it was.
    """
    wanted, budget = parse_lengths(lengths), _bytes(memory)
    import torch

    from ...eval.bench_model import Settings
    from ...eval.bench_plots import bench_plots
    from ...eval.bench_results import bench
    from ...eval.models import open_models
    from ...eval.store import results_folder

    torch.set_num_threads(threads)
    settings = Settings(tokens, repeats, chunk, budget, max_seconds)
    with only_talk():
        teacher = None if against is None else locate(against)
        models = open_models(locate(folder), teacher, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        models.names = {"student": folder, "teacher": against}
        place = results_folder(models.folders["student"], out)
        found = bench(models, wanted, settings, place, predict=_predictor(models), again=again, progress=talk)
        drawn = bench_plots(found, place)
    if json:
        data_json(found)
    else:
        data(model_text(found))
    talk(f"Stored: {place / 'bench.json'}; drawn: {', '.join(path.name for path in drawn)}")
    next_command(f"relinear eval {folder}" + ("" if against is None else f" --against {against}"))


def _predictor(models: Models) -> Callable[[str, int], int | None]:
    """(side, length) -> what the plan says of the cache."""
    from ...eval.models import AUTO, saved_dtype

    def predict(side: str, length: int) -> int | None:
        folder = models.folders[side]
        return predicted_cache_bytes(folder, length, saved_dtype(folder) if models.dtype == AUTO else models.dtype)

    return predict


def parse_lengths(text: str) -> list[int]:
    """The lengths of --lengths, ascending.

    Raises:
        UserError: not numbers, or below 2.
    """
    try:
        found = sorted({parse_count(part.strip()) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--lengths: {error}. For example: --lengths 1Ki,8Ki") from None
    if found[0] < 2:
        raise UserError(f"--lengths: found {found[0]}, expected at least 2. For example: --lengths 1Ki,8Ki")
    return found


def _bytes(text: str) -> int:
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--memory: expected a size such as 16GB or 40GiB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])
