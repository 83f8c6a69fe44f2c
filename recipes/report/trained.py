"""How it trained: errors of every layer over align, losses and rates, what each stage took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...eval import run_plots
from ...eval.tables import bytes_name, count_name, time_name
from . import words
from .blocks import Block, Missing, Picture, Table, Text
from .made import run_again
from .read import Run

PER_LAYER = ("matrix", "align")
TRAINING = (*PER_LAYER, "glue", "extend")


@dataclass(frozen=True)
class Spent:
    """What a stage took so far.

    Attributes:
        name, kind: of the stage.
        asked: tokens in the recipe.
        tokens: done; of a training stage input tokens, of calibrate those that it looked at.
        steps: done.
        seconds: of its steps; evaluations and saves are not counted.
        complete: it has ended.
    """

    name: str
    kind: str
    asked: int
    tokens: int
    steps: int
    seconds: float | None
    complete: bool

    @property
    def trains(self) -> bool:
        """It takes gradient steps."""
        return self.kind in TRAINING


def spent(run: Run) -> list[Spent]:
    """What every stage with tokens took, in order; from result.json where the run has ended, else from the metrics."""
    ended = {stage["name"]: stage for stage in (run.result or {}).get("stages", [])}
    # A stage has ended where its model was measured afterwards, or a later one has begun.
    begun = [place for place, (name, _, _) in enumerate(run.stages) if run.steps(name) or name in run.measured]
    found = []
    for place, (name, kind, settings) in enumerate(run.stages):
        asked = settings.get("tokens") or 0
        if kind not in (*TRAINING, "calibrate"):
            continue
        if name in ended:
            stage = ended[name]
            found.append(Spent(name, kind, asked, stage["tokens"], stage["steps"], stage["seconds"], True))
            continue
        steps = run.steps(name)
        last = steps[-1] if steps else {"tokens": 0, "step": 0}
        complete = run.result is not None or name in run.measured or any(other > place for other in begun)
        complete = complete or (bool(steps) and last["tokens"] >= asked)
        if kind == "calibrate" and run.calibrate.get(name):
            report = run.calibrate[name]
            last = {"tokens": report.get("tokens", 0), "step": len(report.get("layers", {}))}
        found.append(Spent(name, kind, asked, last["tokens"], last["step"], _seconds(steps), complete))
    return found


def _seconds(steps: list[dict[str, Any]]) -> float | None:
    """Seconds of logged steps: each record has the rate since the one before."""
    total, before = 0.0, 0
    for step in steps:
        if step["tokens_per_second"]:
            total += (step["tokens"] - before) / step["tokens_per_second"]
        before = step["tokens"]
    return total if steps else None


def align(run: Run) -> Iterator[Block]:
    """The error of every layer over each stage that trains layers for themselves."""
    stages = [(name, kind) for name, kind, _ in run.stages if kind in PER_LAYER]
    if not stages:
        taken = run.record.get("start")
        why = f"The mixers came aligned from {taken}." if taken else "The recipe has no align stage."
        yield Missing(why, f"relinear report {taken}" if taken else None)
    for name, kind in stages:
        steps = run.steps(name)
        if not steps:
            yield Missing(f"{name} has not begun.", run_again(run))
            continue
        target = "the attention's matrix" if kind == "matrix" else "the teacher's layer output"
        yield Picture(
            f"{name}.png",
            partial(run_plots.stage_curves, _of(run, name)),
            f"{name}: loss of every layer over training tokens, and the learning rate",
            f"{name}: how far each mixer is from {target}. Lines: training text; points: held-out text.",
            scale=True,
        )
        yield Table(
            f"{name}: loss of every layer",
            ["layer", "first step", "last step", "held-out, first", "held-out, last"],
            list(_by_layer(steps, run.evaluations(name))),
            folded=f"{name}, layer by layer",
        )


def _by_layer(steps: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> Iterator[list[str]]:
    held = [record["eval"]["losses"] for record in evaluated if record["eval"].get("losses")]
    for name in steps[-1]["losses"]:
        ends = [losses.get(name) for losses in (held[0], held[-1])] if held else [None, None]
        values = [steps[0]["losses"].get(name), steps[-1]["losses"][name], *ends]
        yield [name.removeprefix("layer "), *map(words.significant, values)]


def losses(run: Run) -> Iterator[Block]:
    """Loss curves of the stages that train the whole model, and a line on every stage."""
    stages = [name for name, kind, _ in run.stages if kind in ("glue", "extend")]
    for name in stages:
        if run.steps(name):
            yield Picture(
                f"{name}.png",
                partial(run_plots.stage_curves, _of(run, name)),
                f"{name}: training and held-out losses over tokens, and the learning rates",
                f"{name}: pale lines are single steps, lines their moving mean, points held-out text.",
            )
        else:
            yield Missing(f"{name} has not begun.", run_again(run))
    if not stages:
        yield Text("The recipe trains no stage end to end.")
    yield Table(
        "Stages",
        [
            "stage",
            "what",
            "tokens",
            "steps",
            "time",
            "tokens/s",
            "loss, first",
            "loss, last",
            "best step",
            "peak memory",
        ],
        [_stage(run, one) for one in spent(run)],
        words=(0, 1),
    )


def _stage(run: Run, one: Spent) -> list[str]:
    steps = run.steps(one.name)
    tokens = count_name(one.tokens)
    if not one.complete:
        tokens += f" of {count_name(one.asked)}"
    rate = one.tokens / one.seconds if one.seconds else None
    peaks = [step["peak_memory"] for step in steps if step.get("peak_memory")]
    return [
        one.name,
        one.kind,
        tokens,
        words.whole(one.steps),
        words.NONE if one.seconds is None else time_name(one.seconds),
        words.NONE if rate is None else count_name(rate),
        *(words.significant(steps[at]["loss"] if steps else None) for at in (0, -1)),
        _best(run, one.name),
        bytes_name(max(peaks)) if peaks else words.NONE,
    ]


def _best(run: Run, name: str) -> str:
    """The step with the best score on held-out text."""
    scored = [record for record in run.evaluations(name) if record["eval"].get("score") is not None]
    return str(min(scored, key=lambda record: record["eval"]["score"])["step"]) if scored else words.NONE


def _of(run: Run, name: str) -> list[dict[str, Any]]:
    return [record for record in run.metrics if record["stage"] == name]
