"""The command that lets a checkpoint speak: `generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...distill.errors import UserError
from ..output import data, data_json, only_talk
from .common import Folder, Json, Trust, examples


def register(app: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        epilog=examples(
            "relinear generate runs/quickstart/hybrid/export --prompt 'Once upon a time'",
            "relinear generate runs/quickstart/hybrid/export --prompt 'Q: ' --temperature 0.8 --seed 1",
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
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Continue a text with a checkpoint."""
    import torch

    from ...distill.teacher import load_model

    with only_talk():
        model, tokenizer = load_model(folder, trust_remote_code=trust_remote_code)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if ids["input_ids"].shape[1] == 0:
        raise UserError("--prompt: the text has no tokens. Give at least one character: --prompt 'Once upon a time'")
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    new = out.shape[1] - ids["input_ids"].shape[1]
    if json:
        data_json({"prompt": prompt, "text": text, "new_tokens": new, "seed": seed, "temperature": temperature})
    else:
        data(text)
