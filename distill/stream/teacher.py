"""A teacher of which one decoder layer at a time is in memory; its other tensors stay in the safetensors shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..data.batch import Batch
from ..digest import inside
from ..errors import UserError
from ..precision import autocast
from ..teacher import Teacher, load_teacher, split_attention
from ..walk import Visit, walk


class _Passed(Exception):
    """Leaves the teacher's forward after the layer that is held."""


class Shards:
    """The tensors of a model folder by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the index, or the single file's header.

        Raises:
            UserError: the index names files outside the folder.
        """
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.places = {name: inside(shard, str(index)) for name, shard in found.items()}
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                self.places = dict.fromkeys(file.keys(), "model.safetensors")

    def read(self, name: str) -> Tensor:
        """One tensor, a copy in memory in the dtype of the file.

        Raises:
            UserError: there is none of that name, or its shard cannot be read.
        """
        if name not in self.places:
            raise UserError(f"{self.folder}: no shard holds {name}. Fetch the files again")
        path = self.folder / self.places[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name).clone()  # without the copy it would be a view of the mapped file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error}). Fetch the file again") from None

    def bytes(self, names: Iterable[str]) -> int:
        """What these tensors take in their files, from the headers alone."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.places[name], []).append(name)
        total = 0
        for shard, held in by_file.items():
            with (self.folder / shard).open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            total += sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in held)
        return total


@dataclass
class StreamedTeacher(Teacher):
    """A `Teacher` whose `model` is on the meta device, but for the layer that is held.

    Attributes:
        shards: where its tensors are.
        dtype: in which it computes.
        device: where a layer is put.
        held: the layer in memory; None for none.
    """

    shards: Shards = field(default=None)  # pyright: ignore[reportAssignmentType]
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    held: int | None = None

    def layer_path(self, layer: int) -> str:
        """The decoder layer's name in the model."""
        return f"{self.family.backbone}.{self.family.layers}.{layer}"

    def attention_tensors(self, layer: int) -> dict[str, Any]:
        """See the base class; read from the shards, on the CPU."""
        path = self.attention_path(layer) + "."
        state = {name: self.shards.read(path + name).to(self.dtype) for name in self.attention(layer).state_dict()}
        return split_attention(state, self.family, self.geometry(layer))

    @contextmanager
    def hold(self, layer: int) -> Iterator[dict[str, Tensor]]:
        """Have a layer in memory, inside. Yields its tensors by their names in the model."""
        block, path = self.layers[layer], self.layer_path(layer) + "."
        made = {}
        for name, empty in block.state_dict().items():
            made[name] = _fitting(self.shards.read(path + name), empty, path + name).to(self.device, self.dtype)
        self.release()
        block.load_state_dict(made, strict=True, assign=True)
        block.requires_grad_(False)
        block.to(self.device)  # buffers
        del block.forward
        self.held = layer
        try:
            yield {path + name: tensor for name, tensor in made.items()}
        finally:
            made.clear()
            self.release()

    def release(self) -> None:
        """Let go of the layer in memory."""
        if self.held is not None:
            block = self.layers[self.held]
            for module in block.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
                    setattr(module, name, empty)
            block.forward = _skip
            self.held = None

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Have the input embedding in memory, inside."""
        module = self.backbone.get_input_embeddings()
        name = next(name for name, found in self.model.named_modules() if found is module)
        weight = _fitting(self.shards.read(f"{name}.weight"), module.weight, f"{name}.weight")
        empty = module.weight
        module.weight = nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)
        try:
            yield
        finally:
            module.weight = empty

    def embed(self, batch: Batch, precision: str) -> Tensor:
        """What the lowest layer receives, (B, T, D); inside `embedding`."""
        return self._until(0, batch, None, precision)

    def pass_layer(
        self, batch: Batch, hidden: Tensor, visit: Visit | None, precision: str, *, end: bool
    ) -> Tensor | None:
        """The held layer's forward on what comes to it.

        Args:
            batch: of (B, T) tokens, whose ids are not read.
            hidden: (B, T, D), what the layer receives.
            visit: called at its attention, as `walk` does; None calls nothing.
            precision: `fp32` or `bf16`.
            end: go on to the layer's output; otherwise the forward ends at its attention.

        Returns:
            The layer's output, (B, T, D), where `end`.
        """
        if self.held is None:
            raise ValueError("no layer is held")
        layer = self.held
        made: list[Tensor] = []

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            made.append(output[0] if isinstance(output, tuple) else output)
            raise _Passed

        with self.fed(hidden):
            handle = self.layers[layer].register_forward_hook(leave)
            try:
                walk(self, [layer], batch, visit or _nothing, precision, whole=end)
            except _Passed:
                pass
            finally:
                handle.remove()
        return made[0] if made else None

    @contextmanager
    def fed(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the held layer receives `hidden`, (B, T, D), in a forward of the backbone on whatever ids."""
        if self.held is None:
            raise ValueError("no layer is held")
        given, embedding = hidden.to(self.dtype), self.backbone.get_input_embeddings()

        def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return (given, *args[1:]), kwargs  # families scale what the embedding gives; this is past that

        handle = self.layers[self.held].register_forward_pre_hook(replace, with_kwargs=True)
        embedding.forward = lambda ids: given
        try:
            yield
        finally:
            del embedding.forward
            handle.remove()

    def _until(self, layer: int, batch: Batch, visit: Visit | None, precision: str) -> Tensor:
        made: list[Tensor] = []

        def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            made.append(args[0] if args else kwargs["hidden_states"])
            raise _Passed

        handle = self.layers[layer].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            with torch.no_grad(), autocast(self.device.type, precision):
                self.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        except _Passed:
            pass
        finally:
            handle.remove()
        return made[0]


def open_teacher(
    name_or_path: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"
) -> StreamedTeacher:
    """A teacher none of whose weights are read yet.

    Args:
        name_or_path: as for `load_teacher`.
        revision: likewise.
        dtype: likewise.
        device: where its layers will be put, one at a time.

    Raises:
        UserError: as `load_teacher`; or its shards hold tensors by other names than the model has (fused experts),
            which only transformers' whole loading puts together.
        MachineError: as `load_teacher`.
    """
    plain = load_teacher(name_or_path, revision, dtype, weights=False)
    made = StreamedTeacher(
        **vars(plain), shards=Shards(plain.folder), dtype=getattr(torch, dtype), device=torch.device(device)
    )
    names = [f"{made.layer_path(i)}.{name}" for i in range(made.num_layers) for name in made.layers[i].state_dict()]
    missing = [name for name in names if name not in made.shards.places]
    if missing:
        raise UserError(
            f"{plain.folder}: its shards hold {len(missing)} of the decoder layers' {len(names)} tensors under other "
            f"names, e.g. {missing[0]}, which only a load of the whole model puts together. Set stages.align.stream="
            "null where it fits into memory, or save it again under the model's own names"
        )
    for block in made.layers:
        block.forward = _skip
    for name, buffer in list(made.model.named_buffers()):
        if not name.startswith(tuple(f"{made.layer_path(i)}." for i in range(made.num_layers))):
            owner, _, key = name.rpartition(".")
            setattr(made.model.get_submodule(owner), key, buffer.to(made.device))
    return made


def _skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What stands in for the forward of a layer that is not in memory."""
    return hidden_states


def _nothing(*_: Any) -> None:
    """A visit that does nothing."""


def _fitting(tensor: Tensor, empty: Tensor, name: str) -> Tensor:
    if tensor.shape != empty.shape:
        raise UserError(
            f"{name}: the shards hold it as {tuple(tensor.shape)}, config.json makes it {tuple(empty.shape)}. They do "
            "not belong together: fetch the files again"
        )
    return tensor
