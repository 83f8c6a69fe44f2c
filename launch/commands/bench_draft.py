"""`bench draft`: what speculative decoding gains with a draft, beside the target alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...recipes.teacher_config import locate
from ..bench_text import draft_text
from ..output import data, data_json, next_command, only_talk, talk
from .bench_model import parse_lengths
from .common import DRAFT_HINT, Again, Device, DraftTokens, Dtype, Json, Threads, Trust, examples

LENGTHS = "256,512,1Ki,2Ki,4Ki,8Ki"


def register(parent: typer.Typer) -> None:
    """Add the command to `bench`."""
    parent.command(
        epilog=examples(
            "relinear bench draft TEACHER --draft runs/mine/export --text FILE",
            "relinear bench draft TEACHER --draft runs/mine/export --lengths 256,1k --draft-tokens 4 --json",
            then="relinear generate TEACHER --draft runs/mine/export --prompt 'Once upon a time'",
        )
    )(draft)


def draft(
    folder: Annotated[str, typer.Argument(metavar="TARGET", help="Folder, Hub id, or embedded: it verifies.")],
    draft: Annotated[str, typer.Option(metavar="FOLDER", help="Folder or Hub id of the model that drafts.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Held-out text to cut prompts from; without it, random tokens.", show_default=False
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="N,N", help="Prompts in tokens; k is 1000, Ki 1024.")] = LENGTHS,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens generated behind each prompt.")] = 64,
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of each length.")] = 3,
    draft_tokens: DraftTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where draft.json goes; RUN/eval of the draft, or eval-results/NAME outside a run.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts without text.")] = 0,
    again: Again = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure accepted tokens per verification and the speed-up that a draft brings, over the context.

    Greedy, batch 1, target alone and with the draft in turns in one process; their tokens are compared. Every length is
    stored when it is done: a run that was stopped goes on where it was.
    """
    wanted = parse_lengths(lengths)
    import torch

    from ...eval.bench_draft import Settings
    from ...eval.bench_results import bench_draft
    from ...eval.models import open_models
    from ...eval.store import results_folder

    torch.set_num_threads(threads)
    settings = Settings(tokens, prompts, draft_tokens, seed)
    with only_talk():
        models = open_models(
            locate(draft), locate(folder), dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        models.names = {"student": draft, "teacher": folder}
        place = results_folder(models.folders["student"], out)
        found: dict[str, Any] = bench_draft(
            models, wanted, settings, place, text=text, hint=DRAFT_HINT, again=again, progress=talk
        )
    if json:
        data_json(found)
    else:
        data(draft_text(found))
    talk(f"Stored: {place / 'draft.json'}")
    next_command(f"relinear generate {folder} --draft {draft} --prompt 'Once upon a time'")
