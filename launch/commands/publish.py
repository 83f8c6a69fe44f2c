"""The commands that bring a model to others: `export`, `verify`, `card` and `push`."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ...distill.errors import RunFailed, UserError
from ...distill.formats.pairs import FORMATS
from ...distill.run_folder import RECORD
from ..output import data, data_json, next_command, only_talk, table, talk
from .common import Json, examples


class Dtype(StrEnum):
    """In what weights are written."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Target = Annotated[Path, typer.Argument(metavar="DIR", help="An exported checkpoint, or the run that it is of.")]
License = Annotated[
    str | None,
    typer.Option(
        "--license",
        metavar="ID",
        help="Of the model: one of the Hub's, e.g. apache-2.0, or NAME=LINK; the teacher's by default.",
        show_default=False,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(metavar="ID", help="The teacher's Hub id, where it was a local folder.", show_default=False),
]
Stage = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of which stage; the newest by default.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        epilog=examples(
            "relinear export runs/mine",
            "relinear export runs/mine --stage glue --step 1200 --dtype bfloat16",
            "relinear export runs/mine --step last --out models/mine --max-shard-size 2GB",
            "relinear export runs/mine --format rwkv6qwen2",
            then="relinear verify runs/mine/export",
        )
    )(export)
    app.command(
        epilog=examples(
            "relinear verify runs/mine/export",
            "relinear verify runs/mine --transformers oldest/bin/python --json",
            then="relinear card runs/mine",
        )
    )(verify)
    app.command(
        epilog=examples(
            "relinear card runs/mine",
            "relinear card runs/mine/export --license apache-2.0 --base-model Qwen/Qwen2.5-7B-Instruct",
            then="relinear push runs/mine --repo OWNER/NAME --dry-run",
        )
    )(card)
    app.command(
        epilog=examples(
            "relinear push runs/mine --repo OWNER/NAME --dry-run",
            "relinear push runs/mine --repo OWNER/NAME",
            "relinear push runs/mine --repo OWNER/NAME --stage glue --step 1200",
            "relinear push runs/mine --repo OWNER/NAME --public --steps --collection 'Linear models'",
            then="relinear eval OWNER/NAME --against TEACHER --text FILE",
        )
    )(push)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    step: Annotated[str, typer.Option(metavar="best|last|N", help="Which saved step.")] = "best",
    stage: Stage = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to; RUN/export, or for another step RUN/exports/STAGE-STEP.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"A published architecture's own: {', '.join(FORMATS)}; to RUN/exports/NAME. RUN may then be an "
            "exported folder.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; decays stay float32.")] = Dtype.FLOAT32,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of a weight file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an export that stands there already.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a saved step for plain transformers to load.

    The folder holds weights in shards, config, modelling files, the teacher's tokenizer, chat template, generation
    settings and licence, the recipe without places of this machine, and a model card.

    With --format the student is written as a published architecture, for what runs that; where its mixer's options
    make the two differ, they are named.
    """
    number = _step(step)
    if format is not None:
        _export_as(run, format, number, out, stage, dtype, overwrite, max_shard_size, json)
        return
    from ...distill.export import export as work

    with only_talk():
        folder = work(run, number, out, stage=stage, dtype=dtype, overwrite=overwrite, max_shard_size=max_shard_size)
    if json:
        data_json({"export": str(folder)})
    else:
        data(str(folder))
    next_command(f"relinear verify {folder}")


def _export_as(
    run: Path,
    name: str,
    step: str | int,
    out: Path | None,
    stage: str | None,
    dtype: Dtype,
    overwrite: bool,
    max_shard_size: str,
    json: bool,
) -> None:
    """Write it in a published format, and say how to go on."""
    from ...distill.formats.run import export_as

    with only_talk():
        folder, record = export_as(
            run, name, step, out, stage=stage, dtype=dtype, overwrite=overwrite, max_shard_size=max_shard_size
        )
    for note in record["notes"]:
        talk(f"Not exact for certain: {note}")
    if json:
        data_json({"export": str(folder), **record})
    else:
        data(str(folder))
    talk(f"Next: {FORMATS[name].next.format(folder=shlex.quote(str(folder)))}")


def _step(step: str) -> str | int:
    if step not in ("best", "last") and not step.isdigit():
        raise UserError(f"--step {step}: expected best, last or a step's number, e.g. --step last")
    return int(step) if step.isdigit() else step


def verify(
    folder: Target,
    transformers: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PYTHON",
            help="Also with this environment's torch and transformers; may be given several times.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="For each fresh process.")] = 3600.0,
    json: Json = False,
) -> None:
    """Prove that a checkpoint works with transformers alone.

    In a fresh process, offline, from a moved folder, without relinear: loading, the run's logits, generation with and
    without cache, padding, saving, training, and the code of its README.md. Of a run, first compare every file with the
    run's manifest.

    verify.json then holds what was seen and the hash of every file, config.json the versions of transformers.
    """
    from ...distill.manifest import check_manifest
    from ...distill.verify import verify as work

    if (folder / RECORD).exists():
        problems = check_manifest(folder)
        if problems:
            raise RunFailed(
                f"{folder}: {len(problems)} files are not as the run wrote them: {'; '.join(problems)}. To write the "
                f"export again: relinear export {folder} --overwrite"
            )
        folder = folder / "export"
    with only_talk():
        result = work(folder, timeout, interpreters=transformers or ())
    everything = {result["transformers"]: result["checks"], **result["others"]}
    if json:
        data_json(result)
    else:
        many = len(everything) > 1
        rows = [
            (*((version,) if many else ()), name, "ok" if check["ok"] else "FAILED", check["detail"])
            for version, checks in everything.items()
            for name, check in checks.items()
        ]
        data(table(rows, (*(("transformers",) if many else ()), "check", "result", "detail")))
    checks = [(version, name, check) for version, own in everything.items() for name, check in own.items()]
    failed = [f"{name} (transformers {version})" for version, name, check in checks if not check["ok"]]
    if failed:
        raise RunFailed(f"{folder}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    talk(f"Verified with transformers {_range(result['verified'])}; written to {folder / 'verify.json'}")
    next_command(f"relinear push {folder} --repo OWNER/NAME --dry-run")


def _range(verified: dict[str, str]) -> str:
    return verified["min"] if verified["min"] == verified["max"] else f"{verified['min']} to {verified['max']}"


def card(folder: Target, license: License = None, base_model: BaseModel = None, json: Json = False) -> None:
    """Write a checkpoint's model card from what was measured.

    README.md: the Hub's metadata, how to load it, layers, what was lost, recall, limits, training, recipe, citations. A
    licence and a base model that stand there already are kept.
    """
    from ...distill.hub.publish import Wish, make_card

    folder = _export_of(folder)
    results = _results(folder)
    path = make_card(folder, results, Wish("", license=license, base_model=base_model).metadata())
    if json:
        from ...distill.hub.licence import front_matter

        metadata = front_matter(path.read_text(encoding="utf-8"))
        data_json({"card": str(path), "results": sorted(results), "metadata": metadata})
    else:
        data(str(path))
    next_command(f"relinear push {folder} --repo OWNER/NAME --dry-run")


def _results(folder: Path) -> dict[str, Any]:
    """What `relinear eval` and `relinear bench model` stored of this very checkpoint."""
    from ...distill.hub.card_results import read_results
    from ...eval.store import checkpoint_digest, results_folder

    found = read_results(results_folder(folder))
    this = checkpoint_digest(folder) if found else ""
    for suite in list(found):
        if (found[suite].get("checkpoints") or {}).get("student", this) != this:
            talk(f"Left out: {suite} was measured of other weights. Measure it again: relinear eval {folder}")
            del found[suite]
    return found


def _export_of(folder: Path) -> Path:
    return folder / "export" if (folder / RECORD).exists() else folder


def _run_of(folder: Path) -> Path | None:
    """The run that an export lies in."""
    around = (folder, *folder.absolute().parents[:2])
    return next((place for place in around if (place / RECORD).is_file()), None)


def push(
    folder: Target,
    repo: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Repository; publish.repo of the run's recipe by default.", show_default=False
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; private otherwise.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch; main by default.", show_default=False)
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            metavar="best|last|N",
            help="Push this saved step of the run, exported and verified, as revision STAGE-STEP.",
            show_default=False,
        ),
    ] = None,
    stage: Stage = None,
    steps: Annotated[bool, typer.Option("--steps", help="Push every saved step as well, each as a revision.")] = False,
    collection: Annotated[
        str | None,
        typer.Option(
            metavar="TITLE", help="Put it into this collection of yours; made if there is none.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up and what is missing.")] = False,
    json: Json = False,
) -> None:
    """Push a verified checkpoint to the Hub; private by default.

    Refused are folders that were not verified as they are now, secrets, and paths of this machine. What was cut off
    goes on where it stopped: type the same command again. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from ...distill.hub import publish as work
    from ...distill.hub.push import places_of, plan_push
    from ...distill.hub.push import push as upload

    run, folder = _run_of(folder), _export_of(folder)
    wish = work.Wish(_repo(repo, run, folder), private=not public, collection=collection, steps=steps)
    chosen = step is not None or stage is not None
    if run is None and (chosen or steps):
        raise UserError(f"{folder}: --step, --stage and --steps are for a run: relinear push RUN --repo {wish.repo}")
    plans = []
    with only_talk():
        if chosen and run is not None:
            from ...distill.export import saved_step

            plans.append(work.prepare_step(run, saved_step(run, _step(step or "best"), stage), wish, talk))
            if revision is not None:
                plans[0].revision = revision
        else:
            places = places_of(run, folder)
            plans.append(plan_push(folder, wish.repo, revision=revision or "main", private=not public, places=places))
        if steps and run is not None:
            plans += [work.prepare_step(run, commit, wish, talk) for commit in work.step_commits(run)]
    if dry_run:
        _show(plans, json)
        return
    with only_talk():
        done = [upload(plan, collection=collection, say=talk) for plan in plans]
    if json:
        data_json(done[0] | {"steps": done[1:]})
    else:
        data("\n".join(made["url"] for made in done))
    next_command(shlex.join(["relinear", "generate", done[0]["repo"], "--prompt", "Once upon a time"]))


def _repo(given: str | None, run: Path | None, folder: Path) -> str:
    if given is None and run is not None:
        from ...distill import run_folder

        given = (run_folder.read(run)["recipe"].get("publish") or {}).get("repo")
    if given is None:
        raise UserError(f"--repo: where to? Give a repository: relinear push {folder} --repo OWNER/NAME")
    return given


def _show(plans: list[Any], json: bool) -> None:
    """What a push would do; an error where it would be refused."""
    if json:
        data_json(plans[0].to_dict() | {"steps": [plan.to_dict() for plan in plans[1:]]})
    else:
        data("\n\n".join(_plan_text(plan) for plan in plans))
    problems = [problem for plan in plans for problem in plan.problems]
    if problems:
        raise UserError("this would not be pushed:\n  " + "\n  ".join(problems))
    talk("Nothing was sent. To push: the same command without --dry-run")


def _plan_text(plan: Any) -> str:
    import yaml

    rows = [(name, f"{size:,}") for name, size in plan.files]
    kind = "private" if plan.private else "public"
    told = {key: value for key, value in plan.metadata.items() if key != "model-index"}
    results = sum(
        len(result["metrics"]) for entry in plan.metadata.get("model-index") or () for result in entry["results"]
    )
    parts = [
        f"{plan.repo}, revision {plan.revision}, {kind}: {len(rows)} files, {sum(s for _, s in plan.files):,} bytes",
        table(rows, ("file", "bytes")),
        yaml.safe_dump(told, sort_keys=False, allow_unicode=True).rstrip() + f"\nmodel-index: {results} results",
    ]
    if plan.missing:
        parts.append("missing:\n" + "\n".join(f"  {line}" for line in plan.missing))
    return "\n\n".join(parts)
