"""The processes of a run: which of them this is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import MachineError, RunFailed, UserError
from ..watchdog import waiting

T = TypeVar("T")
S = TypeVar("S")
CPU = torch.device("cpu")
TIMEOUT = timedelta(hours=3)
"""A rank may wait so long for another: rank 0 calibrates, measures and writes alone."""
_ERRORS: dict[str, type[Exception]] = {cls.__name__: cls for cls in (UserError, MachineError, RunFailed)}


@dataclass(frozen=True)
class World:
    """This process among those of a run.

    Attributes:
        rank: 0 to size - 1; rank 0 talks and writes what belongs to the run as a whole.
        size: processes.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        """Whether this is the process that talks."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work; every rank gets its result (plain values), or raises its error.

        Raises:
            Whatever `work` raised: UserError, MachineError and RunFailed as they are, anything else as RunFailed on the
            ranks that did not do the work.
        """
        if self.size == 1:
            return work()
        held: list[Any] = [None]
        failure: BaseException | None = None
        if self.main:
            try:
                held = [("done", work())]
            except Exception as error:
                failure = error
                held = [(type(error).__name__, str(error))]
        with waiting() if not self.main else nullcontext():
            dist.broadcast_object_list(held, src=0)
        if failure is not None:
            raise failure
        kind, value = held[0]
        if kind == "done":
            return value
        raise _ERRORS.get(kind, RunFailed)(value if kind in _ERRORS else f"rank 0 failed: {kind}: {value}")

    def tell(self, value: str | None) -> str | None:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def outcomes(self, work: Callable[[], T]) -> list[T]:
        """What every rank's work gave, by rank.

        Raises:
            What the first rank that failed raised, on every rank.
        """
        if self.size == 1:
            return [work()]
        try:
            mine: Any = ("done", work())
        except Exception as error:
            mine = (type(error).__name__, str(error))
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        for rank, (kind, value) in enumerate(found):
            if kind != "done":
                raise _ERRORS.get(kind, RunFailed)(f"rank {rank}: {value}")
        return [value for _, value in found]

    def spread(self, items: list[S], work: Callable[[S], T], together: bool = False) -> list[T]:
        """What the work gives for every item, in their order, on every rank; each rank does every size-th.

        Args:
            items: to be divided.
            work: for one of them.
            together: every rank works as often as the others, the last item again where it has none left: for a
                forward pass that needs all ranks.

        Raises:
            As `outcomes`.
        """
        mine = items[self.rank :: self.size]
        if together:
            mine += items[-1:] * (-(-len(items) // self.size) - len(mine))
        parts = self.outcomes(lambda: [work(item) for item in mine])
        return [parts[number % self.size][number // self.size] for number in range(len(items))]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Add tensors of one dtype up over all ranks, in place, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        _unflatten(flat, tensors)

    def share(self, module: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers of a module that all of them hold whole."""
        if self.size == 1:
            return
        for tensor in module.state_dict(keep_vars=True).values():
            held = tensor.detach().to(self.device)  # NCCL sends what is on a GPU alone
            dist.broadcast(held, src=0)
            if held.device != tensor.device:
                tensor.detach().copy_(held)


def open_world(device: str) -> World:
    """This process among those that a launcher started (RANK, WORLD_SIZE and LOCAL_RANK in the environment).

    accelerate sets up the process group: NCCL on GPUs, gloo on CPUs.

    Raises:
        MachineError: what came about is not what the launcher asked for.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=torch.device(device))
    from accelerate import PartialState

    cpu = device == "cpu"
    try:
        state = PartialState(cpu=cpu, backend="gloo" if cpu else "nccl", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise MachineError(f"the {size} processes of this run cannot reach each other: {error}") from error
    found = (state.num_processes, dist.get_world_size() if dist.is_initialized() else 1, state.process_index)
    # accelerate goes on alone without a word where it takes the launcher's variables for something else.
    if found != (size, size, int(os.environ["RANK"])):
        raise MachineError(
            f"{size} processes were started, but this one found {found[0]} (process group of {found[1]}, rank "
            f"{found[2]}). Start them with: relinear run RECIPE --nproc N"
        )
    return World(state.process_index, size, torch.device("cpu") if cpu else state.device or torch.device("cuda"))


def close_world() -> None:
    """Leave the process group, if there is one; `open_world` may then make another.

    Its threads outlive the interpreter otherwise, and one that wants Python's lock then aborts the process: a run that
    was saved would look like one that crashed.
    """
    if not dist.is_initialized():
        return
    from accelerate import PartialState

    dist.destroy_process_group()
    PartialState._reset_state()  # it would take the group for open


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    for piece, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.copy_(piece.view_as(tensor))
