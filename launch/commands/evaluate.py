"""`relinear eval`: which suites, on which models, with which text; what is stored, reused and printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...distill.errors import MachineError, UserError
from ..output import data, data_json, next_command, talk
from ..progress import Progress
from .common import Again, Device, Dtype, Folder, Json, Trust, examples
from .eval_text import shown

ALL = "all"
NONE = "none"


def _option(help: str, metavar: str = "N", *names: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, **more)


Against = Annotated[
    str | None, _option("Folder or Hub id of the teacher, embedded, or none; of a run, its own by default.", "TEACHER")
]
Suites = Annotated[str, typer.Option("--suite", metavar="A,B", help="Suites (see above), or all.")]
TextFile = Annotated[
    str | None,
    _option("quick, long, generation: held-out text, jsonl or parquet; of a run, its own.", "FILE", "--text"),
]
MaxTokens = Annotated[int | None, _option("quick, long: stop after N tokens.", min=1)]
SeqLen = Annotated[int | None, _option("quick: window; the smaller of both contexts by default.", min=2)]
Tasks = Annotated[str | None, _option("recall, core, generation: only these tasks.", "A,B")]
Lengths = Annotated[str | None, _option("recall: tokens of documents; long: of contexts.", "N,N")]
Samples = Annotated[
    int | None, _option("recall: documents in each cell; generation: prompts, and questions a task.", min=1)
]
Generate = Annotated[bool, typer.Option("--generate", help="recall: have the answers generated as well; slower.")]
Filler = Annotated[Path | None, _option("recall: text to hide facts in; made-up prose by default.", "FILE")]
Plots = Annotated[Path | None, _option("recall: draw a heat-map of every task there.", "DIR")]
Seed = Annotated[int | None, _option("recall, generation, mt_bench: of what is drawn; 0.")]
Limit = Annotated[int | None, _option("core, generation: the first N documents of each lm-eval task.", min=1)]
Fewshot = Annotated[
    int | None, _option("core, generation: examples in each prompt; the task's own number by default.", min=0)
]
DataFolder = Annotated[
    Path | None, _option("core, generation: files for the local_… tasks; no Hub is asked.", "FOLDER", "--data")
]
TaskDir = Annotated[Path | None, _option("core, generation: tasks of your own, in lm-eval's YAML.", "FOLDER")]
Batch = Annotated[int | None, _option("core, generation: requests of lm-eval in a forward pass; 8.", min=1)]
Chat = Annotated[
    bool, typer.Option("--chat", help="core, generation: put lm-eval's prompts through the chat template.")
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="core, generation: run code that the model wrote (humaneval).")
]
NewTokens = Annotated[int | None, _option("generation: tokens of a completion; mt_bench: of an answer.", min=1)]
Questions = Annotated[Path | None, _option("mt_bench: its question.jsonl.", "FILE")]
Endpoint = Annotated[str | None, _option("mt_bench: address of the judge, OpenAI-compatible.", "URL")]
Judge = Annotated[str | None, _option("mt_bench: the judge's model.", "MODEL")]
ApiKey = Annotated[str | None, _option("mt_bench: variable that holds the judge's key; OPENAI_API_KEY.", "NAME")]
Out = Annotated[
    Path | None, _option("Where results are stored; RUN/eval, or eval-results/NAME outside a run.", "FOLDER")
]


def register(app: typer.Typer) -> None:
    """Add the command to the console command."""
    app.command(
        "eval",
        epilog=examples(
            "relinear eval runs/quickstart/hybrid/export",
            "relinear eval runs/mine/export --against FOLDER --text valid.txt --json",
            "relinear eval runs/mine/export --suite recall --tasks needle,pairs --lengths 256,1024",
            "relinear eval runs/mine/export --suite core --tasks arc_easy,piqa --limit 200",
            "relinear eval FOLDER --suite core --data FOLDER_OF_FILES",
            "relinear eval runs/mine/export --suite all --data FOLDER_OF_FILES",
            then="relinear verify runs/quickstart/hybrid/export",
        ),
    )(evaluate)


def evaluate(
    folder: Folder,
    against: Against = None,
    suite: Suites = "quick",
    text: TextFile = None,
    max_tokens: MaxTokens = None,
    seq_len: SeqLen = None,
    tasks: Tasks = None,
    lengths: Lengths = None,
    samples: Samples = None,
    generate: Generate = False,
    filler: Filler = None,
    plots: Plots = None,
    seed: Seed = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    data_folder: DataFolder = None,
    task_dir: TaskDir = None,
    batch: Batch = None,
    chat: Chat = False,
    allow_code: AllowCode = False,
    max_new_tokens: NewTokens = None,
    questions: Questions = None,
    endpoint: Endpoint = None,
    judge: Judge = None,
    api_key_env: ApiKey = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    out: Out = None,
    again: Again = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure a model against its teacher.

    quick: perplexity of both, KL divergence and top-1 agreement on held-out text, each with its standard error.

    recall: facts found again. Needles, key-value pairs, a phone book, variables, frequent words; a window beside a
    linear mixer is also measured alone, and so is the linear part.

    core: lm-eval's tasks by name: by default MMLU, ARC, HellaSwag, PIQA, Winogrande and LAMBADA from the Hub, or with
    --data local files. What the student keeps of the teacher's score, and of its lead over guessing.

    long: perplexity, KL and agreement by position, to any length.

    generation: completions beside the teacher's, repetition, answers that must be exact; with --tasks also lm-eval's
    (gsm8k, ifeval, humaneval).

    mt_bench: answers to MT-Bench's questions, by a judge where one is named.

    Any Hugging Face causal language model will do. Results are stored, and printed again at once while the checkpoints,
    the settings and the versions are the same; an evaluation that was killed goes on where it was.
    """
    from ...eval import store, suites

    names = _chosen(suite)
    given = {
        **{"max_tokens": max_tokens, "seq_len": seq_len, "tasks": _names(tasks), "lengths": _numbers(lengths)},
        **{"samples": samples, "generate": generate or None, "filler": filler, "plots": plots, "seed": seed},
        **{"limit": limit, "num_fewshot": num_fewshot, "data": data_folder, "task_dir": task_dir, "batch": batch},
        **{"chat": chat or None, "allow_code": allow_code or None, "max_new_tokens": max_new_tokens},
        **{"questions": questions, "endpoint": endpoint, "judge": judge, "api_key_env": api_key_env},
    }
    given = {name: value for name, value in given.items() if value is not None}
    _check(names, given | ({} if text is None else {"text": text}))
    results: dict[str, dict[str, Any]] = {}
    with Progress() as progress:
        ask = _open(folder, against, text, out, (dtype, device, trust_remote_code), names)
        ask.options, ask.again, ask.progress = given, again, progress
        left = {}
        for name in names:
            try:
                results[name], stored = suites.evaluate(name, ask)
            except (UserError, MachineError) as error:
                if suite != ALL:
                    raise
                left[name] = str(error)
                continue
            if stored:
                progress.note(f"{ask.store.path(name)}: measured before with the same settings; anew: add --again")
    _report(results, left, plots, json)
    inside = store.run_of(folder)
    next_command(
        f"relinear generate {folder} --prompt 'Once upon a time'" if inside is None else f"relinear report {inside}"
    )


def _chosen(suite: str) -> list[str]:
    """Names of suites.

    Raises:
        UserError: one that there is not.
    """
    from ...eval.suites import SUITES

    names = list(dict.fromkeys(name.strip() for name in suite.split(",") if name.strip()))
    if names == [ALL]:
        return list(SUITES)
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        raise UserError(f"--suite {','.join(unknown) or suite}: unknown; there are {', '.join(SUITES)} and {ALL}")
    return names


def _check(names: list[str], given: dict[str, Any]) -> None:
    """Refuse options that no chosen suite takes, and task names that could be meant for several."""
    from ...eval.suites import SUITES

    for option in given:
        takers = [name for name in names if option in SUITES[name].options]
        flag = f"--{option.replace('_', '-')}"
        if not takers:
            told = "suite" if len(names) == 1 else "suites"
            raise UserError(
                f"{flag}: not for the {told} {', '.join(names)}; leave it out or take the other --suite: "
                f"{', '.join(name for name in SUITES if option in SUITES[name].options)}"
            )
        if option == "tasks" and len(takers) > 1:
            raise UserError(f"--tasks: {', '.join(takers)} each have their own; name one of them: --suite {takers[0]}")


def _open(
    folder: str, against: str | None, text: str | None, out: Path | None, how: tuple[str, str, bool], names: list[str]
) -> Any:
    """The models found, the results folder, and the text that the suites read."""
    from ...eval import store
    from ...eval.models import open_models
    from ...eval.suites import Ask
    from ...eval.texts import text_files
    from ...recipes import held_out
    from ...recipes.teacher_config import locate

    run = store.run_of(folder)
    if run is not None and Path(folder).absolute() == run.absolute():
        folder = str(run / "export")
    teacher = None if against == NONE else locate(against) if against is not None else _teacher_of(run)
    dtype, device, trust = how
    models = open_models(locate(folder), teacher, dtype=dtype, device=device, trust_remote_code=trust)
    results = store.Store(store.results_folder(folder, out))
    ask = Ask(models, results)
    if text is not None:
        try:
            ask.text = text_files(text)
        except UserError as error:
            raise UserError(f"--text: {error}") from None
    elif run is not None:
        try:
            ask.text = held_out.run_text(run, results.folder)
        except UserError:
            if not {"recall", "core", "mt_bench", "generation"} & set(names):
                raise
    elif held_out.knows_embedded(models.folders["student"]):
        ask.text = held_out.embedded_text(results.folder)
    return ask


def _teacher_of(run: Path | None) -> str | None:
    """The teacher of a run: the folder that it read, or what the recipe names where that is gone."""
    if run is None:
        return None
    from ...distill import run_folder
    from ...recipes.teacher_config import locate

    teacher = run_folder.read(run)["teacher"]
    return teacher["folder"] if Path(teacher["folder"]).is_dir() else locate(teacher["source"])


def _names(value: str | None) -> list[str] | None:
    """`a, b` as a list."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def _numbers(value: str | None) -> list[int] | None:
    """`256,512` as a list.

    Raises:
        UserError: something else than numbers.
    """
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--lengths {value}: expected numbers of tokens, e.g. --lengths 256,1024")
    return [int(part) for part in parts]


def _report(results: dict[str, dict[str, Any]], left: dict[str, str], plots: Path | None, json: bool) -> None:
    """What was measured to stdout, what was not to stderr, pictures where asked for."""
    if not results:
        raise UserError("; ".join(f"{name}: {reason}" for name, reason in left.items()))
    if plots is not None and "recall" in results:
        from ...eval.heatmaps import heatmaps

        for path in heatmaps(results["recall"], plots):
            talk(f"Drawn: {path}")
    for task in results.get("recall", {}).get("left_out", []):
        talk(f"Left out: {task} fits no document of {max(results['recall']['lengths'])} tokens")
    for name, reason in left.items():
        talk(f"Left out: {name}: {reason}")
    if json:
        one = len(results) == 1 and not left
        data_json(next(iter(results.values())) if one else {**results, "left_out": left})
        return
    texts = [shown(name, result) for name, result in results.items()]
    if len(texts) > 1:
        texts = [f"{name}\n\n{text}" for name, text in zip(results, texts, strict=True)]
    data("\n\n".join(texts))
