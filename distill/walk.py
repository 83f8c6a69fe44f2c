"""A teacher's forward with a stop at every converted layer: where per-layer stages do their work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..mixers.base import MixerInputs
from .data.batch import Batch
from .precision import autocast
from .teacher import Teacher

Rotary = tuple[Tensor, Tensor] | None
Visit = Callable[[int, Tensor, Rotary, Tensor, MixerInputs], None]
"""(layer, its attention's input, rotary embedding, its attention's output, padding and borders)."""


class _LastLayerDone(Exception):
    """Leaves the teacher's forward: nothing above the highest layer is needed."""


def mixer_inputs(batch: Batch) -> MixerInputs:
    """What mixers must know of a batch: padding and document borders, each None where there is none."""
    mask = None if bool(batch.real.all()) else batch.real
    single = bool((batch.segments[:, 0] == batch.segments[:, -1]).all())
    return MixerInputs(padding=mask, segments=None if single else batch.segments)


def walk(
    teacher: Teacher, layers: Iterable[int], batch: Batch, visit: Visit, precision: str = "fp32", whole: bool = False
) -> Tensor | None:
    """One teacher forward without gradients, ended after the highest of `layers`; calls `visit` where it passes one.

    A visit may compute gradients of its own; what it leaves in `MixerInputs.shared` reaches the next one detached.

    Args:
        teacher: frozen.
        layers: to visit.
        batch: all of a batch or a part of it.
        visit: see `Visit`; input and rotary embedding are fp32 in fp32. Called inside autocast where that is on.
        precision: `fp32` or `bf16`.
        whole: go on to the end.

    Returns:
        The last hidden state, (B, T, D), where `whole` or the teacher's own `whole`.
    """
    inputs = mixer_inputs(batch)
    wanted = sorted(layers)

    def listen(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            rotary = kwargs.get("position_embeddings")  # given to layers without rotary embedding too
            if precision == "fp32":
                given, rotary = given.float(), None if rotary is None else tuple(r.float() for r in rotary)
            visit(layer, given, rotary, output[0] if isinstance(output, tuple) else output, inputs)
            inputs.shared = {key: tensor.detach() for key, tensor in inputs.shared.items()}
            if layer == wanted[-1] and not whole and not teacher.whole:
                raise _LastLayerDone

        return hook

    with ExitStack() as stack:
        for layer in wanted:
            handle = teacher.attention(layer).register_forward_hook(listen(layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocast(batch.input_ids.device.type, precision))
        with suppress(_LastLayerDone):
            call = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
            return teacher.backbone(**call).last_hidden_state
    return None
