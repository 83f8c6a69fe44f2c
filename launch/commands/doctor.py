"""`doctor`: what this machine offers, to read before a run and to paste into an issue."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from typing import Any

import typer

from ... import __version__
from ...recipes.units import format_bytes
from ..output import data, data_json, table
from .common import Json, examples

LIBRARIES = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub", "pydantic", "numpy")
EXTRAS = {"gpu": "fla", "mamba": "mamba_ssm", "deepspeed": "deepspeed", "eval": "lm_eval", "wandb": "wandb"}


def register(app: typer.Typer) -> None:
    """Add the command to the console command."""
    app.command(epilog=examples("relinear doctor", "relinear doctor --json", then="relinear quickstart"))(doctor)


def doctor(json: Json = False) -> None:
    """Show what this machine offers.

    Versions, threads, memory, disk, GPUs and which extras are installed.
    """
    found = survey()
    if json:
        data_json(found)
    else:
        data(table([(name, _words(value)) for name, value in found.items()], ("what", "found")))


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
    }
    return found


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
