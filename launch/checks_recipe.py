"""What `doctor` checks of a machine for a recipe: extras, GPUs, memory and disk against the plan, the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..distill.errors import MachineError, UserError
from ..recipes import costs
from ..recipes import plan as planner
from ..recipes.schema import EMBEDDED, GlueStage, Recipe, TrainingStage
from ..recipes.units import format_bytes
from .checks import Check, available_memory, existing, guarded, installed

TIGHT = 0.9
"""Share of the memory above which a plan that fits is worth a warning: the plan is an estimate."""


def recipe(wanted: Recipe, nproc: int | None = None, nodes: int = 1) -> Iterator[Check]:
    """Everything that the recipe needs.

    Args:
        wanted: loaded.
        nproc: processes per node; one per GPU if None, where the engine is for several.
        nodes: how many.
    """
    yield from extras(wanted)
    yield guarded("device", lambda: device(wanted, nproc, nodes))
    found = guarded("teacher", lambda: teacher(wanted))
    yield found
    try:
        made = planner.plan(wanted, nproc=_processes(wanted, nproc), nodes=nodes)
    except (UserError, MachineError) as error:
        reason = str(error).splitlines()[0]
        if found.state == "ok":
            yield Check("plan", "failure", reason, "mend that; to see the plan: relinear plan RECIPE")
        else:
            yield Check("plan", "warning", f"memory and disk could not be checked: {reason}", "see teacher")
        return
    yield guarded("memory", lambda: memory(wanted, made))
    yield guarded("disk", lambda: disk(wanted, made))


def extras(wanted: Recipe) -> Iterator[Check]:
    """Packages that the recipe needs beyond the base ones."""
    needed: list[tuple[str, str, str]] = []
    if wanted.engine.parallel.startswith("deepspeed"):
        needed.append(("deepspeed", "deepspeed", f"engine.parallel={wanted.engine.parallel}"))
    for stage in wanted.stages:
        if isinstance(stage, GlueStage) and stage.train == "lora":
            needed.append(("peft", "lora", f"stages.{stage.name}.train=lora"))
    if wanted.track.wandb is not None:
        needed.append(("wandb", "wandb", f"track.wandb={wanted.track.wandb}"))
    if wanted.track.tensorboard:
        needed.append(("tensorboard", "tensorboard", "track.tensorboard=true"))
    for module, extra, key in dict.fromkeys(needed):
        if installed(module):
            yield Check(f"[{extra}]", "ok", f"{module} is installed, for {key}")
        else:
            fix = f"pip install 'relinear[{extra}]'"
            yield Check(f"[{extra}]", "failure", f"{key} needs {module}, which is not installed", fix)


def _processes(wanted: Recipe, nproc: int | None) -> int:
    import torch

    if nproc is not None:
        return nproc
    return 1 if wanted.engine.parallel == "single" else max(1, torch.cuda.device_count())


def device(wanted: Recipe, nproc: int | None, nodes: int) -> Check:
    """GPUs for what the recipe asks, and processes for its engine."""
    import torch

    count, parallel = torch.cuda.device_count(), wanted.engine.parallel
    world = _processes(wanted, nproc) * nodes
    if wanted.engine.device == "cuda" and not count:
        return Check("device", "failure", "engine.device=cuda, but torch sees no GPU", "engine.device=auto")
    if parallel == "single":
        if count > 1 and wanted.engine.device != "cpu":
            return Check("device", "warning", f"one process uses 1 of {count} GPUs", "engine.parallel=ddp --nproc auto")
        return Check("device", "ok", f"one process on {'a GPU' if count else 'the CPU'}")
    for stage in wanted.stages:
        if isinstance(stage, TrainingStage) and stage.batch % world:
            fix = f"stages.{stage.name}.batch={-(-stage.batch // world) * world}"
            return Check("device", "failure", f"{stage.name}: {stage.batch} sequences for {world} processes", fix)
    if not count or wanted.engine.device == "cpu":
        said = f"{parallel} without a GPU: processes share the CPU"
        return Check("device", "warning", said, "relinear run … --nproc 2 tries it; train where there are GPUs")
    if nproc is not None and nproc > count:
        return Check("device", "failure", f"--nproc {nproc}, but {count} GPUs", f"--nproc {count}")
    return Check("device", "ok", f"{parallel}: {world} processes, {count} GPUs here")


def teacher(wanted: Recipe) -> Check:
    """The teacher is there, or the Hub lets this user have it."""
    model = wanted.teacher.model
    if model == EMBEDDED or Path(model).expanduser().exists():
        return Check("teacher", "ok", f"{model}: on this machine")
    from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    who = "a token is set" if get_token() else "no token is set"
    cached = isinstance(try_to_load_from_cache(model, "config.json", revision=wanted.teacher.revision), str)
    if constants.HF_HUB_OFFLINE:
        kept = "its config.json is in the cache" if cached else "it is not in the cache"
        fix = "" if cached else f"where there is a network: hf download {model}"
        said = f"{model}: could not be checked, HF_HUB_OFFLINE forbids to ask ({who}; {kept})"
        return Check("teacher", "warning", said, fix or f"HF_HUB_OFFLINE=0 relinear doctor, to ask for {model}")
    try:
        HfApi().auth_check(model)
    except GatedRepoError:
        fix = f"accept its terms at https://huggingface.co/{model}, then: hf auth login"
        return Check("teacher", "failure", f"{model}: gated, and not open to you ({who})", fix)
    except RepositoryNotFoundError:
        fix = "teacher.model=PATH_OR_ID; for a private one: hf auth login"
        return Check("teacher", "failure", f"{model}: no such folder, no such model on the Hub ({who})", fix)
    except (OSError, HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        said = f"{model}: could not be checked, the Hub was not reached ({reason[:80]}; {who})"
        return Check("teacher", "warning", said, f"where there is a network: hf download {model}")
    return Check("teacher", "ok", f"{model}: the Hub gives it ({who})")


def memory(wanted: Recipe, made: planner.Plan) -> Check:
    """The stage that needs the most, as planned for one process of those, against what there is."""
    import torch

    stage = max(made.stages, key=lambda entry: entry.total_memory)
    needed = stage.total_memory
    if torch.cuda.is_available() and wanted.engine.device != "cpu":
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        there, what = min(sizes), "a GPU has"
    else:
        there, what = (available_memory() or 0) // made.world.nproc, "a process's share of what is free now is"
    if not there:
        return Check("memory", "warning", f"{stage.name} needs about {format_bytes(needed)}; free: unknown", "free -h")
    said = f"{stage.name} needs about {format_bytes(needed)}, {what} {format_bytes(there)}"
    parts = stage.sequences // 2
    less = [f"stages.{stage.name}.micro_batch={parts}"] if parts else []
    less += (
        ["engine.checkpointing=true"] if stage.kind in ("glue", "extend") and not wanted.engine.checkpointing else []
    )
    less += ["engine.parallel=fsdp2 --nproc auto"] if wanted.engine.parallel == "single" else []
    fix = ", or ".join(less) or "a GPU with more memory: relinear plan RECIPE --gpu NAME"
    if needed > there:
        return Check("memory", "failure", said, fix)
    return Check("memory", "warning", said, fix) if needed > TIGHT * there else Check("memory", "ok", said)


def disk(wanted: Recipe, made: planner.Plan) -> Check:
    """Saved steps and the export, as planned, against what is free."""
    folder = existing(Path(str(wanted.save.dir)))
    needed, free = disk_bytes(wanted, made), shutil.disk_usage(folder).free
    said = f"saved steps and export need about {format_bytes(needed)}, {folder} has {format_bytes(free)} free"
    if needed > free:
        return Check("disk", "failure", said, "free some, or save.dir=DIR on another disk, or save.keep=1")
    return Check("disk", "ok", said)


def disk_bytes(wanted: Recipe, made: planner.Plan) -> int:
    """Estimated bytes of a run folder at its fullest.

    A saved step is the stage's module in fp32 and two moments of what trains; a stage's last one has no moments. At
    once there are `save.keep` of them, the best, and the one that is being written.
    """
    counts = made.counts
    last, under_way = 0, 0
    for stage in made.stages:
        if not stage.trained:
            continue
        weights = 4 * (counts.all_mixers if stage.kind in costs.PER_LAYER else counts.student)
        last += weights
        under_way = max(under_way, (wanted.save.keep + 2) * (weights + 8 * stage.trained))
    size: Any = costs.BYTES[wanted.teacher.dtype]
    return last + under_way + size * counts.student
