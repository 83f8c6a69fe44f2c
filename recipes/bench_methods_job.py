"""One job of `bench methods`: an arm with one seed, trained, measured, and written down as a small JSON.

`python -m relinear.recipes.bench_methods_job JOB.json` is how the grid runs it in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..distill import checkpoint, files
from ..distill.align import align_step
from ..distill.errors import RunFailed
from ..distill.student import assemble, transfer
from ..distill.teacher import Teacher, load_model, load_teacher
from ..eval.branches import only
from ..eval.fidelity import measure
from ..eval.recall import recall
from . import bench_methods_arms as arms
from .bench import random_batch
from .bench_methods_arms import BEFORE, EVAL_TOKENS, EVALUATIONS, Place, Rates, Shape
from .plan import layer_map, stage_settings
from .runner import FINAL_TOKENS, run
from .schema import EMBEDDED, CalibrateStage, Recipe, TrainingStage
from .session import Silent, eval_set, open_session
from .teacher_config import locate

BRANCH_TOKENS = 50_000
"""Held-out tokens on which the two branches of a windowed student are measured alone."""

STOPPED = 75
"""Exit code of a job that was told to stop and can go on (EX_TEMPFAIL)."""


@dataclass(frozen=True)
class Job:
    """One arm with one seed.

    Attributes:
        arm: a name of `bench_methods_arms.names`.
        seed: of weights and data.
        place: teacher, text and tokens.
        rates: factors of its recipe's rates.
        kept: layer that keeps its attention, or None.
        key: of its content.
        work: folder for its runs.
        out: the JSON that it writes.
        keep_runs: leave the runs where they are.
    """

    arm: str
    seed: int
    place: Place
    rates: Rates
    kept: int | None
    key: str
    work: str
    out: str
    keep_runs: bool = False

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Job:
        """The inverse of `dataclasses.asdict`."""
        return cls(**values | {"place": Place(**values["place"]), "rates": Rates(**values["rates"])})

    @property
    def name(self) -> str:
        """As progress names it."""
        return f"{self.arm}, seed {self.seed}"


def carry_out(job: Job) -> str:
    """Run a job and write its JSON; a failure is written too.

    Returns:
        `complete`, `failed` or `stopped`. What was stopped goes on where it was at the next call.
    """
    work = Path(job.work)
    began = time.monotonic()
    try:
        found = _measured(job, work)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        found = {"status": "failed", "error": _named(error, job)}
    if found is None:
        return "stopped"
    record = {"arm": job.arm, "seed": job.seed, "teacher": job.place.name, "key": job.key, **found}
    record |= {"asked_tokens": job.place.tokens, "rates": arms.plain_rates(job.rates)}
    record |= {"wall_seconds": round(time.monotonic() - began, 1), "environment": checkpoint.environment()}
    files.write_json(job.out, files.finite(rounded(record)))
    if not job.keep_runs:
        shutil.rmtree(work, ignore_errors=True)
    return record["status"]


def _named(error: Exception, job: Job) -> str:
    """An error in one line, without this machine's folders: results are published."""
    first = (str(error).splitlines() or [""])[0]
    for path in filter(None, (job.work, job.place.teacher, job.place.text, job.place.valid)):
        first = first.replace(path, Path(path).name)
    return f"{type(error).__name__}: {first}"


def _measured(job: Job, work: Path) -> dict[str, Any] | None:
    """What came out; None where it was stopped."""
    recipes = arms.recipes(job.arm, job.place, job.seed, job.rates, job.kept, work)
    shape = arms.shape(recipes[-1])
    curve: list[dict[str, Any]] = []
    spent, seconds = 0, 0.0
    start: Path | None = None
    result: dict[str, Any] = {}
    for recipe in recipes:
        result = run(recipe, resume=True, progress=_Listening(), start=start)
        if result["status"] != "complete":
            return None
        start = Path(result["run"])
        trained = {stage.name for stage in recipe.stages if isinstance(stage, TrainingStage)}
        if arms.shape(recipe).kept == shape.kept:  # a part that converts fewer layers is another student
            curve += points(start, result, trained, spent)
        spent += sum(stage["tokens"] for stage in result["stages"] if stage["name"] in trained)
        seconds += result["seconds"]
    if result["fidelity"] is None:
        raise RunFailed("no held-out text, so nothing was measured")
    return {
        "status": "complete",
        **asdict(shape),
        "tokens": spent,
        "calibration_tokens": _calibration(recipes),
        "seconds": seconds,
        "curve": curve,
        "fidelity": result["fidelity"],
        "fidelity_of_step": result["step"],
        **_beyond(job, recipes[-1], shape, Path(result["export"])),
    }


def points(folder: Path, result: dict[str, Any], trained: set[str], before: int = 0) -> list[dict[str, Any]]:
    """A run's held-out fidelity as the training tokens grow.

    Args:
        folder: of the run.
        result: its result.json.
        trained: its training stages; what others look at trains nothing and is not counted.
        before: tokens that earlier runs of the same arm saw.

    Returns:
        {"tokens", "stage", "ratio", "ratio_stderr", "kl", "kl_stderr"} in order of tokens; the first one is the
        student before any training.
    """
    untrained = [(name, value) for name, value in result["measured"].items() if name not in trained]
    found = [_point(before, name, value) for name, value in untrained[-1:]]
    lines = [line for line in files.read_metrics(folder / "metrics.jsonl") if "eval" in line]
    for stage in [stage for stage in result["stages"] if stage["name"] in trained]:
        for line in lines:
            value = line["eval"].get("assembled", line["eval"])
            if line["stage"] == stage["name"] and value.get("kl") is not None:
                found.append(_point(before + line["tokens"], stage["name"], value))
        before += stage["tokens"]
    return found


def _point(tokens: int, stage: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "stage": stage,
        "ratio": value["perplexity_ratio"],
        "ratio_stderr": value["perplexity_ratio_stderr"],
        "kl": value["kl"],
        "kl_stderr": value["kl_stderr"],
    }


def _calibration(recipes: list[Recipe]) -> int:
    """Tokens that closed forms look at; they train nothing and are counted apart."""
    return sum(stage.tokens for recipe in recipes for stage in recipe.stages if isinstance(stage, CalibrateStage))


@torch.no_grad()
def _beyond(job: Job, recipe: Recipe, shape: Shape, export: Path) -> dict[str, Any]:
    """What text alone does not show: recall, where the teacher has it, and each branch of a windowed student alone."""
    found: dict[str, Any] = {}
    if not (job.place.teacher == EMBEDDED or shape.window):
        return found
    model, tokenizer = load_model(export)
    remembers = job.place.teacher == EMBEDDED
    if remembers:
        found["recall"] = recall(model, tokenizer, seed=1)
    if shape.window and shape.group == "window" and recipe.layers.mixer != "swa":
        teacher = load_teacher(locate(recipe.teacher.model))
        session = open_session(recipe, resume=True, max_hours=None, progress=Silent(), start=_start(recipe))
        session.close()
        found["branches"] = {}
        for branch in ("both", "window", "linear"):
            with only(model, branch):
                value = measure(model, teacher.model, eval_set(session, BRANCH_TOKENS))
                alone = {key: value[key] for key in ("perplexity_ratio", "perplexity_ratio_stderr", "kl", "kl_stderr")}
                if remembers:
                    alone["recall"] = found["recall"] if branch == "both" else recall(model, tokenizer, seed=1)
            found["branches"][branch] = alone
    return found


def _start(recipe: Recipe) -> Path | None:
    """The run that a recipe's run started from, as its folder says."""
    record = json.loads((Path(str(recipe.save.dir)) / "run.json").read_text(encoding="utf-8"))
    return None if record["start"] is None else Path(record["start"])


class _Listening(Silent):
    """Says nothing, and stops the run when the process that started it is gone: nobody would read the result."""

    def __init__(self) -> None:
        self.parent = os.getppid()

    def update(self, tokens: int, **metrics: float) -> None:
        """Look whether the parent is still there."""
        if os.getppid() != self.parent:
            os.kill(os.getpid(), signal.SIGINT)


def rounded(value: Any) -> Any:
    """Floats to seven significant digits: what is written down is read by people too."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def expected_seconds(recipes: list[Recipe], teacher: Teacher, known: dict[str, Any]) -> float:
    """How long an arm will take in one process on an idle core, from a few steps that are timed here.

    Args:
        recipes: of the arm.
        teacher: loaded.
        known: timings by student, filled here: arms often share one.
    """
    total = _FIXED
    for recipe in recipes:
        layers = layer_map(recipe, teacher.num_layers)
        trained = [stage for stage in recipe.stages if isinstance(stage, TrainingStage)]
        settings = [stage_settings(recipe, stage, teacher.context) for stage in trained]
        batch, length = settings[0]["batch"], settings[0]["seq_len"]
        student = json.dumps([sorted(layers.converted.items()), batch, length])
        if student not in known:
            known[student] = _timed(teacher, layers.converted, batch, length)
        before, after, forward = known[student]
        total += sum(stage.tokens * (before if stage.kind in BEFORE else after) for stage in trained)
        measured = EVALUATIONS * EVAL_TOKENS + min(FINAL_TOKENS, _held_out(recipe))
        total += forward * measured * sum(stage.tokens for stage in trained) / max(1, _all_tokens(recipes))
    return total


_FIXED = 12.0
"""Seconds of a job that training does not account for: starting, reading text, exporting."""


def _held_out(recipe: Recipe) -> int:
    """At most so many held-out tokens: two bytes make one at least."""
    valid = recipe.data.valid
    return Path(valid).stat().st_size // 2 if isinstance(valid, str) and Path(valid).is_file() else FINAL_TOKENS


def _all_tokens(recipes: list[Recipe]) -> int:
    return sum(stage.tokens for recipe in recipes for stage in recipe.stages if isinstance(stage, TrainingStage))


def _timed(teacher: Teacher, plan: Any, batch: int, length: int) -> tuple[float, float, float]:
    """Seconds per token of a step layer by layer, of a step end to end, and of measuring; the fastest of two."""
    given = random_batch(teacher.config.vocab_size, batch, length)
    mixers, _ = transfer(teacher, plan)
    student = assemble(teacher, mixers)
    trains = any(True for mixer in mixers.values() for _ in mixer.parameters())

    def before() -> None:
        if trains:
            align_step(teacher, mixers, given, given.tokens, "l2")

    def after() -> None:
        with torch.no_grad():
            teacher.model(input_ids=given.input_ids, use_cache=False)
        student(input_ids=given.input_ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()

    @torch.no_grad()
    def forward() -> None:
        for model in (teacher.model, student):
            model(input_ids=given.input_ids, use_cache=False)

    return _fastest(before, given.tokens), _fastest(after, given.tokens), _fastest(forward, given.tokens)


def _fastest(step: Callable[[], None], tokens: int) -> float:
    """Seconds per token of the faster of two calls, after one that warms up; of this process, whatever others do."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    return min(seconds[1:]) / tokens


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread, as the jobs run with; as it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: list[str]) -> int:
    """Run the job that a JSON file describes; the grid's way of giving each one a process of its own."""
    torch.set_num_threads(1)
    job = Job.parse(json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    status = carry_out(job)
    return STOPPED if status == "stopped" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
