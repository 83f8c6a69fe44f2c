"""FSDP2: teacher, weights, gradients and optimizer in shards; whole is only what computes.

align: every mixer is sharded by itself, as a root of its own, so that its one forward and one backward are what FSDP2
expects. Sent per layer and part: the mixer's weights twice (all-gather for forward and backward), its gradient once
(reduce-scatter); the teacher's layer once.
glue: every decoder layer and every mixer in it is a unit, embeddings, head and last norm the root's. Sent per part:
all weights twice, all gradients once, the teacher's layers once.

torch's own fully_shard: accelerate's FSDP2 runs on GPUs only (on a CPU it turns into unsynchronised ranks), and one
path that every test runs is worth more than two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .base import Engine, MakeOptimizer, twin
from .ddp import check_ranks
from .world import World

if TYPE_CHECKING:
    from ...mixers.base import Mixer
    from ..stage import Group, Stage
    from ..teacher import Teacher


class Fsdp2(Engine):
    """See above."""

    name = "fsdp2"
    sharded = True
    split = False

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        self.root: Any = None
        self._teacher: tuple[Any, Teacher] | None = None

    def check(self) -> None:
        """Assert that the ranks are there, and that what is sharded is."""
        check_ranks(self)
        probe = nn.Linear(1, self.world.size, bias=False, device=self.world.device)
        self._shard(probe)
        held = next(probe.parameters())
        assert isinstance(held, DTensor) and held.to_local().shape[0] == 1, "fully_shard did not shard"

    def place_teacher(self, teacher: Teacher) -> Teacher:
        """A sharded copy; the original stays where it is, for what runs between stages."""
        if self._teacher is None or self._teacher[0] is not teacher:
            placed = replace(teacher, model=twin(teacher.model), whole=True)
            for layer in placed.layers:
                self._shard(layer)
            self._shard(placed.backbone)
            placed.model.to(self.world.device)  # the head, where the backbone does not hold it
            self._teacher = teacher, placed
        return self._teacher[1]

    def place_mixers(self, mixers: dict[int, Mixer]) -> dict[int, Mixer]:
        """Sharded copies, each a root of its own."""
        placed = {layer: twin(mixer).float() for layer, mixer in mixers.items()}
        for mixer in placed.values():
            self._shard(mixer)
        return placed

    def place_student(self, student: Any) -> Any:
        """A twin, sharded when the stage begins: `begin` makes the root."""
        return twin(student)

    def begin(self, stage: Stage, make: MakeOptimizer, clip: float | None) -> torch.optim.Optimizer:
        """Shard the student and what the stage holds of it; align's mixers are sharded already."""
        self.root = stage.whole
        if stage.whole is not None:
            student: Any = stage.module
            layers = [m for m in student.modules() if type(m).__name__ in (student._no_split_modules or ())]
            for layer in layers:
                for mixer in (m for m in student.mixers().values() if any(m is part for part in layer.modules())):
                    self._shard(mixer)
                self._shard(layer)
            self._shard(stage.whole)
            # fully_shard puts new parameters in the place of the old ones.
            parameters = dict(student.named_parameters())
            for group in stage.groups:
                group.parameters = {name: parameters[name] for name in group.parameters}
            stage.frozen = {
                name: parameters.get(name, tensor) if not name.startswith("teacher ") else tensor
                for name, tensor in stage.frozen.items()
            }
        self.optimizer = make()
        return self.optimizer

    def norms(self, groups: list[Group]) -> list[Tensor]:
        """Norms over all shards."""
        made = []
        for group in groups:
            grads = [_local(p.grad) for p in group.parameters.values() if p.grad is not None]
            made.append(torch.nn.utils.get_total_norm(grads, foreach=True).square().to(self.world.device))
        if made:
            squares = torch.stack(made)
            dist.all_reduce(squares)
            made = list(squares.sqrt())
        return made

    def clip(self, group: Group, norm: float, limit: float) -> None:
        """Scale this rank's shards."""
        grads = [_local(p.grad) for p in group.parameters.values() if p.grad is not None]
        for grad in grads:
            grad.mul_(min(1.0, limit / (norm + 1e-6)))

    def full(self, tensor: Tensor) -> Tensor:
        """Gathered from all ranks."""
        return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """This rank's part of the value."""
        with torch.no_grad():
            if not isinstance(tensor, DTensor):
                tensor.copy_(value)
                return
            place = tensor.device_mesh.device_type
            mine = distribute_tensor(value.to(place), tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(mine.to_local())

    def mine(self, number: int) -> bool:
        """Every rank writes its share of the whole tensors."""
        return number % self.world.size == self.world.rank

    def optimizer_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Gathered tensor by tensor; every rank keeps its share."""
        made = {}
        number = 0
        for parameter, state in self.optimizer.state.items():
            for kind, value in state.items():
                whole = self.full(value)
                if self.mine(number):
                    made[f"{names[parameter]}/{kind}"] = whole.cpu()
                number += 1
        return made

    def load_optimizer(self, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """Cut every tensor as its parameter is cut."""
        for key, value in tensors.items():
            name, kind = key.rsplit("/", 1)
            parameter = parameters[name]
            if value.shape != parameter.shape:  # the step's number
                self.optimizer.state[parameter][kind] = value.to(parameter.device)
                continue
            held = torch.zeros_like(parameter, requires_grad=False)
            self.put(held, value)
            self.optimizer.state[parameter][kind] = held

    @contextmanager
    def shown(self, module: nn.Module) -> Iterator[None]:
        """The root's own weights are whole: embeddings, last norm, head."""
        if self.root is None:
            yield
            return
        self.root.unshard()
        try:
            yield
        finally:
            self.root.reshard()

    def end(self) -> None:
        """Let go of the root."""
        self.root = None
        super().end()

    def _shard(self, module: nn.Module) -> None:
        fully_shard(module, mesh=self.mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are sums already
        if self.world.device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
