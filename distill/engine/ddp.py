"""Data parallelism: every rank holds everything and takes its rows; what is sent is one gradient per parameter.

align: no wrapper. Every mixer's backward runs inside the teacher's forward, one layer at a time, which DDP's reducer
(one backward for all parameters) does not expect; gradients add up locally over the parts and one all-reduce of all
mixers' gradients (4 bytes a parameter) ends the step.
glue: torch's DistributedDataParallel by accelerate: buckets are reduced while the backward still runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import MachineError
from .base import Engine, MakeOptimizer

if TYPE_CHECKING:
    from ..stage import Stage

_MESSAGE = 2**26
"""Elements of one all-reduce: the copy that it is made from is not held for all gradients at once."""


class Ddp(Engine):
    """See above."""

    name = "ddp"

    def check(self) -> None:
        """Assert that this is one of several processes that reach each other.

        Raises:
            MachineError: it is not.
        """
        check_ranks(self)

    def begin(self, stage: Stage, make: MakeOptimizer, clip: float | None) -> torch.optim.Optimizer:
        """Wrap the module of an end-to-end stage."""
        self.world.share(stage.module)
        self.optimizer = make()
        self.wrapper = None
        if stage.whole is not None:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs

            kwargs = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
            accelerator = Accelerator(cpu=self.world.device.type == "cpu", kwargs_handlers=[kwargs])
            if accelerator.num_processes != self.world.size:
                raise MachineError(f"ddp: accelerate sees {accelerator.num_processes} of {self.world.size} processes")
            self.wrapper = accelerator.prepare_model(stage.whole, device_placement=False)
        return self.optimizer

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Send with the last part alone."""
        if self.wrapper is None or last:
            yield
        else:
            with self.wrapper.no_sync():
                yield

    def reduce(self, stage: Stage) -> None:
        """One sum over ranks of all gradients, where DDP did none."""
        if self.wrapper is None:
            grads = [p.grad for p in stage.parameters.values() if p.grad is not None]
            for chunk in chunks(grads, _MESSAGE):
                self.world.sum_(chunk)


def check_ranks(engine: Engine) -> None:
    """Raise where the process group is not that of this engine's world, or the ranks run different engines.

    Raises:
        MachineError: naming what was found.
    """
    world = engine.world
    if not dist.is_initialized() or dist.get_world_size() != world.size or dist.get_rank() != world.rank:
        raise MachineError(f"{engine.name}: rank {world.rank} of {world.size} has no process group of that size")
    found: list = [None] * world.size
    dist.all_gather_object(found, (engine.name, world.device.type))
    if len(set(found)) > 1:
        raise MachineError(f"{engine.name}: the ranks run different engines: {sorted(set(found))}")


def chunks(tensors: list[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """The tensors in lists of about so many elements."""
    held: list[Tensor] = []
    for tensor in tensors:
        if held and sum(t.numel() for t in held) + tensor.numel() > elements:
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held
