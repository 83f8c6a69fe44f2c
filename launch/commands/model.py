"""The commands that use a checkpoint: `eval` and `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...distill.errors import UserError
from ..output import data, data_json, only_talk, table, talk
from ..progress import Progress
from .common import Json, check_source, examples

SUITES = ("quick", "recall")

Folder = Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint's folder or Hub id.")]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that a foreign model brings; relinear's own never need it."),
]


# Options of the recall suite.
Tasks = Annotated[str | None, typer.Option(metavar="A,B", help="recall: only these tasks.", show_default=False)]
Lengths = Annotated[
    str | None,
    typer.Option(
        metavar="N,N", help="recall: tokens of documents; 256,512,1024 as far as they fit.", show_default=False
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="recall: documents in each cell; 8.", show_default=False)
]
Generate = Annotated[bool, typer.Option("--generate", help="recall: have the answers generated as well; slower.")]
Filler = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="recall: text to hide facts in; made-up prose by default.", show_default=False),
]
Plots = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="recall: draw a heat-map of every task there.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="recall: of the documents; 0.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        "eval",
        epilog=examples(
            "relinear eval runs/quickstart/hybrid/export --against FOLDER --text valid.txt --json",
            "relinear eval runs/quickstart/hybrid/export --against FOLDER --suite recall --plots plots",
            "relinear eval FOLDER --suite recall --tasks needle,pairs --lengths 256,1024 --samples 32",
            then="relinear verify runs/quickstart/hybrid/export",
        ),
    )(evaluate)
    app.command(
        epilog=examples(
            "relinear generate runs/quickstart/hybrid/export --prompt 'Once upon a time'",
            "relinear generate runs/quickstart/hybrid/export --prompt 'Q: ' --temperature 0.8 --seed 1",
            then="relinear eval runs/quickstart/hybrid/export --against FOLDER --text FILE",
        )
    )(generate)


def evaluate(
    folder: Folder,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER", help="Folder or Hub id of the model to compare with; quick needs it.", show_default=False
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="quick: held-out text, jsonl or parquet.", show_default=False),
    ] = None,
    suite: Annotated[
        str, typer.Option(metavar="SUITE", help=f"What is measured: {' or '.join(SUITES)} (see above).")
    ] = "quick",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="quick: stop after N tokens.", show_default=False)
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="quick: window; the smaller of both contexts by default.", show_default=False
        ),
    ] = None,
    tasks: Tasks = None,
    lengths: Lengths = None,
    samples: Samples = None,
    generate: Generate = False,
    filler: Filler = None,
    plots: Plots = None,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure a model against its teacher.

    quick: perplexity of both, KL divergence and top-1 agreement on held-out text, each with its standard error.

    recall: facts found again. Needles, key-value pairs, a phone book, variables, frequent words; a window beside a
    linear mixer is also measured alone, and so is the linear part.

    Any Hugging Face causal language model will do.
    """
    if suite not in SUITES:
        raise UserError(f"--suite {suite}: unknown; there are {', '.join(SUITES)}, e.g. --suite {SUITES[0]}")
    for_recall = {
        "tasks": tasks,
        "lengths": lengths,
        "samples": samples,
        "filler": filler,
        "plots": plots,
        "seed": seed,
    }
    for_recall["generate"] = generate or None
    other = {"text": text, "max-tokens": max_tokens, "seq-len": seq_len} if suite == "recall" else for_recall
    for name, value in other.items():
        if value is not None:
            raise UserError(f"--{name}: not for the suite {suite}; leave it out or take the other --suite")
    if suite == "recall":
        settings = {name: value for name, value in for_recall.items() if value is not None and name != "plots"}
        _evaluate_recall(folder, against, settings, plots, trust_remote_code, json)
        return
    if against is None or text is None:
        missing = "--against TEACHER" if against is None else "--text FILE"
        raise UserError(f"{missing}: the suite quick needs it. Add it, or measure recall: --suite recall")
    check_source("--text", text)
    from ...eval.fidelity import compare

    with Progress() as progress:
        progress.stage("eval", max_tokens)
        result = compare(
            folder,
            against,
            text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            trust_remote_code=trust_remote_code,
            progress=progress.counted,
        )
        progress.done()
    if json:
        data_json(result)
    else:
        data(_fidelity_table(result))


def _evaluate_recall(
    folder: str, against: str | None, settings: dict[str, Any], plots: Path | None, trust: bool, json: bool
) -> None:
    """The suite recall: table or JSON on stdout, pictures where asked for."""
    given = dict(settings)
    if "tasks" in given:
        given["tasks"] = [name.strip() for name in given["tasks"].split(",") if name.strip()]
    if "lengths" in given:
        numbers = [part.strip() for part in given["lengths"].split(",")]
        if not all(part.isdigit() for part in numbers):
            raise UserError(f"--lengths {settings['lengths']}: expected numbers of tokens, e.g. --lengths 256,1024")
        given["lengths"] = [int(part) for part in numbers]
    from ...eval.recall_table import to_text
    from ...eval.suite import compare_recall

    with Progress() as progress, only_talk():
        progress.stage("recall")
        result = compare_recall(folder, against, trust_remote_code=trust, progress=progress.counted, **given)
        progress.done()
    if plots is not None:
        from ...eval.heatmaps import heatmaps

        for path in heatmaps(result, plots):
            talk(f"Drawn: {path}")
    for name in result["left_out"]:
        talk(f"Left out: {name} fits no document of {max(result['lengths'])} tokens")
    if json:
        data_json(result)
    else:
        data(to_text(result))


def _fidelity_table(result: dict[str, Any]) -> str:
    """Each figure with its standard error."""
    flat = {
        "perplexity_ratio": result["perplexity_ratio"],
        "kl": result["kl"],
        "top1_agreement": result["top1_agreement"],
    }
    errors = {name: result.get(f"{name}_stderr") for name in flat}
    for side in ("student", "teacher"):
        flat[f"{side} perplexity"] = result[side]["perplexity"]
        errors[f"{side} perplexity"] = result[side].get("perplexity_stderr")
    order = ("teacher perplexity", "student perplexity", *list(flat)[:3])
    rows = [(n, f"{flat[n]:.4f}", "" if errors[n] is None else f"± {errors[n]:.4f}") for n in order]
    return table([*rows, ("tokens", str(result["tokens"]), "")], ("figure", "value", "stderr"))


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
