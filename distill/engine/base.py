"""One process: everything as torch does it. The other engines change what they must."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError
from .node import one_per_node
from .world import World

if TYPE_CHECKING:
    from ...mixers.base import Mixer
    from ..stage import Group, Stage
    from ..teacher import Teacher

MakeOptimizer = Callable[[], torch.optim.Optimizer]
M = TypeVar("M", bound=nn.Module)


def twin(module: M) -> M:
    """A copy of a module for a wrapper to shard; its parameters lie in the original's memory until they are replaced.

    The original stays whole for what runs between stages. A teacher's memory is that of its files where they have its
    dtype, so that ranks of a node share it: a real copy would be one more of it for each of them.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, memo)


class Engine:
    """How one stage's step is carried out by the processes of a run.

    A step is: this rank's rows of the batch, in parts, each a forward and backward (`call`, `backward`); `reduce`;
    `norms`; `clip`; `step`. Losses are sums over real tokens divided by those of the whole batch of all ranks, so
    gradients of ranks are added, never averaged.

    Between stages the teacher, the mixers and the student are whole; `place_…` gives the objects that a stage trains,
    and `collect` brings the result back.

    Attributes:
        name: as a recipe says it.
        world: the processes.
        sharded: weights and teacher lie in shards while a stage runs.
        split: a graph beside the wrapped module's may go backward by itself in glue.
    """

    name = "single"
    sharded = False
    split = True

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.optimizer: Any = None
        self.wrapper: Any = None  # DDP or DeepSpeed's engine around a stage's `whole`
        self.kept_by_others: list[nn.Module] = []  # what `between` gave and another rank writes

    @property
    def scale(self) -> float:
        """What a loss is multiplied by before its backward pass: wrappers average gradients over ranks."""
        return 1.0 if self.wrapper is None else float(self.world.size)

    @property
    def home(self) -> str:
        """The device of what lies between stages."""
        return "cpu" if self.sharded else str(self.world.device)

    def check(self) -> None:
        """Assert that the processes are what the recipe asks for."""

    def require(self, name: str, batch: int, spike: object) -> None:
        """Refuse a stage that this engine cannot run.

        Args:
            name: of the stage.
            batch: sequences of a step, over all ranks.
            spike: what is done about losses that jump; None: nothing.

        Raises:
            UserError: the batch is not a multiple of the number of ranks; with DeepSpeed also where spikes are handled.
        """
        size = self.world.size
        if batch % size:
            raise UserError(
                f"stages.{name}.batch: {batch} sequences cannot be shared by {size} ranks. Write a multiple: "
                f"stages.{name}.batch={-(-batch // size) * size}"
            )

    def place_teacher(self, teacher: Teacher) -> Teacher:
        """The teacher as stages run it."""
        return teacher

    def place_mixers(self, mixers: dict[int, Mixer]) -> dict[int, Mixer]:
        """The mixers as align trains them."""
        return mixers

    def place_student(self, student: Any) -> Any:
        """The student as glue trains it."""
        return student

    def between(self, make: Callable[[], M], shell: Callable[[], M]) -> M:
        """A module that trains, as it stands between stages: where stages have it in shards, one copy per node.

        Args:
            make: gives it, on `home`.
            shell: gives the same without values, on torch's default device.
        """
        if not self.sharded:
            return make()

        def empty() -> M:
            with torch.device("meta"):
                return shell()

        module, writes = one_per_node(self.world, make, empty)
        if not writes:
            self.kept_by_others.append(module)
        return module

    def collect(self, placed: nn.Module, original: nn.Module) -> None:
        """Bring what was trained back into the module that it was placed from, or a part of one from `between`."""
        if placed is original:
            return
        own = original.state_dict(keep_vars=True)
        writes = not any(part is original for module in self.kept_by_others for part in module.modules())
        for name, tensor in placed.state_dict(keep_vars=True).items():
            whole = self.full(tensor)
            if writes:
                own[name].data.copy_(whole)
        if self.world.size > 1:
            dist.barrier()

    def begin(self, stage: Stage, make: MakeOptimizer, clip: float | None) -> torch.optim.Optimizer:
        """Wrap what the stage trains, and make its optimizer."""
        self.optimizer = make()
        return self.optimizer

    def end(self) -> None:
        """The stage is over: let go of the wrapper and its hooks."""
        self.wrapper = self.optimizer = None

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a part of the batch; gradients are sent with the last one."""
        yield

    def call(self, whole: nn.Module, *args: Any) -> Any:
        """Forward of the stage's `whole` module, through what wraps it."""
        return (whole if self.wrapper is None else self.wrapper)(*args)

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss that `call` gave."""
        (loss * self.scale if self.scale != 1.0 else loss).backward()

    def reduce(self, stage: Stage) -> None:
        """Add up gradients that no wrapper adds up."""

    def norms(self, groups: list[Group]) -> list[Tensor]:
        """The norm of every group's gradient; none where they are known only after the step (`norm_of_step`)."""
        grads = [[p.grad for p in group.parameters.values() if p.grad is not None] for group in groups]
        return [torch.nn.utils.get_total_norm(group, foreach=True) for group in grads]

    def agree(self, values: Tensor, losses: int, norms: int) -> Tensor:
        """Losses (the first `losses` values) as of the whole batch, norms after them, then the wish to stop.

        Losses and wishes of all ranks are summed; the norms are already those of the summed gradient.
        """
        if self.world.size > 1:
            values = values.clone()
            values[losses : losses + norms] /= self.world.size
            dist.all_reduce(values)
        return values

    def clip(self, group: Group, norm: float, limit: float) -> None:
        """Scale a group's gradients of that norm down to the limit."""
        torch.nn.utils.clip_grads_with_norm_(group.parameters.values(), limit, torch.tensor(norm), foreach=True)

    def step(self) -> float | None:
        """The optimizer's step; the gradient's norm where the wrapper alone knows it."""
        self.optimizer.step()
        return None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def full(self, tensor: Tensor) -> Tensor:
        """A tensor whole. Where it is sharded all ranks must ask for it, in the same order."""
        return tensor.detach()

    def local(self, tensor: nn.Parameter) -> Tensor:
        """What this rank holds of a parameter, for what is done element by element."""
        return tensor

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Write a whole value into a tensor, sharded or not."""
        with torch.no_grad():
            tensor.copy_(value)

    def loaded(self) -> None:
        """Parameters were written to from outside."""

    def mine(self, number: int) -> bool:
        """Whether this rank writes the tensor of that number into a commit."""
        return self.world.main

    def optimizer_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """This rank's part of the optimizer's state, whole tensors by `PARAMETER/KIND`."""
        return {
            f"{names[parameter]}/{kind}": value.detach()
            for parameter, state in self.optimizer.state.items()
            for kind, value in state.items()
            if self.world.main
        }

    def load_optimizer(self, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """Put back what `optimizer_tensors` of all ranks gave, of any engine and number of ranks."""
        for key, value in tensors.items():
            name, kind = key.rsplit("/", 1)
            parameter = parameters[name]
            self.optimizer.state[parameter][kind] = value.to(parameter.device)

    @contextmanager
    def shown(self, module: nn.Module) -> Iterator[None]:
        """Around forward passes of a placed module that do not go through `call`."""
        yield
