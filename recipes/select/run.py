"""`relinear select`: one aligned all-linear student, several methods on it, scores files, and what they agree on."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...distill import checkpoint, files, run_folder
from ...distill.data.tokenise import Tokens
from ...distill.errors import UserError
from ...distill.hybrid import Hybrid
from ...eval import plots
from ...eval.recall import RecallCell, make_cases
from ...eval.tasks.document import Document, Writer
from ...eval.tasks.needles import needle
from ...eval.tasks.pairs import document
from .. import loader
from ..plan import layer_map, window
from ..runner import stop_signals, work
from ..schema import AlignStage, Recipe
from ..session import Progress, Session, Silent, open_session
from ..teacher_config import read_teacher_config
from . import attention, forward, report, simple
from .evaluate import KL, TOKENS, Evaluator, content_key, estimate
from .guided import glue_settings, kl_guided
from .methods import BY_PLACE, COMBINED, METHODS, check_keep, ordered, parse
from .scores import Scores, agreement

TEXT_TOKENS = 20_000
"""Held-out tokens that every choice of layers is measured on."""
GUIDED_TOKENS = 50_000
"""Training tokens for each layer of kl-guided."""
PAIRS, DISTANCES, ANSWERS = (4, 16, 64), (0, 128, 384, 640), 32
"""Key-value recall: pairs to remember, tokens of filler after them, answers for each combination."""
DEPTHS, NEEDLES = (0.0, 0.25, 0.5, 0.75, 1.0), 3
"""Needles: where they stand, in documents of a quarter, half and all of the window; documents of each kind."""
FORMAT = 1
"""Of kept results; higher where a method computes something else than before."""
FEW = 8
"""Fewer documents than this, and their windows stand for them in standard errors."""

NO_DOCUMENT = "no recall document fits this teacher's context or tokenizer"

Method = Callable[[Evaluator], Scores]


@dataclass(frozen=True)
class Settings:
    """What the command was told.

    Attributes:
        keep: layers to choose.
        by: methods in order; the first decides.
        tokens: of held-out text.
        tokens_per_layer: of kl-guided's trainings.
    """

    keep: int
    by: list[str] = field(default_factory=lambda: ["combined"])
    tokens: int = TEXT_TOKENS
    tokens_per_layer: int = GUIDED_TOKENS


def select(
    recipe: str,
    overrides: list[str] | None = None,
    *,
    keep: int,
    by: str = "combined",
    out: Path | None = None,
    run: Path | None = None,
    resume: bool = False,
    tokens: int = TEXT_TOKENS,
    tokens_per_layer: int = GUIDED_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the layers of a recipe's teacher, and write the scores that `layers.keep: {scores, top}` reads.

    Args:
        recipe: a shipped recipe's name or a YAML file; which layers it keeps is left aside.
        overrides: `key=value` as on the command line.
        keep: layers to choose.
        by: methods, comma between them; the first decides.
        out: folder of everything that is written; the recipe's run folder with `-select` behind its name by default.
        run: an aligned run of the same teacher that converts every layer as the recipe does; its mixers are taken.
        resume: the aligned run in `out` may be unfinished.
        tokens: of held-out text.
        tokens_per_layer: of kl-guided's trainings.
        progress: whom to tell.

    Returns:
        What OUT/select.json holds: `status`, `scores` (the file), `methods`, `sets`, `agreement`, …; and `table`, the
        same as text. Where it was stopped, `status` and `table` alone.

    Raises:
        UserError, MachineError, RunFailed: as the parts raise them; what was measured stays.
    """
    settings = Settings(keep, parse(by), tokens, tokens_per_layer)
    given = loader.load(recipe, overrides)
    teacher = read_teacher_config(given.teacher.model, given.teacher.revision, given.place("teacher.model"))
    check_keep(keep, teacher.num_layers)
    if "kl-guided" in settings.by:
        glue_settings(given, teacher.context, tokens_per_layer)
    folder = Path(f"{given.save.dir}-select") if out is None else out
    linear = loader.load(recipe, [*(overrides or []), *_all_linear(given, folder / "student", aligned=run is None)])
    if run is not None:
        _check_run(run, linear, teacher.num_layers)
    _check_folder(folder, linear, resume)
    with open_session(linear, resume=True, max_hours=None, progress=progress or Silent(), start=run) as session:
        if not work(session, run):
            return {"status": "stopped", "run": str(folder), "table": "stopped while aligning; go on with --resume"}
        with stop_signals() as stopped:
            made = _score(session, given, settings, folder, stopped)
    if made is None:
        return {"status": "stopped", "run": str(folder), "table": "stopped; the same command goes on from here"}
    return made


def _all_linear(recipe: Recipe, folder: Path, aligned: bool) -> list[str]:
    """Overrides that make a recipe convert every layer and end with align; without stages where mixers are taken."""
    last = max((i for i, stage in enumerate(recipe.stages) if isinstance(stage, AlignStage)), default=None)
    if last is None and aligned:
        raise UserError(
            "stages: there is no align, and layers are scored on an aligned student. Add one, - align: {}, or name a "
            "run that has one: --run RUN"
        )
    wanted = recipe.stages[: last + 1] if aligned and last is not None else recipe.stages[:1]
    stages = [{stage.kind: stage.model_dump(mode="json", exclude_defaults=True)} for stage in wanted]
    made = ["layers.convert=all", f"save.dir={folder}", f"stages={json.dumps(stages)}"]
    if recipe.layers.attention.changes() is not None:
        made.append("layers.attention={}")
    if last is not None and recipe.eval.every is None:  # nothing is decided by measuring on the way
        made.append(f"eval.every={recipe.stages[last].tokens}")  # pyright: ignore[reportAttributeAccessIssue]
    return made


def _check_run(run: Path, linear: Recipe, num_layers: int) -> None:
    """Refuse a run whose mixers are not those of the recipe."""
    other = run_folder.read(run)
    if not any(kind == "align" for _, kind in other["stages"]):
        raise UserError(f"--run {run}: has no align stage. Give a run that has one, or leave --run out to align anew")
    if other["teacher"]["source"] != linear.teacher.model:
        raise UserError(
            f"--run {run}: was made from teacher {other['teacher']['source']}, the recipe's is {linear.teacher.model}. "
            "Give a run of the same teacher"
        )
    for layer, own in layer_map(linear, num_layers).converted.items():
        found = other["layers"].get(str(layer))
        if found is None:
            raise UserError(
                f"--run {run}: keeps the attention of layer {layer}; scores need a run that converts every layer. Make "
                "one with layers.convert=all, or leave --run out"
            )
        if found != json.loads(json.dumps(list(own))):
            raise UserError(
                f"--run {run}: its layer {layer} is {found[0]} with {found[1]}, the recipe's is {own[0]} with "
                f"{own[1]}. Give the recipe of that run"
            )


def _check_folder(folder: Path, linear: Recipe, resume: bool) -> None:
    """An unfinished align is gone on with only where that is asked for."""
    align = next((stage.name for stage in reversed(linear.stages) if isinstance(stage, AlignStage)), None)
    student = folder / "student"
    if resume or align is None or not (student / run_folder.RECORD).exists():
        return
    newest = checkpoint.Checkpoints(student / "checkpoints").newest(align)
    if newest is None or not newest.complete:
        raise UserError(
            f"{student}: holds an aligned run that was not finished. Go on with --resume, or choose another folder: "
            "--out DIR"
        )


def _score(
    session: Session, recipe: Recipe, settings: Settings, folder: Path, stopped: Callable[[], bool]
) -> dict[str, Any] | None:
    """Run the methods, write down what they say; None where it was stopped."""
    began = time.monotonic()
    evaluator, notes = _evaluator(session, settings, folder)
    found: dict[str, Scores] = {}
    hears, noise = recalls(evaluator)
    for name in ordered(settings.by):
        if stopped():
            return None
        if name not in settings.by and METHODS[name].needs == "recall" and not hears:
            notes.append(f"combined: without {name}: {noise}")
            continue
        made = _method(name, evaluator, session, recipe, settings, found, stopped, folder)
        if made is None:
            return None
        if isinstance(made, str):
            if settings.by == [name]:
                raise UserError(f"--by {name}: {made}. Choose another method, e.g. --by restore-kl")
            notes.append(f"{name} is left out: {made}")
            continue
        found[name] = made
    decides = next((name for name in settings.by if name in found), "uniform")
    shown = [found[name] for name in dict.fromkeys([decides, *settings.by, *found]) if name in found]
    session.progress.stage("what was chosen")
    sets = _chosen_sets(evaluator, shown, settings.keep, hears)
    session.progress.done()
    result: dict[str, Any] = {
        "status": "complete",
        "teacher": session.recipe.teacher.model,
        "student": str(session.folder),
        "keep": settings.keep,
        "decides": decides,
        "chosen": found[decides].chosen(settings.keep),
        "scores": str(folder / "scores.json"),
        "plot": str(folder / "scores.png"),
        "methods": {scores.method: scores.to_dict(settings.keep) for scores in shown},
        "sets": sets,
        "agreement": agreement([scores for scores in shown if scores.method not in BY_PLACE], settings.keep),
        "text": {"tokens": evaluator.targets, "documents": len(evaluator.tokens), "window": evaluator.window},
        "recall_documents": len(evaluator.recall_documents),
        "notes": notes,
        "seconds": round(time.monotonic() - began, 1),
        "environment": checkpoint.environment(),
    }
    _write_scores(folder / "scores.json", result["methods"][decides], session.progress)
    drawn = [scores.method for scores in shown if scores.method not in BY_PLACE] or [decides]
    uniform = found["uniform"].chosen(settings.keep)
    plots.layer_scores([result["methods"][name] for name in drawn], folder / "scores.png", uniform)
    table = report.text(result)
    files.write_text(folder / "select.txt", table + "\n")
    files.write_json(folder / "select.json", files.finite(result))
    return result | {"table": table}


def _write_scores(path: Path, value: dict[str, Any], progress: Progress) -> None:
    """The file that recipes name; an older one that says something else is replaced, which is said."""
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if (before.get("scores"), before.get("higher_is")) != (value["scores"], value["higher_is"]):
            kept = path.with_name(f"scores-{before.get('method')}-{before.get('keep')}.json")
            files.write_json(kept, before)
            progress.note(f"{path}: held other scores ({before.get('method')}); they are now in {kept.name}")
    files.write_json(path, value)


def _evaluator(session: Session, settings: Settings, folder: Path) -> tuple[Evaluator, list[str]]:
    """What all methods measure with, and what there is to say of it."""
    notes: list[str] = []
    size = window(session.recipe.data.seq_len, session.teacher.context)[0]
    if not len(session.corpus.valid):
        raise UserError("data.valid: scores need held-out text. Give data.valid=FILE, or a share such as 0.01")
    tokens = _cut(session.corpus.valid, settings.tokens)
    if len(tokens) < FEW:
        notes.append(
            f"the held-out text has {len(tokens)} documents of its own in {settings.tokens:,} tokens; their windows "
            "stand for documents, so standard errors are rather too small"
        )
        tokens = _pieces(tokens, size)
    if len(tokens.ids) < settings.tokens // 2:
        notes.append(f"the held-out text has {len(tokens.ids):,} tokens, fewer than the {settings.tokens:,} asked for")
    try:
        documents = recall_documents(session.teacher.tokenizer, session.teacher.context)
    except ValueError as error:
        documents = []
        notes.append(f"no recall documents: {error}")
    evaluator = Evaluator(
        Hybrid(session.teacher, session.mixers),
        tokens,
        size,
        documents,
        folder / "cache",
        session.recipe.engine.precision,
        lambda what: session.progress.update(evaluator.passes * evaluator.targets),
    )
    return evaluator, notes


def recalls(evaluator: Evaluator) -> tuple[bool, str]:
    """Whether the teacher recalls more than guessing would, and otherwise a sentence."""
    if not evaluator.recall_documents:
        return False, NO_DOCUMENT
    notes, signal = forward.recall_signal(evaluator.recall(()), evaluator.recall_documents)
    return signal, " ".join(notes)


def recall_documents(tokenizer: Any, context: int) -> list[Document]:
    """Documents of key-value recall and of needles that fit a context, the same for every teacher of one tokenizer."""
    cells = [RecallCell(pairs, distance) for pairs in PAIRS for distance in DISTANCES]
    pairs = [document(case) for case in make_cases(tokenizer, cells, ANSWERS)]
    writer = Writer(tokenizer)
    made = [one for one in pairs if len(one.ids) <= context]
    for length in (context // 4, context // 2, context):
        for depth in DEPTHS:
            for number in range(NEEDLES):
                try:
                    made.append(needle(writer, random.Random(f"select {length} {depth} {number}"), length, depth))
                except ValueError:  # no room for the needle
                    continue
    return sorted(made, key=lambda one: len(one.ids))


def _cut(tokens: Tokens, limit: int) -> Tokens:
    """The first `limit` tokens, the last document cut where they end."""
    head = tokens.head(limit)
    return head.pieces(head.offsets[:-1], np.minimum(head.offsets[1:], limit))


def _pieces(tokens: Tokens, size: int) -> Tokens:
    """Windows of `size` tokens as documents."""
    spans = [
        (start, min(start + size, int(stop)))
        for first, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
        for start in range(int(first), int(stop), size)
    ]
    return tokens.pieces(*(np.array(ends, np.int64) for ends in zip(*spans, strict=True)))


def _method(
    name: str,
    evaluator: Evaluator,
    session: Session,
    recipe: Recipe,
    settings: Settings,
    found: dict[str, Scores],
    stopped: Callable[[], bool],
    folder: Path,
) -> Scores | str | None:
    """One method's scores, from its file where it is there; a sentence why it cannot run; None where it was stopped."""
    if name in BY_PLACE:
        made = simple.by_place(name, len(evaluator.layers), settings.keep)
        return _written(folder, made, settings.keep)
    if name == "combined":
        return _written(folder, _combined(found), settings.keep)
    if METHODS[name].needs == "recall" and not evaluator.recall_documents:
        return NO_DOCUMENT
    extra = {"greedy-kl": settings.keep, "kl-guided": settings.tokens_per_layer}.get(name)
    key = content_key(name, extra, evaluator.student_key, evaluator.text_key, evaluator.recall_key, FORMAT)
    path = folder / "cache" / f"{name}-{key}.json"
    if path.exists():
        return _written(folder, Scores.from_dict(json.loads(path.read_text(encoding="utf-8"))), settings.keep)
    began, spent, passes = time.monotonic(), time.process_time(), evaluator.passes
    session.progress.stage(name)
    scored = _run(name, evaluator, session, recipe, settings, stopped)
    session.progress.done()
    if scored is None:
        return None
    scored.seconds, scored.cpu_seconds = time.monotonic() - began, time.process_time() - spent
    scored.passes = evaluator.passes - passes
    files.write_json(path, scored.to_dict(settings.keep))
    return _written(folder, scored, settings.keep)


def _run(
    name: str,
    evaluator: Evaluator,
    session: Session,
    recipe: Recipe,
    settings: Settings,
    stopped: Callable[[], bool],
) -> Scores | None:
    if name == "greedy-kl":
        return forward.greedy_kl(evaluator, settings.keep)
    if name == "kl-guided":
        return kl_guided(evaluator, recipe, session, settings.tokens_per_layer, stopped)
    simple_ones: dict[str, Method] = {
        **forward.METHODS,
        "lazy": attention.lazy,
        "retrieval-heads": attention.retrieval_heads,
    }
    return simple_ones[name](evaluator)


def _combined(found: dict[str, Scores]) -> Scores:
    """The mean rank over what carries signal."""
    asked = [found[name] for name in COMBINED if name in found]
    silent = [f"without {scores.method}, which says nothing here" for scores in asked if not scores.signal]
    return simple.combined([scores for scores in asked if scores.signal], silent)


def _written(folder: Path, scores: Scores, keep: int) -> Scores:
    """A scores file for every method, beside the one of the method that decides."""
    files.write_json(folder / "methods" / f"{scores.method}.json", scores.to_dict(keep))
    return scores


def _chosen_sets(evaluator: Evaluator, shown: list[Scores], keep: int, hears: bool) -> list[dict[str, Any]]:
    """Every set that a method chose, with what the aligned student makes of it, against uniform's."""
    sets: dict[tuple[int, ...], list[str]] = {}
    for scores in shown:
        sets.setdefault(tuple(scores.chosen(keep)), []).append(scores.method)
    everything = set(evaluator.layers)
    uniform = next(layers for layers, names in sets.items() if "uniform" in names)
    reference = evaluator.text(everything - set(uniform))
    rows = []
    for layers, names in sets.items():
        sums = evaluator.text(everything - set(layers))
        kl, error = estimate(sums[:, KL], sums[:, TOKENS])
        gap, gap_error = estimate(sums[:, KL] - reference[:, KL], sums[:, TOKENS])
        row = {"methods": names, "layers": list(layers), "kl": kl, "kl_stderr": error}
        row |= {"against_uniform": gap, "against_uniform_stderr": gap_error}
        if hears and any(METHODS[scores.method].needs == "recall" for scores in shown):
            right = evaluator.recall(everything - set(layers))
            value, spread = estimate(right[:, 0], right[:, 1])
            row |= {"recall": value, "recall_stderr": spread}
        rows.append(row)
    return sorted(rows, key=lambda row: row["kl"])
