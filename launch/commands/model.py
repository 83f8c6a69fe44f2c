"""The command that lets a checkpoint speak: `generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...distill.errors import UserError
from ..bench_text import draft_line
from ..output import data, data_json, only_talk, talk
from .common import DRAFT_HINT, DraftTokens, Folder, Json, Trust, examples


def register(app: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        epilog=examples(
            "relinear generate runs/quickstart/hybrid/export --prompt 'Once upon a time'",
            "relinear generate runs/quickstart/hybrid/export --prompt 'Q: ' --temperature 0.8 --seed 1",
            "relinear generate TEACHER --draft runs/mine/export --prompt 'Once upon a time'",
            then="relinear eval runs/quickstart/hybrid/export --against FOLDER --text FILE",
        )
    )(generate)


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder or Hub id of a model with the same tokens, which drafts what DIR verifies: the same text, or "
            "the same distribution, sooner where the draft guesses well.",
            show_default=False,
        ),
    ] = None,
    draft_tokens: DraftTokens = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Continue a text with a checkpoint."""
    if draft_tokens is not None and draft is None:
        raise UserError("--draft-tokens: there is nothing that drafts. Name it: --draft FOLDER")
    import torch

    from ...distill.draft import generate as continue_text
    from ...distill.draft import share_equal
    from ...distill.teacher import load_model
    from ...eval.fidelity import check_same_vocabulary

    other = shared = None
    with only_talk():
        model, tokenizer = load_model(folder, trust_remote_code=trust_remote_code)
        if draft is not None:
            other, its_tokenizer = load_model(draft, trust_remote_code=trust_remote_code)
            check_same_vocabulary(draft, folder, (other, its_tokenizer), (model, tokenizer), hint=DRAFT_HINT)
            shared = share_equal(other, model)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if ids["input_ids"].shape[1] == 0:
        raise UserError("--prompt: the text has no tokens. Give at least one character: --prompt 'Once upon a time'")
    torch.manual_seed(seed)
    options: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    out, counts = continue_text(
        model, ids["input_ids"], other, draft_tokens, attention_mask=ids["attention_mask"], **options
    )
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    drafted = None
    if shared is not None:
        drafted = {
            "model": draft,
            "draft_tokens": draft_tokens,
            "verifications": counts.verifications,
            "drafted": counts.drafted,
            "accepted": counts.accepted,
            "accepted_per_verification": counts.accepted_per_verification,
            "shared_tensors": shared.tensors,
            "shared_bytes": shared.bytes,
            "draft_bytes": shared.draft_bytes,
            "target_bytes": shared.target_bytes,
        }
        talk(draft_line(drafted, counts.tokens_per_second))
    if json:
        result = {
            "prompt": prompt,
            "text": text,
            "new_tokens": counts.new_tokens,
            "seed": seed,
            "temperature": temperature,
        }
        data_json({**result, "tokens_per_second": counts.tokens_per_second, "draft": drafted})
    else:
        data(text)
