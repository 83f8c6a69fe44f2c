"""What a stage runs on: one process or several, and how they share weights, gradients and optimizer."""

from __future__ import annotations

from typing import Any

from ..errors import MachineError, UserError
from .base import Engine
from .world import World, close_world, open_world

KINDS = ("single", "ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")

__all__ = ["KINDS", "Engine", "World", "close_world", "open_engine", "open_world"]


def open_engine(kind: str, device: str = "cpu", offload: str = "none", offload_dir: str | None = None) -> Engine:
    """The engine of that kind for this process, with its process group.

    Args:
        kind: one of `KINDS`.
        device: `cpu` or `cuda`.
        offload: with DeepSpeed, where the optimizer's state (under zero3 the weights too) lies: `none`, `cpu`, `nvme`.
        offload_dir: folder on the NVMe drive.

    Raises:
        UserError: several processes for `single`, or one for any other kind.
        MachineError: DeepSpeed is asked for and not installed; the processes cannot reach each other.
    """
    if kind not in KINDS:
        raise ValueError(f"no engine {kind!r}. Available: {', '.join(KINDS)}")
    world = open_world(device)
    if kind == "single":
        if world.size > 1:
            raise UserError(
                f"engine.parallel: single, but {world.size} processes were started. Write engine.parallel=ddp (or "
                f"{', '.join(KINDS[2:])}), or start one process"
            )
        return Engine(world)
    if world.size < 2:
        raise UserError(
            f"engine.parallel: {kind} needs two processes or more, found one. Start them: relinear run RECIPE --nproc "
            "N, or write engine.parallel=single"
        )
    made: Any
    if kind == "ddp":
        from .ddp import Ddp

        made = Ddp(world)
    elif kind == "fsdp2":
        from .fsdp2 import Fsdp2

        made = Fsdp2(world)
    else:
        try:
            from .zero import Zero
        except ImportError as error:
            raise MachineError(
                f"engine.parallel: {kind} needs DeepSpeed ({error}). Install it: pip install 'relinear[deepspeed]'"
            ) from None
        made = Zero(world, int(kind[-1]), offload, offload_dir)
    made.check()
    return made
