"""What was lost: fidelity on held-out text, recall, benchmarks, perplexity by position, generated text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...eval import recall_table, run_plots
from ...eval.heatmaps import heatmap
from ...eval.position_plots import perplexity_by_position
from ...eval.tables import count_name, time_name
from . import words
from .blocks import Block, Gallery, Missing, Notice, Picture, Table, Text
from .made import run_again
from .read import Run

MODELS = ("teacher", "student")


@dataclass(frozen=True)
class Fidelity:
    """One measurement against the teacher.

    Attributes:
        when: of which state of the model, in words.
        source: the file that it stands in.
        values: as `eval.fidelity.measure` returns them.
    """

    when: str
    source: str
    values: dict[str, Any]


def fidelities(run: Run) -> list[Fidelity]:
    """Every measurement on held-out text, in the order of the work; that of the run's end comes last.

    A run stores what it measured at its end as the suite quick, too: that is one measurement.
    """
    found = []
    for name, kind, _ in run.stages:
        if "kl" in (run.measured.get(name) or {}):
            found.append(Fidelity(f"after {name}", f"measured/{name}.json", run.measured[name]))
        if kind in ("glue", "extend"):
            found += [
                Fidelity(f"{name} at {count_name(record['tokens'])} tokens", "metrics.jsonl", record["eval"])
                for record in run.evaluations(name)
                if "perplexity_ratio" in record["eval"]
            ]
    quick, own = run.suites.get("quick"), (run.result or {}).get("fidelity")
    own = own if own and "kl" in own else None  # eval.against: text
    same = quick and own and all(quick.get(key) == own[key] for key in ("perplexity_ratio", "kl", "tokens"))
    if quick and "perplexity_ratio" in quick and not same:
        found.append(Fidelity("exported, suite quick", "eval/quick.json", quick))
    if own:
        found.append(Fidelity("exported, at the run's end", "result.json", own))
    return found


def newest(run: Run) -> Fidelity | None:
    """What the verdict quotes: the run's own last measurement."""
    found = fidelities(run)
    return found[-1] if found else None


def fidelity(run: Run) -> Iterator[Block]:
    """Perplexity, KL and agreement after every stage and at the end."""
    found = fidelities(run)
    if found:
        yield Table(
            "Student against teacher on held-out text, ± standard error clustered by document",
            ["", "perplexity", "teacher's", "ratio", "KL (nats/token)", "same top token", "tokens", "in"],
            [_fidelity(one) for one in found],
            words=(0, 7),
        )
    elif run.result is None:
        yield Missing("Nothing was measured on held-out text yet.", run_again(run))
    elif run.result.get("fidelity"):
        alone = run.result["fidelity"]["student"]["perplexity"]
        yield Missing(f"The recipe compares with the text alone (eval.against): held-out perplexity {alone:.3f}.")
    else:
        yield Missing("Nothing was measured on held-out text: the recipe holds none out (data.valid).")
    if "quick" not in run.suites:
        yield _absent(run, "quick", "The exported folder itself was not measured on held-out text.")
    else:
        yield _settings(run.suites["quick"])


def _fidelity(one: Fidelity) -> list[str]:
    values, student, teacher = one.values, one.values["student"], one.values["teacher"]
    return [
        one.when,
        words.estimate(student["perplexity"], student.get("perplexity_stderr"), 3),
        words.estimate(teacher["perplexity"], teacher.get("perplexity_stderr"), 3),
        words.estimate(values["perplexity_ratio"], values.get("perplexity_ratio_stderr")),
        words.estimate(values["kl"], values.get("kl_stderr")),
        words.percent(values["top1_agreement"], values.get("top1_agreement_stderr")),
        words.whole(values.get("tokens")),
        one.source,
    ]


def recall_result(run: Run) -> dict[str, Any] | None:
    """The recall suite's result: of `relinear eval`, or else of the run's own end."""
    found = run.suites.get("recall") or (run.result or {}).get("recall")
    return found if found and all("teacher" in task["models"] for task in found["tasks"].values()) else None


@dataclass(frozen=True)
class Recovered:
    """Exact answers over the tasks that the teacher can do.

    Attributes:
        student, teacher: mean shares from 0 to 1.
        ratio, stderr: student's over teacher's; its error takes both as independent.
        tasks: so many.
    """

    student: float
    teacher: float
    ratio: float
    stderr: float
    tasks: int


def recovered(run: Run) -> Recovered | None:
    """Recall of the student as a share of the teacher's; None where it was not measured, or the teacher has none."""
    result = recall_result(run) or {"tasks": {}}
    pairs = [
        (task["models"]["student"], task["models"]["teacher"])
        for task in result["tasks"].values()
        if "exact" in task["signal"] and {"student", "teacher"} <= task["models"].keys()
    ]
    if not pairs:
        return None
    number = len(pairs)
    student, teacher = (sum(pair[side]["exact"] for pair in pairs) / number for side in (0, 1))
    if not teacher:
        return None
    errors = [math.sqrt(sum(pair[side]["exact_stderr"] ** 2 for pair in pairs)) / number for side in (0, 1)]
    ratio = student / teacher
    return Recovered(student, teacher, ratio, math.hypot(errors[0], ratio * errors[1]) / teacher, number)


def recall(run: Run) -> Iterator[Block]:
    """The recall suite's table and heat-maps."""
    result = recall_result(run)
    if result is None:
        yield _absent(run, "recall", "Recall was not measured: facts found again, which linear mixers lose first.")
        return
    share = recovered(run)
    if share is not None:
        yield Text(
            f"The student answers {words.percent(share.student)} exactly, the teacher {words.percent(share.teacher)} "
            f"(mean over the {share.tasks} tasks in which the teacher is above chance): "
            f"{words.percent(share.ratio, share.stderr)} recovered."
        )
    header, rows = recall_table.table(result)
    yield Table("Answers right, in percent ± standard error", header, rows, words=(0, 1, len(header) - 1))
    yield Gallery(
        [
            Picture(
                f"recall-{name}.png",
                partial(heatmap, name, task),
                f"Heat-map of {name}: exact answers over {' and '.join(task['axes'])}, of {', '.join(task['models'])}",
                scale=True,
            )
            for name, task in result["tasks"].items()
        ]
    )
    yield _settings(result)


def core(run: Run) -> Iterator[Block]:
    """Benchmark tasks: teacher, student, and how much of the teacher's score the student keeps."""
    result = run.suites.get("core")
    if result is None:
        yield _absent(run, "core", "Benchmark tasks were not measured.")
        return
    tasks: dict[str, Any] = result["tasks"]
    rows = [_task(name, task) for name, task in tasks.items()]
    if result.get("mean"):
        rows.append(_task("mean", result["mean"]))
    if result.get("limit") is not None:
        yield Notice(
            f"Only the first {result['limit']} documents of each task were read: not comparable with whole tasks."
        )
    yield Table(
        "Benchmark tasks; recovery: the student's score as a share of the teacher's, also of what lies above guessing",
        ["task", "metric", "documents", "guessing", *MODELS, "recovery", "above guessing"],
        rows,
        words=(0, 1),
    )
    shares = {name: task for name, task in tasks.items() if _is_share(task)}
    if shares:
        yield Picture(
            "core.png",
            partial(run_plots.task_bars, shares),
            f"Scores of teacher and student on {', '.join(shares)}",
            "Bars: score ± standard error; line: what guessing gives.",
        )
    yield _settings(result)


def _is_share(task: dict[str, Any]) -> bool:
    values = [task[model]["value"] for model in MODELS if task.get(model)]
    return bool(task.get("higher_is_better", True)) and all(0 <= value <= 1 for value in values)


def _task(name: str, task: dict[str, Any]) -> list[str]:
    share = _is_share(task)
    metric = str(task.get("metric") or "") + ("" if task.get("higher_is_better", True) else " (less is better)")
    return [
        name,
        metric,
        words.whole(task.get("n")),
        words.percent(task.get("chance")),
        *(words.of(task.get(model), as_percent=share, digits=None if share else 3) for model in MODELS),
        words.of(task.get("recovery"), as_percent=True),
        words.of(task.get("recovery_above_chance"), as_percent=True),
    ]


def position(run: Run) -> Iterator[Block]:
    """Perplexity over the position in the text."""
    result = run.suites.get("long")
    if result is None:
        yield _absent(run, "long", "Perplexity by position in long text was not measured.")
        return
    places: list[dict[str, Any]] = result["positions"]
    yield Picture(
        "position.png",
        partial(perplexity_by_position, result),
        f"Perplexity, KL and agreement by position, up to {places[-1]['to']:,} tokens",
        "Where a model uses its whole context, perplexity falls to the right. Grey: beyond the teacher's context.",
    )
    header = ["positions", "tokens", "perplexity", "teacher's", "KL (nats/token)", "same top token"]
    yield Table("Perplexity by position in the text", header, [_position(place) for place in places])
    yield _settings(result)


def _position(place: dict[str, Any]) -> list[str]:
    perplexities = [place.get(model) or {} for model in ("student", "teacher")]
    return [
        f"{place['from']:,} to {place['to']:,}",
        words.whole(place.get("tokens")),
        *(words.estimate(one.get("perplexity"), one.get("perplexity_stderr"), 3) for one in perplexities),
        words.estimate(place.get("kl"), place.get("kl_stderr")),
        words.percent(place.get("top1_agreement"), place.get("top1_agreement_stderr")),
    ]


def generation(run: Run) -> Iterator[Block]:
    """What it writes: tasks whose answers are generated, agreement with the teacher, repetition, a judge's scores."""
    result = run.suites.get("generation")
    if result is None:
        yield _absent(run, "generation", "Generated text was not measured.")
    else:
        yield from _generation(result)
    judged = run.suites.get("mt_bench")
    if judged is None:
        yield _absent(run, "mt_bench", "No judge has read its answers (MT-Bench).")
        return
    every = {"all": judged, **(judged.get("categories") or {})}
    rows = [
        [
            name,
            *(words.estimate((one.get(m) or {}).get("score"), (one.get(m) or {}).get("stderr"), 2) for m in MODELS),
            *(words.whole((one.get(m) or {}).get("n")) for m in MODELS),
        ]
        for name, one in every.items()
    ]
    header = ["", *MODELS, *(f"marks, {model}" for model in MODELS)]
    yield Table(f"MT-Bench, judged by {judged.get('judge') or 'nobody yet'}", header, rows)
    yield _settings(judged)


def _generation(result: dict[str, Any]) -> Iterator[Block]:
    tasks = result.get("tasks") or {}
    if tasks:
        rows = [
            [
                name,
                str(task.get("metric", "")),
                words.whole(task.get("n")),
                *(words.of(task.get(m), True) for m in MODELS),
            ]
            for name, task in tasks.items()
        ]
        yield Table("Tasks whose answers are generated", ["task", "metric", "documents", *MODELS], rows, words=(0, 1))
    completion = result.get("completion")
    if completion:
        rows = [
            ["same from the start (tokens)", words.of(completion.get("common_prefix"), digits=1)],
            ["same token at the same place", words.of(completion.get("agreement"), as_percent=True)],
            ["wholly the same", words.of(completion.get("identical"), as_percent=True)],
        ]
        number, length = completion.get("n"), f"{completion.get('new_tokens'):g}"
        yield Table(f"Greedy continuations beside the teacher's: {number} of {length} tokens", ["", "student"], rows)
    repetition = result.get("repetition")
    if repetition:
        models = [model for model in (*MODELS, "text") if repetition.get(model)]
        rows = [
            [label, *(words.percent(repetition[m].get(key), repetition[m].get(f"{key}_stderr")) for m in models)]
            for key, label in REPETITION.items()
        ]
        yield Table(
            "Repetition in generated text; “text” is what the document itself goes on with", ["", *models], rows
        )
    examples = result.get("examples") or []
    if examples:
        header = [key for key in ("prompt", "text", *MODELS) if any(one.get(key) is not None for one in examples)]
        rows = [[str(one.get(key) or "") for key in header] for one in examples]
        title = "Examples of continuations"
        yield Table(title, header, rows, words=range(len(header)), folded=f"{title} ({len(rows)})")
    yield _settings(result)


REPETITION = {
    "distinct_1": "different tokens",
    "distinct_2": "different pairs",
    "distinct_4": "different runs of four",
    "loops": "texts that end in a loop",
}


def _settings(result: dict[str, Any]) -> Text:
    """How a suite was run."""
    given = result.get("settings") or {
        key: result[key] for key in ("lengths", "samples", "seed", "filler") if result.get(key) is not None
    }
    said = [f"{key} {words.plain(value)}" for key, value in given.items() if value is not None]
    said += [str(note) for note in result.get("notes") or []]
    if result.get("seconds"):
        said.append(f"took {time_name(result['seconds'])}")
    return Text("Measured with: " + "; ".join(said) + "." if said else "Measured by relinear eval.")


def _absent(run: Run, suite: str, text: str) -> Missing:
    """What to type for a suite that was not run."""
    if run.result is None:
        return Missing(f"{text} That needs the exported model, which a run leaves at its end.", run_again(run))
    return Missing(text, eval_command(run, suite))


def eval_command(run: Run, suite: str) -> str:
    """`relinear eval` for one suite of this run's export, with the settings that its stored result had.

    Teacher and held-out text are the run's own.
    """
    given = (run.suites.get(suite) or {}).get("settings") or {}
    options = []
    for name in (*OPTIONS, *FLAGS):
        value = given.get(name)
        if value is not None and value is not False:
            options.append(f"--{name.replace('_', '-')}")
            options += [] if name in FLAGS else [",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(["relinear", "eval", str(run.folder / "export"), "--suite", suite, *options])


OPTIONS = (
    *("tasks", "lengths", "samples", "seed", "filler", "max_tokens", "seq_len", "limit", "num_fewshot", "data"),
    *("task_dir", "batch", "max_new_tokens", "questions", "endpoint", "judge"),
)
FLAGS = ("generate", "chat", "allow_code")
"""Settings of a stored result that `relinear eval` takes by the same names."""
