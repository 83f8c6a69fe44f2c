"""Calibrate: decays, strengths and output maps in closed form from a few teacher batches, before any gradient step.

Published: decays from the mean attention distance, write strength from entropy, a scale per head (Taylor-Calibrate,
arXiv 2606.16429). Beyond it: each head's decays and strengths by a grid, and the output projection by ridge least
squares, layer by layer from the bottom, on the stream that the layers below already make.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..mixers.base import Mixer
from . import files
from .align import align_module
from .attention import attention_heads
from .attention_stats import StatsSum
from .calibrate_layer import LayerReport, calibrate_layer, output_error
from .calibrate_streams import Given, Sample, run_to, sample
from .checkpoint import Checkpoint, Checkpoints, load_module, module_tensors
from .data.batch import Batch
from .data.source import Source
from .errors import RunFailed, UserError
from .fingerprints import fingerprints
from .loop import seed_all
from .stage import Callbacks, StageResult
from .teacher import Teacher

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative dampings of the output projection from which held-out tokens choose."""
HELD_OUT = 8
"""One held-out token for so many that are fitted."""
LOOKED_AT = 16_384
"""Tokens, at least, of which the attention's statistics are taken and heads' gates and scales are fitted."""
PER_CHANNEL = 16
"""Such tokens for every channel of the layer input, as gates have as many unknowns."""


@dataclass(frozen=True)
class CalibrateSettings:
    """What a recipe says of the stage.

    Attributes:
        tokens: non-padding input tokens that are fitted; an eighth as many more are held out.
        batch: sequences per forward.
        seq_len: positions of a sequence.
        method: `full`; `taylor`: decays, strengths and scales as published, no fit of the output projection; `spread`:
            decays alone, half-lives spread over heads.
        inputs: `student`: from the bottom up, each layer on what the calibrated layers below it make, towards the
            teacher's residual stream; `teacher`: each layer on the teacher's own inputs.
        ridge: relative damping of the output projection; None lets held-out tokens choose among `RIDGES`.
        window: tokens of the window whose share of the attention is reported.
        seed: of every random number generator when the stage starts.
    """

    tokens: int = 64_000
    batch: int = 8
    seq_len: int = 512
    method: Literal["full", "taylor", "spread"] = "full"
    inputs: Literal["teacher", "student"] = "student"
    ridge: float | None = None
    window: int = 64
    seed: int = 0


def run_calibrate(
    teacher: Teacher,
    mixers: dict[int, Mixer],
    source: Source,
    settings: CalibrateSettings,
    *,
    folder: Path | str,
    name: str = "calibrate",
    layers: list[int] | None = None,
    resume: bool = False,
    callbacks: Callbacks | None = None,
    deadline: float | None = None,
) -> StageResult:
    """Calibrate mixers in place; commits them as a stage and writes `FOLDER/NAME.json`.

    Args:
        teacher: frozen.
        mixers: by layer, as transferred.
        source: of batches, at its beginning.
        settings: see there.
        folder: of the run.
        name: of the stage.
        layers: those to calibrate; all by default. Others are run as they are.
        resume: take up the commit that the folder may hold.
        callbacks: `progress`, `message` and `should_stop` are called, between layers.
        deadline: `time.monotonic()` after which no further layer starts.

    Returns:
        Its `report` holds what the JSON does. A stage that was stopped has committed the layers that were done.

    Raises:
        UserError: the folder holds this stage and `resume` is False, or holds it with other settings or teacher.
        RunFailed: statistics or a solution are not finite; names the layer.
    """
    folder, callbacks = Path(folder), callbacks or Callbacks()
    store = Checkpoints(folder / "checkpoints")
    module = align_module(mixers)
    wanted, found, rows = sorted(mixers) if layers is None else sorted(layers), store.newest(name), {}
    state: dict[str, Any] = {"best": None, "settings": dataclasses.asdict(settings), "seconds": 0.0}
    state["fingerprints"] = {"frozen": fingerprints(teacher.model.state_dict())}
    if found is not None:
        rows = _take_up(found, state, module, folder, resume)
        state["seconds"] = found.state["seconds"]
        if found.complete:
            callbacks.message(f"{name}: complete, loaded from {found.path}")
            result = StageResult(**found.state["result"], path=found.path)
            files.write_json(folder / f"{name}.json", result.report)
            return result
        callbacks.message(f"{name}: goes on from {found.path} ({len(rows)} of {len(wanted)} layers)")
    start = time.perf_counter() - state["seconds"]
    seed_all(settings.seed)
    fit, held = calibration_batches(source, settings.tokens, next(teacher.model.parameters()).device)
    spent = sum(one.tokens for one in fit)
    for number, layer in enumerate(wanted[len(rows) :], len(rows)):
        state |= {"tokens": spent * number // len(wanted), "rows": rows, "seconds": time.perf_counter() - start}
        if callbacks.should_stop() or (deadline is not None and time.monotonic() >= deadline):
            commit = store.commit(name, number, module_tensors(module), state)
            return StageResult(
                name, "stopped", number, state["tokens"], state["seconds"], {}, None, [], {}, commit.path
            )

        def look(batch: Batch, own: bool, layer: int = layer) -> Given:
            return run_to(teacher, mixers, layer, batch, own)

        with layer_named(name, layer, mixers[layer]):
            rows[str(layer)] = calibrate_mixer(teacher, mixers[layer], layer, fit, held, settings, look)
        done = spent * (number + 1) // len(wanted)
        callbacks.progress({"stage": name, "step": number + 1, "tokens": done, "loss": rows[str(layer)]["calibrated"]})
    if state["fingerprints"]["frozen"] != fingerprints(teacher.model.state_dict()):
        raise RunFailed(f"{name}: the teacher changed. This is an error of relinear, not of your input")
    report = stage_report(settings, spent, sum(one.tokens for one in held), rows)
    seconds = time.perf_counter() - start
    result = StageResult(name, "complete", len(wanted), spent, seconds, {}, None, [], report, store.folder)
    state |= {"tokens": spent, "rows": rows, "seconds": seconds}
    state["result"] = {key: value for key, value in result.__dict__.items() if key != "path"}
    commit = store.commit(name, len(wanted), module_tensors(module), state, complete=True)
    files.write_json(folder / f"{name}.json", report)
    return dataclasses.replace(result, path=commit.path)


def stage_report(settings: CalibrateSettings, tokens: int, held_out: int, rows: dict[str, Any]) -> dict[str, Any]:
    """What the stage's JSON holds."""
    report = {"method": settings.method, "inputs": settings.inputs, "tokens": tokens, "held_out_tokens": held_out}
    return report | {"layers": rows}


@contextmanager
def layer_named(name: str, layer: int, mixer: Mixer) -> Iterator[None]:
    """What goes wrong inside names the layer.

    Raises:
        RunFailed: statistics or a solution are not finite.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:  # torch's solvers raise RuntimeErrors
        advice = f"Leave the stage out, or check the teacher's weights and stages.{name}.tokens"
        raise RunFailed(f"{name}: layer {layer} ({mixer.spec.name}): {error}. {advice}") from error


def calibration_batches(
    source: Source, tokens: int, device: torch.device | str = "cpu"
) -> tuple[list[Batch], list[Batch]]:
    """A source's next batches: of at least `tokens` tokens to fit, and of an eighth as many to hold out."""
    parts: list[list[Batch]] = []
    for wanted in (tokens, -(-tokens // HELD_OUT)):
        parts.append([])
        while sum(batch.tokens for batch in parts[-1]) < wanted:
            parts[-1].append(source.next_batch().to(device))
    return parts[0], parts[1]


def teacher_errors(teacher: Teacher, mixers: dict[int, Mixer], batches: list[Batch]) -> dict[int, float]:
    """Layer -> |made - attention's output| / |attention's output| on the teacher's layer inputs."""
    errors = {}
    for layer, mixer in mixers.items():
        samples = [_held(teacher, mixers, layer, batch) for batch in batches]
        errors[layer] = output_error(mixer, samples)
    return errors


def _held(teacher: Teacher, mixers: dict[int, Mixer], layer: int, batch: Batch) -> Sample:
    return sample(teacher, batch, run_to(teacher, mixers, layer, batch, False))


def looked_at(settings: CalibrateSettings, hidden_size: int) -> int | None:
    """Tokens after which no further batch is looked at; None for all: the fit of the output projection reads them."""
    return None if settings.method == "full" else max(LOOKED_AT, PER_CHANNEL * hidden_size)


@torch.no_grad()
def calibrate_mixer(
    teacher: Teacher,
    mixer: Mixer,
    layer: int,
    fit: Iterable[Batch],
    held: Iterable[Batch],
    settings: CalibrateSettings,
    look: Callable[[Batch, bool], Given],
) -> dict[str, Any]:
    """Calibrate one layer's mixer in place.

    Args:
        teacher: frozen; of its weights those of this layer's attention are read.
        mixer: as transferred.
        layer: its number.
        fit: batches to fit; read once.
        held: others, which decide; read once.
        settings: of the stage.
        look: (batch, on the student's stream) -> what the layer meets there, as `run_to` gives it.

    Returns:
        The layer's row of the report.

    Raises:
        ValueError, RuntimeError: something is not finite, or cannot be solved.
    """
    own, most = settings.inputs == "student", looked_at(settings, mixer.geometry.hidden_size)
    sums = StatsSum(mixer.geometry.num_heads, settings.seq_len, settings.window)
    seen, contexts = 0, max(LOOKED_AT, PER_CHANNEL * mixer.geometry.hidden_size)

    def seen_in(batch: Batch, given: Given) -> Sample:
        return sample(teacher, batch, given, look(batch, True) if own else None)

    samples: list[Sample] = []
    for batch in fit:
        if most is not None and seen >= most:
            break
        given = look(batch, False)
        one = seen_in(batch, given)
        if seen < contexts:
            heads = attention_heads(teacher, layer, given.hidden, given.rotary)
            one.context = sums.add(heads, batch, contexts=True)
        seen += batch.tokens
        samples.append(one)
    stats = sums.result()
    theirs, mine = [], []
    for batch in held:
        given = look(batch, False)
        theirs.append(sample(teacher, batch, given))
        mine.append(seen_in(batch, given) if own else theirs[-1])
    fresh = type(mixer)(mixer.geometry, mixer.options, layer, mixer.num_layers, mixer.first)
    fresh.reset_parameters(torch.Generator().manual_seed(settings.seed + layer))
    errors = {"random": output_error(fresh.to(theirs[0].hidden.device), theirs)}
    errors["transfer"] = output_error(mixer, theirs)
    ridges = RIDGES if settings.ridge is None else (settings.ridge,)
    made: LayerReport = calibrate_layer(mixer, stats, samples, mine, ridges, settings.method)
    errors["calibrated"] = output_error(mixer, theirs)
    if not all(math.isfinite(value) for value in errors.values()):
        raise ValueError(f"errors are not finite: {errors}")
    return {
        "mixer": mixer.spec.name,
        **errors,
        "aligned": None,
        "stream": made.errors,
        "kept": made.kept,
        "ridge": made.ridge,
        "knobs": made.knobs,
        "distance": stats.distance.tolist(),
        "entropy": stats.entropy.tolist(),
        "near": {"window": stats.window, "share": stats.near.tolist()},
        "histogram": {"edges": stats.edges.tolist(), "share": stats.histogram.tolist()},
    }


def check_settings(found: Checkpoint, now: dict[str, Any]) -> None:
    """A commit was made with these settings.

    Raises:
        UserError: with others.
    """
    for key, value in now.items():
        if found.state["settings"].get(key) != value:
            raise UserError(
                f"{found.path}: was made with {found.stage}.{key} = {found.state['settings'].get(key)}, now it is "
                f"{value}. Set it back to resume, or start in a new folder: --out DIR"
            )


def _take_up(
    found: Checkpoint, now: dict[str, Any], module: torch.nn.Module, folder: Path, resume: bool
) -> dict[str, Any]:
    """Load a commit into the mixers; the rows of the layers that were done."""
    if not resume:
        raise UserError(
            f"{folder}: already holds stage {found.stage!r}. Continue it with --resume, or choose another folder: "
            "--out DIR"
        )
    check_settings(found, now["settings"])
    before, frozen = found.state["fingerprints"]["frozen"], now["fingerprints"]["frozen"]
    changed = sorted(key for key in before.keys() | frozen.keys() if before.get(key) != frozen.get(key))
    if changed:
        raise UserError(
            f"{found.path}: was made with another teacher ({len(changed)} tensors differ, e.g. {changed[0]}). Resume "
            "with the teacher that the run began with, or start in a new folder: --out DIR"
        )
    load_module(module, found.weights(), found.path)
    return dict(found.state["rows"])
