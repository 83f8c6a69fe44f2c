"""`doctor`: what this machine offers, to read before a run and to paste into an issue."""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import platform
import shutil
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import __version__
from ...recipes.units import format_bytes
from .. import checks, checks_recipe
from ..output import data, data_json, only_talk, table, talk
from ..signals import MACHINE
from .common import Json, Overrides, examples

LIBRARIES = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub", "pydantic", "numpy")
EXTRAS = {
    **{"gpu": "fla", "mamba": "mamba_ssm", "deepspeed": "deepspeed", "eval": "lm_eval", "lora": "peft"},
    **{"wandb": "wandb", "tensorboard": "tensorboard"},
}


def register(app: typer.Typer) -> None:
    """Add the command to the console command."""
    app.command(
        epilog=examples(
            "relinear doctor",
            "relinear doctor my.yaml engine.parallel=ddp --nproc 8 --nodes 2",
            "relinear doctor --json",
            then="relinear quickstart",
        )
    )(doctor)


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Check what this recipe needs too.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes on a node; one per GPU.", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="M", help="Nodes of the run.")] = 1,
    json: Json = False,
) -> None:
    """Show what this machine offers, and check it.

    Versions, threads, memory, disk, GPUs, which extras are installed, and whose kernels run which recurrence: on a GPU
    each is checked against the step-by-step form. With a recipe: its extras, GPUs, teacher, memory and disk against
    the plan. Exit code 3 where a check fails; the fix stands beside it.
    """
    from ...recipes import loader

    loaded = None if recipe is None else loader.load(recipe, overrides)
    with only_talk():
        found = survey()
        done = list(checks.machine(Path("." if loaded is None else str(loaded.save.dir)), found["kernels"]))
        done += [] if loaded is None else list(checks_recipe.recipe(loaded, nproc, nodes))
    failed = sum(check.state == "failure" for check in done)
    if json:
        data_json(found | {"checks": [dataclasses.asdict(check) for check in done], "ok": not failed})
    else:
        rows = [tuple(row.values()) for row in found.pop("kernels")]
        data(table([(name, _words(value)) for name, value in found.items()], ("what", "found")))
        data("\n" + table(rows, ("recurrence", "train", "prefill", "decode", "why")))
        said = [(check.name, check.state, check.found) for check in done]
        data("\n" + table(said, ("check", "state", "found")))
        for check in done:
            if check.fix:
                talk(f"{check.state}: {check.name}: {check.found}\n  fix: {check.fix}")
    if failed:
        raise typer.Exit(MACHINE)


def survey() -> dict[str, Any]:
    """What `doctor` shows; sizes in bytes."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "relinear": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    found |= {name: checks.version(name) for name in LIBRARIES}
    found |= {f"[{extra}]": checks.installed(name) for extra, name in EXTRAS.items()}
    found |= {
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "gpus": gpus,
        "kernels": _kernels(bool(gpus)),
    }
    return found


def _kernels(gpu: bool) -> list[dict[str, str]]:
    """Rows of `kernels.survey` for every recurrence, as a usual model would run it."""
    import torch

    from ...mixers import kernels, ops

    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))
    modules = [import_module(f"{ops.__name__}.{name}") for name in names]
    every = [module.OP for module in modules if hasattr(module, "OP")]
    if gpu:
        talk("checking kernels; Triton compiles them the first time …")
        return kernels.survey(every, torch.device("cuda"), torch.bfloat16, 64)
    return kernels.survey(every, torch.device("cpu"), torch.float32, 64)


def _memory() -> int | None:
    """Bytes of physical memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError):
        return None


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "installed" if value else "not installed"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return format_bytes(value) if isinstance(value, int) and value > 2**20 else str(value)
