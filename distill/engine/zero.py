"""DeepSpeed ZeRO-1, 2 and 3, with offload of the optimizer's state (and under 3 the weights) to CPU or NVMe.

align: DeepSpeed's engine wants one backward per step, align does one per layer. So align goes round it, in ZeRO-1's
way: every rank holds all mixers, every layer has an owner. Sent per step and layer: the gradient to the owner (reduce),
the new weights from it (broadcast); the optimizer's state of a layer lies on its owner alone. Under ZeRO-3 the
teacher's weights lie in shards and are gathered module by module.
glue: DeepSpeed's engine. Sent per step: ZeRO-1 and 2 the gradients once and the weights once, ZeRO-3 the weights twice
per part and the gradients once.

Weights and optimizer are fp32 in DeepSpeed's eyes; bf16 products are autocast's, as in every other engine.
DeepSpeed's own checkpoints are pickles and bound to the number of ranks; commits hold whole tensors instead, gathered
through its `safe_get_full_…`, so that any engine reads them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import deepspeed  # pyright: ignore[reportMissingImports]  (an extra)
import torch
import torch.distributed as dist
from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from ..errors import UserError
from .base import Engine, MakeOptimizer, twin
from .ddp import check_ranks
from .world import World

if TYPE_CHECKING:
    from ...mixers.base import Mixer
    from ..stage import Group, Stage
    from ..teacher import Teacher

_KINDS = ("exp_avg", "exp_avg_sq")


class _Cut(deepspeed.zero.Init):
    """DeepSpeed's own cutting into shards, without sending rank 0's values round first.

    All ranks have them, and to receive them is to write: into a copy of the teacher's files, where they are mapped.
    """

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()  # pyright: ignore[reportAttributeAccessIssue]


class Zero(Engine):
    """See above."""

    split = False

    def __init__(self, world: World, stage: int, offload: str = "none", offload_dir: str | None = None) -> None:
        super().__init__(world)
        self.stage = stage
        self.name = f"deepspeed-zero{stage}"
        self.sharded = stage == 3
        self.offload = offload
        self.offload_dir = offload_dir
        self.persist = 100_000  # elements up to which a weight stays whole once gathered, DeepSpeed's own default
        self.owners: dict[str, int] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._teacher: tuple[Any, Teacher] | None = None
        self._clip: float | None = None

    def check(self) -> None:
        """Assert that DeepSpeed sees the same ranks."""
        # DeepSpeed calls torch by names that torch 2.13 announces to rename, once per message.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
        # On a CPU it would compile an op for inference first, which takes minutes, and a process killed meanwhile
        # leaves a lock in ~/.cache/torch_extensions for which every later one waits without a word.
        backend: Any = import_module("deepspeed.comm.torch")  # by attribute it is torch itself
        backend.build_shm_op = lambda: None
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        check_ranks(self)
        assert deepspeed.comm.get_world_size() == self.world.size, "DeepSpeed sees another number of ranks"

    def require(self, name: str, batch: int, spike: object) -> None:
        """See the base class."""
        super().require(name, batch, spike)
        if spike is not None:
            raise UserError(
                f"stages.{name}.spike: DeepSpeed cannot leave out a step that has gone backward. Write "
                f"stages.{name}.spike=null, or engine.parallel=ddp or fsdp2"
            )

    def place_teacher(self, teacher: Teacher) -> Teacher:
        """ZeRO-3: a sharded copy. Else the teacher itself."""
        if self.stage < 3:
            return teacher
        if self._teacher is None or self._teacher[0] is not teacher:
            placed = replace(teacher, model=twin(teacher.model), whole=True)
            head = placed.model.get_output_embeddings()
            if head is not None and head.weight is placed.model.get_input_embeddings().weight:
                # Glue multiplies by the head, which DeepSpeed's hooks on the backbone know nothing of.
                head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            config = self._config(None)
            config["zero_optimization"].pop("offload_optimizer", None)
            self._cut(placed.backbone, config)
            deepspeed.initialize(model=placed.backbone, config=config)
            for parameter in placed.model.parameters():  # the head, where the backbone does not hold it
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(self.world.device)
            self._teacher = teacher, placed
        return self._teacher[1]

    def place_mixers(self, mixers: dict[int, Mixer]) -> dict[int, Mixer]:
        """Whole, on this rank's device."""
        if not self.sharded:
            return mixers
        return {layer: copy.deepcopy(mixer).to(self.world.device) for layer, mixer in mixers.items()}

    def place_student(self, student: Any) -> Any:
        """A twin where `begin` will shard it."""
        return twin(student) if self.sharded else student

    def begin(self, stage: Stage, make: MakeOptimizer, clip: float | None) -> torch.optim.Optimizer:
        """DeepSpeed's engine for an end-to-end stage, owners of layers for the others."""
        self.world.share(stage.module)
        self.parameters = stage.parameters
        self.optimizer = make()
        self.wrapper = None
        if stage.whole is None:
            self.owners = {group.name: number % self.world.size for number, group in enumerate(stage.groups)}
            return self.optimizer
        config = self._config(clip)
        if self.sharded:
            self._cut(stage.whole, config)
        self.wrapper, self.optimizer, _, _ = deepspeed.initialize(
            model=stage.whole, optimizer=self.optimizer, config=config
        )
        if self.sharded:
            student: Any = stage.module
            heads = {student.get_output_embeddings().weight, student.get_input_embeddings().weight}
            for weight in heads:
                deepspeed.zero.register_external_parameter(stage.whole, weight)
            # Some of a mixer's modules hold weights that the mixer itself multiplies by: they are gathered for it.
            for mixer in student.mixers().values():
                for parameter in mixer.parameters():
                    deepspeed.zero.register_external_parameter(mixer, parameter)
        return self.optimizer

    def end(self) -> None:
        """Destroy DeepSpeed's engine: its hooks would stay on the modules."""
        if self.wrapper is not None:
            self.wrapper.destroy()
        super().end()

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Tell DeepSpeed which part is the last."""
        if self.wrapper is not None:
            self.wrapper.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's own."""
        self.wrapper.backward(loss * self.scale)

    def reduce(self, stage: Stage) -> None:
        """Every layer's gradient to its owner."""
        if self.wrapper is not None:
            return
        for group in stage.groups:
            owner = self.owners[group.name]
            parameters = [p for p in group.parameters.values() if p.grad is not None]
            if not parameters:
                continue
            flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
            dist.reduce(flat, dst=owner)
            for piece, parameter in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True):
                parameter.grad = piece.view_as(parameter) if self.world.rank == owner else None

    def norms(self, groups: list[Group]) -> list[Tensor]:
        """Of the layers that this rank owns, 0 for others. DeepSpeed's own norm is known after its step."""
        if self.wrapper is not None:
            return []
        return [norm.to(self.world.device) for norm in super().norms(groups)]

    def agree(self, values: Tensor, losses: int, norms: int) -> Tensor:
        """Sum everything: a norm is on its owner alone."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    def clip(self, group: Group, norm: float, limit: float) -> None:
        """The owner's gradients; DeepSpeed's engine clips in its step."""
        if self.wrapper is None and any(p.grad is not None for p in group.parameters.values()):
            super().clip(group, norm, limit)

    def step(self) -> float | None:
        """DeepSpeed's step; or the owners', who then send the weights round."""
        if self.wrapper is not None:
            self.wrapper.step()
            return float(self.wrapper.get_global_grad_norm())
        self.optimizer.step()
        for name, parameters in self._by_group():
            for parameter in parameters:
                dist.broadcast(parameter.detach(), src=self.owners[name])
        return None

    def zero_grad(self) -> None:
        """Forget the gradients; DeepSpeed does in its step."""
        if self.wrapper is None:
            super().zero_grad()
        else:
            self.wrapper.zero_grad()

    def full(self, tensor: Tensor) -> Tensor:
        """Gathered under ZeRO-3."""
        if not hasattr(tensor, "ds_id"):
            return tensor.detach()
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def local(self, tensor: nn.Parameter) -> Tensor:
        """This rank's shard under ZeRO-3."""
        return getattr(tensor, "ds_tensor", tensor)

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Into the shards of all ranks under ZeRO-3."""
        if not hasattr(tensor, "ds_id"):
            super().put(tensor, value)
            return
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0), torch.no_grad():
            tensor.copy_(value)

    def loaded(self) -> None:
        """Write the parameters into DeepSpeed's own fp32 copies."""
        if self.wrapper is not None:
            for parameter in self.parameters.values():
                safe_set_full_fp32_param(parameter, self.full(parameter))

    def mine(self, number: int) -> bool:
        """Every rank writes its share under ZeRO-3."""
        return number % self.world.size == self.world.rank if self.sharded else self.world.main

    def optimizer_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Align: what this rank owns. Glue: gathered tensor by tensor, every rank keeps its share."""
        if self.wrapper is None:
            return {
                f"{names[parameter]}/{kind}": value.detach()
                for parameter, state in self.optimizer.state.items()
                for kind, value in state.items()
            }
        made, number = {}, 0
        steps = self._steps()
        if steps is None:
            return made
        self._link()
        for name, parameter in self.parameters.items():
            for kind in _KINDS:
                whole: Any = safe_get_full_optimizer_state(parameter, kind)
                if number % self.world.size == self.world.rank:
                    made[f"{name}/{kind}"] = whole.detach().cpu().clone()
                number += 1
            if self.world.main:
                made[f"{name}/step"] = torch.tensor(float(steps))
        return made

    def load_optimizer(self, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """The owner's layers; or into DeepSpeed's shards."""
        if self.wrapper is None:
            owner = {name: self.owners[group] for group, names in self._names().items() for name in names}
            own = {key: value for key, value in tensors.items() if owner[key.rsplit("/", 1)[0]] == self.world.rank}
            super().load_optimizer(own, parameters)
            return
        if not tensors:
            return
        base = self.optimizer.optimizer
        step = next(value for key, value in tensors.items() if key.endswith("/step"))
        # ZeRO-3 gives its optimizer the shards only while it steps.
        groups = [group["params"] for group in base.param_groups]
        for held in [getattr(self.optimizer, "fp32_partitioned_groups_flat", [])] if self.stage == 3 else groups:
            for flat in held:
                base.state[flat] = {"step": step.clone()} | {kind: torch.zeros_like(flat) for kind in _KINDS}
        self._link()
        for name, parameter in parameters.items():
            for kind in _KINDS:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}/{kind}"].to(parameter.device), kind)

    def _cut(self, module: nn.Module, config: dict[str, Any]) -> None:
        """Into shards, parameter by parameter: left to itself, DeepSpeed moves the whole module to the device first."""
        _Cut(module=module, config_dict_or_path=config)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.world.device)

    def _by_group(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        for group, names in self._names().items():
            yield group, [self.parameters[name] for name in names]

    def _names(self) -> dict[str, list[str]]:
        """Parameters by the group `layer N` that they belong to."""
        found: dict[str, list[str]] = {group: [] for group in self.owners}
        for name in self.parameters:
            found[f"layer {name.split('.')[0]}"].append(name)
        return found

    def _link(self) -> None:
        """Have ZeRO-1 and 2 find their optimizer's state: with several groups they look too early by themselves."""
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _steps(self) -> float | None:
        """Steps that DeepSpeed's optimizer has done; None before the first."""
        for state in self.optimizer.optimizer.state.values():
            if "step" in state:
                return float(state["step"])
        return None

    def _config(self, clip: float | None) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage, "contiguous_gradients": True, "overlap_comm": False}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = self.persist
        if self.offload != "none":
            place: dict[str, Any] = {"device": self.offload, "pin_memory": self.world.device.type == "cuda"}
            if self.offload == "nvme":
                place["nvme_path"] = self.offload_dir
            zero["offload_optimizer"] = place
            if self.stage == 3:
                zero["offload_param"] = dict(place)
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": clip or 0.0,
            "steps_per_print": 10**9,
        }
