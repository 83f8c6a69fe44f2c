"""`bench methods`: a grid of arms and seeds on one teacher, as a resumable set of jobs. Torch-free until it works.

OUT/TEACHER-ARM-sSEED.json       what one job found; small
OUT/tune/TEACHER-ARM-N.json      what one trial of --tune found
OUT/tuned.json                   the rates that won
OUT/kept.json                    the layers that hybrid arms keep (see bench_methods_kept)

A job's key is a hash of its content (recipes, teacher's weights, text); a result with another key is made again. Run
folders lie in WORK/KEY until their job is written down, so that a job that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distill import files
from ..distill.errors import RunFailed
from ..distill.files import write_json
from . import bench_methods_arms as arms
from .bench_methods_arms import Place, Rates, chosen
from .bench_methods_kept import choose, layer_of
from .units import format_count

if TYPE_CHECKING:
    from .bench_methods_job import Job

__all__ = ["Grid", "Place", "Rates", "chosen", "read", "results", "run_grid", "tune"]

Say = Callable[[str], None]
TUNE_SEED = 1000
"""Seed of every trial; no arm is measured with it."""

FACTORS = (1 / 3, 1.0, 3.0)
"""Of the rates before and after, every pair of them. An arm with one kind of stage gets `LONE_FACTORS`."""

LONE_FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
BATCHES = (1, 4)
"""Tried with the best rates, beside the recipe's own batch."""

NEVER_TUNED = ("radlads_published",)


@dataclass(frozen=True)
class Grid:
    """What is to be run.

    Attributes:
        place: teacher, text and tokens.
        arms: names of arms.
        seeds: how many.
        out: folder for results.
        work: folder for runs under way.
        jobs: processes at a time.
        keep_runs: leave finished runs in `work`.
    """

    place: Place
    arms: tuple[str, ...]
    seeds: int
    out: Path
    work: Path
    jobs: int = 1
    keep_runs: bool = False


def run_grid(grid: Grid, say: Say) -> dict[str, int]:
    """Run every job of the grid whose result is not there yet.

    Returns:
        How many results are `complete`, `failed` and `missing` (stopped before their end).

    Raises:
        UserError: as the recipes raise it, before any work.
        KeyboardInterrupt: stopped; the same call goes on.
    """
    choose_kept(grid, say)
    rates = {arm: tuned_rates(grid, arm, say) for arm in grid.arms}
    wanted = [job_of(grid, arm, seed, rates[arm]) for seed in range(grid.seeds) for arm in grid.arms]
    run_jobs(wanted, grid, say)
    status = [read(Path(job.out)).get("status") if _is_current(job) else None for job in wanted]
    return {
        "complete": status.count("complete"),
        "failed": status.count("failed"),
        "missing": status.count(None),
    }


def choose_kept(grid: Grid, say: Say) -> None:
    """The layers that the grid's hybrid arms keep, where they are not chosen yet."""
    from .bench_methods_job import single_thread

    held = read(grid.out / "kept.json")
    with single_thread():
        for arm in grid.arms:
            choose(arm, grid.place, held, grid.out, grid.work, say)


def job_of(grid: Grid, arm: str, seed: int, rates: Rates, out: Path | None = None, kept: int | None = None) -> Job:
    """The job of an arm with one seed; its key says what its result depends on."""
    from .bench_methods_job import Job

    kept = layer_of(arm, grid.place, read(grid.out / "kept.json")) if kept is None else kept
    recipes = arms.recipes(arm, grid.place, seed, rates, kept, grid.work)
    key = arms.content_key(recipes, grid.place.teacher)
    out = out or grid.out / f"{grid.place.name}-{arm}-s{seed}.json"
    return Job(arm, seed, grid.place, rates, kept, key, str(grid.work / key), str(out), grid.keep_runs)


def run_jobs(wanted: list[Job], grid: Grid, say: Say) -> None:
    """Run those that have no result with their key; the others' results stand. A failed one is tried again."""
    left = [job for job in wanted if not (_is_current(job) and read(Path(job.out))["status"] == "complete")]
    if len(left) < len(wanted):
        say(f"{len(wanted) - len(left)} of {len(wanted)} results are there already, in {grid.out}")
    if not left:
        return
    expected = estimate(left, grid, say)
    say(
        f"{len(left)} jobs of {format_count(grid.place.tokens)} tokens each, {grid.jobs} at a time: about "
        f"{_hours(sum(expected.values()) / grid.jobs)} on idle cores. Ctrl-C stops; the same command goes on"
    )
    clock = _Clock(left, expected, grid.jobs, say)
    _in_process(left, clock) if grid.jobs == 1 else _in_processes(left, grid, clock)


def estimate(left: list[Job], grid: Grid, say: Say) -> dict[str, float]:
    """Expected seconds of each job by arm: a few steps of each arm's student are timed here."""
    from ..distill.teacher import load_teacher
    from .bench_methods_job import expected_seconds, single_thread
    from .teacher_config import locate

    say("timing a few steps of every arm")
    with single_thread():
        teacher = load_teacher(locate(grid.place.teacher))
        known: dict[str, Any] = {}
        found: dict[str, float] = {}
        for job in left:
            if job.arm not in found:
                recipes = arms.recipes(job.arm, job.place, job.seed, job.rates, job.kept, Path(job.work))
                found[job.arm] = expected_seconds(recipes, teacher, known)
    return {job.key: found[job.arm] for job in left}


class _Clock:
    """Says what ended and how long the rest will take, by how the estimate fared so far."""

    def __init__(self, left: list[Job], expected: dict[str, float], jobs: int, say: Say) -> None:
        self.left = {job.key: job for job in left}
        self.expected, self.jobs, self.say = expected, jobs, say
        self.total, self.began = len(left), time.monotonic()
        self.spent = self.thought = 0.0

    def ended(self, job: Job, seconds: float, status: str) -> None:
        """A job ended; `status` as in its result."""
        self.left.pop(job.key, None)
        self.spent += seconds
        self.thought += self.expected[job.key]
        rest = sum(self.expected[key] for key in self.left) * self.spent / self.thought / self.jobs
        number = self.total - len(self.left)
        self.say(f"[{number}/{self.total}] {job.name}: {_found(job, status)}, {_hours(seconds)}; {_hours(rest)} left")


def _found(job: Job, status: str) -> str:
    """What a job's result says, in a few words."""
    result = read(Path(job.out))
    if status == "complete":
        fidelity = result["fidelity"]
        return f"{fidelity['perplexity_ratio']:.3f} × the teacher's perplexity, KL {fidelity['kl']:.4f}"
    return f"{status}: {result['error']}" if status == "failed" and "error" in result else status


def _in_process(left: list[Job], clock: _Clock) -> None:
    from .bench_methods_job import carry_out, single_thread

    with single_thread():
        for job in left:
            began = time.monotonic()
            status = carry_out(job)
            if status == "stopped":
                raise KeyboardInterrupt
            clock.ended(job, time.monotonic() - began, status)


def _in_processes(left: list[Job], grid: Grid, clock: _Clock) -> None:
    """Several at a time, each in a process of its own: what one does to memory or threads ends with it."""
    waiting = list(left)
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    with _terminated_as_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < grid.jobs:
                    job = waiting.pop(0)
                    running[_started(job)] = job, time.monotonic()
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    job, began = running.pop(process)
                    clock.ended(job, time.monotonic() - began, _ended(job, process.returncode))
        except KeyboardInterrupt:
            clock.say("stopping: what runs is saved")
            for process in running:
                process.send_signal(signal.SIGINT)
            for process in running:
                process.wait()
            raise


def _started(job: Job) -> subprocess.Popen[bytes]:
    work = Path(job.work)
    work.parent.mkdir(parents=True, exist_ok=True)
    described = work.with_name(f"{work.name}.json")
    write_json(described, asdict(job))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A session of its own: Ctrl-C reaches this process, which tells its jobs once.
    with work.with_name(f"{work.name}.log").open("wb") as log:
        command = [sys.executable, "-m", f"{__package__}.bench_methods_job", str(described)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _ended(job: Job, code: int) -> str:
    """What became of a job's process."""
    work = Path(job.work)
    log = work.with_name(f"{work.name}.log")
    if code == 0 and _is_current(job):
        for path in (log, work.with_name(f"{work.name}.json")):
            path.unlink(missing_ok=True)
        return read(Path(job.out))["status"]
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if log.exists() else []
    reason = f"its process ended with {code}" + (f" ({last[0]})" if last else "")
    record = {"arm": job.arm, "seed": job.seed, "teacher": job.place.name, "key": job.key}
    write_json(job.out, record | {"status": "failed", "error": reason})
    return "failed"


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does."""

    def handle(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not in the main thread: nothing to listen to
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tune(grid: Grid, say: Say) -> dict[str, Any]:
    """Look for the rates and the batch of every arm, each with the same grid, on one seed, at the grid's tokens.

    First every pair of factors of the rates before and after, then other batches with the best pair; lowest KL wins.

    Returns:
        By arm: the winner and all trials; also written to OUT/tuned.json.
    """
    choose_kept(grid, say)
    arms_left = [arm for arm in grid.arms if arm not in NEVER_TUNED]
    first = {arm: _pairs(grid, arm) for arm in arms_left}
    trials = {arm: [_trial(grid, arm, rates) for rates in first[arm]] for arm in arms_left}
    run_jobs([job for jobs in trials.values() for job in jobs], grid, say)
    for arm in arms_left:
        best = _best(trials[arm])
        if best is not None:
            trials[arm] += [_trial(grid, arm, Rates(best.before, best.after, batch)) for batch in BATCHES]
    run_jobs([job for jobs in trials.values() for job in jobs], grid, say)
    path = grid.out / "tuned.json"
    held = read(path)
    for arm in arms_left:
        won = _best(trials[arm])
        if won is None:
            say(f"{arm}: no trial ended well; its recipe's own rates stay")
            continue
        lines = [{"rates": arms.plain_rates(job.rates), **_outcome(job)} for job in trials[arm]]
        edge = won.before in _ends(job.rates.before for job in trials[arm]) or won.after in _ends(
            job.rates.after for job in trials[arm]
        )
        held.setdefault(grid.place.name, {})[arm] = {
            "key": _tune_key(grid, arm),
            "rates": arms.plain_rates(won),
            "at_the_edge": edge,
            "tokens": grid.place.tokens,
            "seed": TUNE_SEED,
            "trials": lines,
        }
        say(f"{arm}: {arms.plain_rates(won)}" + (", at the edge of the grid" if edge else ""))
    write_json(path, held)
    return held.get(grid.place.name, {})


def tuned_rates(grid: Grid, arm: str, say: Say) -> Rates:
    """The rates that won for this arm's recipe on this teacher and text; the recipe's own where none did."""
    found = read(grid.out / "tuned.json").get(grid.place.name, {}).get(arm)
    if found is None or arm in NEVER_TUNED:
        return Rates()
    if found["key"] != _tune_key(grid, arm):
        say(f"{arm}: was tuned with another recipe, teacher or text; its recipe's own rates are taken. Again: --tune")
        return Rates()
    return Rates(**found["rates"])


def _pairs(grid: Grid, arm: str) -> list[Rates]:
    """Factors to be tried."""
    kinds = {stage.kind for recipe in _plain_recipes(grid, arm) for stage in recipe.stages}
    both = bool(kinds & set(arms.BEFORE)) and bool(kinds & set(arms.AFTER))
    if both:
        return [Rates(before, after) for before in FACTORS for after in FACTORS]
    return [Rates(factor, factor) for factor in LONE_FACTORS]


def _trial(grid: Grid, arm: str, rates: Rates) -> Job:
    words = f"{rates.before:.3g}-{rates.after:.3g}-{rates.batch or 'own'}"
    return job_of(grid, arm, TUNE_SEED, rates, grid.out / "tune" / f"{grid.place.name}-{arm}-{words}.json")


def _plain_recipes(grid: Grid, arm: str) -> list[Any]:
    """An arm's recipes as they are tuned: with a layer kept by its recipe, at a budget of its own."""
    place = Place(grid.place.teacher, grid.place.text, grid.place.valid, 600_000)
    return arms.recipes(arm, place, TUNE_SEED, Rates(), None, grid.work)


def _tune_key(grid: Grid, arm: str) -> str:
    """Of recipe, teacher and text; what was found at one budget serves others."""
    return arms.content_key(_plain_recipes(grid, arm), grid.place.teacher)


def _best(trials: list[Job]) -> Rates | None:
    """Rates of the trial that ended with the lowest KL."""
    ended = [(job, read(Path(job.out))) for job in trials if _is_current(job)]
    found = [(result["fidelity"]["kl"], job.rates) for job, result in ended if result["status"] == "complete"]
    return min(found, key=lambda item: item[0])[1] if found else None


def _outcome(job: Job) -> dict[str, Any]:
    result = read(Path(job.out))
    if result.get("status") != "complete":
        return {"kl": None, "error": result.get("error")}
    return {"kl": result["fidelity"]["kl"], "ratio": result["fidelity"]["perplexity_ratio"]}


def _ends(values: Any) -> set[float]:
    found = sorted(set(values))
    return {found[0], found[-1]} if len(found) > 1 else set()


def _is_current(job: Job) -> bool:
    return read(Path(job.out)).get("key") == job.key


def read(path: Path) -> dict[str, Any]:
    """A JSON file, {} where there is none.

    Raises:
        RunFailed: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise RunFailed(f"{path}: not JSON ({error}). Remove it; its job is then run again") from None


def results(folder: Path) -> list[dict[str, Any]]:
    """Every result of a folder, in order of teacher, arm and seed."""
    found = [read(path) for path in sorted(folder.glob("*-s*.json")) if not files.is_temporary(path)]
    order = {arm: number for number, arm in enumerate(arms.names())}
    kept = [entry for entry in found if entry.get("arm") in order]
    return sorted(kept, key=lambda entry: (entry["teacher"], order[entry["arm"]], entry["seed"]))


def _hours(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
