"""Low-rank adapters on a student's linear layers (LoRA, arXiv 2106.09685) by the library peft, and their merging."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import checkpoint
from .errors import MachineError, UserError

if TYPE_CHECKING:
    from peft import LoraModel

_MARK = ".lora_"
"""In the names of adapters' tensors, which peft calls `q_proj.lora_A.default.weight`."""


@dataclass(frozen=True)
class LoraSettings:
    """Adapters W + alpha / rank B A, B zero at the start.

    Attributes:
        rank: rows of A.
        alpha: see above.
        targets: the linear layers' own names: `q_proj`; wherever one stands in a decoder layer it gets an adapter.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


def require_peft(place: str) -> None:
    """Refuse where the library is missing.

    Args:
        place: the recipe's key that asks for it.

    Raises:
        MachineError: with the command that installs it.
    """
    if find_spec("peft") is None:
        raise MachineError(
            f"{place}: lora: the package peft is not installed. Install it: pip install 'relinear[lora]', or train "
            "mixers instead"
        )


def add_adapters(student: Any, settings: LoraSettings, seed: int, place: str = "lora") -> LoraModel:
    """Put adapters on a student's linear layers (in place); only they require gradients afterwards.

    Adapted weights become fp32. No random number of the caller's is used up.

    Args:
        student: a causal language model.
        settings: see there.
        seed: of the adapters' A.
        place: what errors name.

    Returns:
        What `merge_adapters` takes. Until then a student's tensors have peft's names.

    Raises:
        UserError: a target that no decoder layer has.
        MachineError: peft is not installed.
    """
    require_peft(place)
    from peft import LoraModel

    config = lora_config(student, settings, place)
    for name in config.target_modules:
        student.get_submodule(name).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(student, config, "default")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    return tuner


def lora_config(student: Any, settings: LoraSettings, place: str = "lora") -> Any:
    """peft's LoraConfig for adapters on a student's decoder layers.

    Raises:
        UserError: a target that no decoder layer has.
    """
    from peft import LoraConfig

    layers = f"{student.base_model_prefix}."
    linear = {n: m for n, m in student.named_modules() if isinstance(m, nn.Linear) and n.startswith(layers)}
    last = {name: name.rsplit(".", 1)[-1] for name in linear}
    for target in settings.targets:
        if target not in last.values():
            known = ", ".join(sorted(set(last.values())))
            raise UserError(f"{place}.targets: no decoder layer has a linear layer {target!r}. There are: {known}")
    chosen = [name for name in linear if last[name] in settings.targets]
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=chosen)  # pyright: ignore[reportArgumentType]  (any number does)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return _MARK in name


def merge_adapters(tuner: LoraModel) -> None:
    """Add every adapter to its weight (in place): the student has its own modules and names again.

    Raises:
        ValueError: a merged weight would not be finite.
    """
    student = tuner.merge_and_unload(safe_merge=True)
    if hasattr(student, "peft_config"):
        del student.peft_config


def load_student(student: Any, commit: checkpoint.Checkpoint) -> None:
    """Copy the weights of a glue or extend commit into a student; adapters that the commit holds are merged.

    Args:
        student: an ordinary one.
        commit: complete or not.

    Raises:
        UserError: the commit is of another model.
        MachineError: it holds adapters, and peft is not installed.
    """
    settings = commit.state["settings"]
    if settings["train"] != "lora" or commit.complete:
        checkpoint.load_module(student, commit.weights(), commit.path)
        return
    tuner = add_adapters(student, settings_of(settings["lora"]), 0, str(commit.path))
    checkpoint.load_module(student, commit.weights(), commit.path)
    merge_adapters(tuner)


def settings_of(values: dict[str, Any] | None) -> LoraSettings:
    """From plain values, as a recipe or a commit holds them; defaults for None."""
    return LoraSettings() if values is None else LoraSettings(**{**values, "targets": tuple(values["targets"])})
