"""What calibrate reads: a layer's inputs and outputs, in the teacher and in the half-calibrated student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..mixers.base import Mixer, MixerInputs
from .data.batch import Batch
from .teacher import Teacher
from .walk import mixer_inputs

Rotary = tuple[Tensor, Tensor] | None


@dataclass
class Given:
    """What a layer's attention meets in one forward; fp32.

    Attributes:
        hidden: (B, T, D) layer input.
        rotary: cos and sin, or None.
        residual: (B, T, D), what the decoder layer was given, to which the layer's output is added.
        output: (B, T, D) attention's own output; None in the student.
        inputs: padding, document borders and shared values as they are at this layer.
    """

    hidden: Tensor
    rotary: Rotary
    residual: Tensor
    output: Tensor | None
    inputs: MixerInputs


@dataclass
class Sample:
    """A batch as one mixer's least squares see it.

    Attributes:
        hidden: (B, T, D) the mixer's input.
        rotary: cos and sin, or None.
        inputs: padding, borders, shared values.
        target: (B, T, D) the output wanted.
        real: (B, T) bool; other positions do not count.
        context: (B, T, H, d) what the teacher's heads give, or None where it is not needed.
    """

    hidden: Tensor
    rotary: Rotary
    inputs: MixerInputs
    target: Tensor
    real: Tensor
    context: Tensor | None = None

    def run(self, mixer: Mixer) -> Tensor:
        """The mixer's output, (B, T, D)."""
        return mixer(self.hidden, position_embeddings=self.rotary, mixer_inputs=self.inputs)[0]

    def rows(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (n, ...), those that count."""
        return x[self.real]


class _Reached(Exception):
    """Leaves the forward: nothing above is needed."""


@torch.no_grad()
def run_to(teacher: Teacher, mixers: dict[int, Mixer], layer: int, batch: Batch, own: bool) -> Given:
    """One forward of the teacher up to a layer's attention.

    Args:
        teacher: frozen.
        mixers: by layer. Those below `layer` give what they hand to later layers.
        layer: where to stop.
        batch: on the teacher's device.
        own: the student's stream: below `layer` the mixers stand in the place of attention.
    """
    inputs = mixer_inputs(batch)
    found: dict[str, Any] = {}

    def place(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found["residual"] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).float()

    def here(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> None:
        found["hidden"], found["rotary"] = _read(args, kwargs)
        if output is not None:
            found["output"] = (output[0] if isinstance(output, tuple) else output).float()
        raise _Reached

    kind = next(teacher.model.parameters()).dtype

    def beside(mixer: Mixer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            _forward_of(mixer, inputs, kind)(*args, **kwargs)

        return hook

    with ExitStack() as stack:
        for below, mixer in mixers.items():
            if below < layer and own:
                stack.enter_context(instead(teacher.attention(below), mixer, inputs, kind))
            elif below < layer and mixer.couples_layers and mixer.first:
                stack.callback(teacher.attention(below).register_forward_hook(beside(mixer), with_kwargs=True).remove)
        stack.callback(teacher.layers[layer].register_forward_pre_hook(place, with_kwargs=True).remove)
        attention = teacher.attention(layer)
        listen = attention.register_forward_pre_hook if own else attention.register_forward_hook
        stack.callback(listen(here, with_kwargs=True).remove)
        with suppress(_Reached):
            teacher.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return Given(**{"output": None, **found}, inputs=inputs)


@contextmanager
def instead(attention: nn.Module, mixer: Mixer, inputs: MixerInputs, dtype: torch.dtype) -> Iterator[None]:
    """A mixer in the place of an attention module, inside.

    Args:
        attention: the module that another forward is given.
        mixer: computes in fp32.
        inputs: of the batch.
        dtype: of what it gives back.
    """
    attention.forward = _forward_of(mixer, inputs, dtype)
    try:
        yield
    finally:
        del attention.forward


def _forward_of(mixer: Mixer, inputs: MixerInputs, dtype: torch.dtype) -> Any:
    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden, rotary = _read(args, kwargs)
        made, _ = mixer(hidden, position_embeddings=rotary, mixer_inputs=inputs)
        return made.to(dtype), None

    return forward


def _read(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Rotary]:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rotary = kwargs.get("position_embeddings")
    return hidden.float(), None if rotary is None else tuple(part.float() for part in rotary)


def sample(teacher: Teacher, batch: Batch, seen: Given, mine: Given | None = None) -> Sample:
    """A batch for one layer's least squares.

    Args:
        teacher: frozen.
        batch: on the teacher's device.
        seen: the teacher at this layer, from `run_to`.
        mine: the student there, for a sample on its stream. The target then makes up for what the layers below got
            wrong, as far as the family lets it: the teacher's residual stream after attention less the student's
            before it.
    """
    assert seen.output is not None
    if mine is None:
        return Sample(seen.hidden, seen.rotary, seen.inputs, seen.output, batch.real)
    scale = teacher.family.residual_scale(teacher.values)
    target = seen.output if scale is None else seen.output + (seen.residual - mine.residual) / scale
    return Sample(mine.hidden, mine.rotary, mine.inputs, target, batch.real)
