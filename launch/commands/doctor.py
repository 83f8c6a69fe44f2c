"""`doctor`: what this machine offers, to read before a run and to paste into an issue."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import platform
import shutil
from importlib import import_module, metadata
from typing import Any

import typer

from ... import __version__
from ...recipes.units import format_bytes
from ..output import data, data_json, table, talk
from .common import Json, examples

LIBRARIES = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub", "pydantic", "numpy")
EXTRAS = {"gpu": "fla", "mamba": "mamba_ssm", "deepspeed": "deepspeed", "eval": "lm_eval", "wandb": "wandb"}


def register(app: typer.Typer) -> None:
    """Add the command to the console command."""
    app.command(epilog=examples("relinear doctor", "relinear doctor --json", then="relinear quickstart"))(doctor)


def doctor(json: Json = False) -> None:
    """Show what this machine offers.

    Versions, threads, memory, disk, GPUs, which extras are installed, and whose kernels run which recurrence: on a GPU
    each is checked against the step-by-step form.
    """
    found = survey()
    if json:
        data_json(found)
        return
    rows = [tuple(row.values()) for row in found.pop("kernels")]
    data(table([(name, _words(value)) for name, value in found.items()], ("what", "found")))
    data("\n" + table(rows, ("recurrence", "train", "prefill", "decode", "why")))


def survey() -> dict[str, Any]:
    """What `doctor` shows; sizes in bytes."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "relinear": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    found |= {name: metadata.version(name) for name in LIBRARIES}
    found |= {f"[{extra}]": importlib.util.find_spec(name) is not None for extra, name in EXTRAS.items()}
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
