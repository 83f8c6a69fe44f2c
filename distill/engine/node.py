"""One copy of a module for all processes of a node: its parameters lie in memory that each of them maps.

Under an engine that shards, what stands between stages would otherwise be there once per rank, in fp32.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .world import World

M = TypeVar("M", bound=nn.Module)
_ALIGNED = 64
"""Bytes to whose multiples parameters begin: a cache line, as malloc's."""


@dataclass
class _Table:
    """What lies where, as one rank tells it to the others of its node.

    Attributes:
        path: names the memory, under /proc.
        size: its bytes.
        places: parameter -> (offset in bytes, dtype, shape).
        names: where a parameter stands in the module -> which one; tied ones stand in several places.
        values: the tensors that are no parameters, each rank has its own.
    """

    path: str = ""
    size: int = 0
    places: dict[int, tuple[int, torch.dtype, torch.Size]] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


def one_per_node(world: World, make: Callable[[], M], shell: Callable[[], M]) -> tuple[M, bool]:
    """A module of whose parameters the processes of a node hold one copy together.

    The lowest rank of each node makes it and moves its parameters into anonymous memory, which has a name under /proc
    while it is handed on; the others map it. Who writes a parameter writes everybody's. The memory goes with the last
    process. A process that cannot reach it (on another node, in another container, without /proc) makes its own.

    Args:
        world: all ranks call this at the same time.
        make: the module, on the CPU.
        shell: the same module on the meta device; its tensors are replaced.

    Returns:
        The module, and whether this rank is the one that writes into it.

    Raises:
        As `World.outcomes`, on every rank, where `make` failed on one.
    """
    homes = world.outcomes(_home)
    keeper = homes.index(homes[world.rank])
    shared = homes.count(homes[world.rank]) > 1
    made: list[M] = []
    files: list[int] = []

    def keep() -> _Table | None:
        if keeper != world.rank:
            return None
        made.append(make())
        if not shared:
            return None
        file, table = _move(made[0])
        files.append(file)
        return table

    table = world.outcomes(keep)[keeper]
    writes = bool(made)
    if table is not None and not made:
        try:
            made.append(_map(shell(), table))
        except OSError:
            made.append(make())
            writes = True
    dist.barrier()
    for file in files:
        os.close(file)
    return made[0], writes


def _home() -> str:
    """The same for processes that see each other under /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"no /proc: {os.urandom(8).hex()}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """Every place of a tensor: its name, the dict that holds it under the last part of the name, the tensor."""
    for path, part in module.named_modules():
        for held in (part._parameters, part._buffers, part.__dict__):
            for name, value in held.items():
                if isinstance(value, Tensor):
                    yield f"{path}.{name}", held, value


def _move(module: nn.Module) -> tuple[int, _Table]:
    """Move a module's parameters into memory that others can map; the open file that names it, and the table."""
    table = _Table()
    for name, _, tensor in _tensors(module):
        if not isinstance(tensor, nn.Parameter):
            table.values[name] = tensor
            continue
        table.names[name] = id(tensor)
        if id(tensor) not in table.places:
            table.places[id(tensor)] = table.size, tensor.dtype, tensor.shape
            table.size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    file = os.memfd_create("relinear")
    os.ftruncate(file, max(1, table.size))  # a module without parameters, too, is mapped
    table.path = f"/proc/{os.getpid()}/fd/{file}"
    memory = mmap.mmap(file, table.size)
    for parameter in module.parameters():
        placed = _at(memory, *table.places[id(parameter)])
        parameter.data = placed.copy_(parameter.detach())
    return file, table


def _map(module: M, table: _Table) -> M:
    """Replace a shell's tensors by those of the table.

    Raises:
        OSError: the memory cannot be reached from here.
    """
    file = os.open(table.path, os.O_RDWR)
    try:
        memory = mmap.mmap(file, table.size)
    finally:
        os.close(file)
    made: dict[int, nn.Parameter] = {}
    for name, held, tensor in list(_tensors(module)):
        last = name.rpartition(".")[2]
        if name in table.values:
            held[last] = table.values[name]
            continue
        key = table.names[name]
        if key not in made:
            made[key] = nn.Parameter(_at(memory, *table.places[key]), requires_grad=tensor.requires_grad)
        held[last] = made[key]
    return module


def _at(memory: mmap.mmap, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A tensor in the memory, with a storage of its own: what looks for shared storages finds none."""
    if shape.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
