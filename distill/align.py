"""Align: every mixer learns, by itself, to give what the attention it replaces gives (DESIGN §5; RADLADS step 1)."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..mixers.base import Mixer, MixerInputs
from .data.batch import Batch
from .errors import UserError
from .losses import ALIGN, align_loss
from .precision import autocast, no_autocast
from .stage import Group, Stage, StageSettings
from .teacher import Teacher

TRAIN = ("all", "new")
"""What may train: all of the mixers; what transfer did not take from attention (decays, feature maps, gates)."""


def align_stage(teacher: Teacher, mixers: dict[int, Mixer], settings: StageSettings, name: str = "align") -> Stage:
    """The stage in which mixers train on the teacher's layer inputs and outputs.

    Each step is one teacher forward, stopped after the highest converted layer. Where it passes a converted layer, that
    layer's mixer runs on the same input and its loss goes backward at once, so that activations of one layer only are
    ever held. Layers share nothing but what they hand each other through `MixerInputs.shared`, which is detached.

    Args:
        teacher: frozen.
        mixers: by layer; made trainable and fp32 here.
        settings: `loss` is a key of `losses.ALIGN`, `train` one of `TRAIN`.
        name: of the stage.

    Raises:
        ValueError: no mixer, an unknown loss, or an unknown `train`.
        UserError: no mixer has anything to train.
    """
    if not mixers:
        raise ValueError("align needs at least one converted layer")
    if not isinstance(settings.loss, str) or settings.loss not in ALIGN:
        raise ValueError(f"align has no loss {settings.loss!r}. Available: {', '.join(ALIGN)}")
    if settings.train not in TRAIN:
        raise ValueError(f"align cannot train {settings.train!r}. Available: {', '.join(TRAIN)}")
    module = align_module(mixers).float().requires_grad_(True)
    if settings.train == "new":
        for mixer in mixers.values():
            for row in mixer.table():
                mixer.get_parameter(row.name).requires_grad_(row.source == "new")
    groups = [
        Group(f"layer {layer}", {f"{layer}.{key}": p for key, p in mixer.named_parameters() if p.requires_grad})
        for layer, mixer in sorted(mixers.items())
    ]
    groups = [group for group in groups if group.parameters]
    if not groups:
        kinds = ", ".join(sorted({mixer.spec.name for mixer in mixers.values()}))
        raise UserError(
            f"stages.{name}: no converted layer has anything to train (mixer {kinds}). Leave the stage out, or choose "
            "other options: relinear show --mixer " + kinds.split(", ")[0]
        )
    return Stage(
        name=name,
        module=module,
        groups=groups,
        step=lambda batch, total: align_step(teacher, mixers, batch, total, settings.loss, settings.precision),  # pyright: ignore[reportArgumentType]
        count=lambda batch: batch.tokens,
        frozen={f"teacher {key}": tensor for key, tensor in teacher.model.state_dict().items()}
        | {key: tensor for key, tensor in module.named_parameters() if not tensor.requires_grad},
    )


def align_module(mixers: dict[int, Mixer]) -> nn.ModuleDict:
    """All mixers as one module: what the commits of an align stage hold."""
    return nn.ModuleDict({str(layer): mixers[layer] for layer in sorted(mixers)})


class _LastLayerDone(Exception):
    """Leaves the teacher's forward: nothing above the highest converted layer is needed."""


def align_step(
    teacher: Teacher,
    mixers: dict[int, Mixer],
    batch: Batch,
    total: int,
    loss: str,
    precision: str = "fp32",
    backward: bool = True,
) -> dict[str, Tensor]:
    """One teacher forward, with every mixer's forward and backward on the way.

    Args:
        teacher: frozen.
        mixers: by layer.
        batch: all of a batch or a part of it.
        total: real tokens of the whole batch; each layer's loss is its sum over real tokens / `total`.
        loss: a key of `losses.ALIGN`.
        precision: `fp32` or `bf16`.
        backward: False only measures.

    Returns:
        `layer N` for every mixer, and `loss`, their mean.
    """
    mask = None if bool(batch.real.all()) else batch.real
    single = bool((batch.segments[:, 0] == batch.segments[:, -1]).all())
    inputs = MixerInputs(padding=mask, segments=None if single else batch.segments)
    device = batch.input_ids.device.type
    last = max(mixers)
    losses: dict[str, Tensor] = {}

    def listen(layer: int, mixer: Mixer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            wanted = output[0] if isinstance(output, tuple) else output
            rotary = kwargs.get("position_embeddings")  # given to layers without rotary embedding too
            if precision == "fp32":
                given, rotary = given.float(), None if rotary is None else tuple(r.float() for r in rotary)
            with torch.set_grad_enabled(backward):
                with autocast(device, precision):
                    made, _ = mixer(given, position_embeddings=rotary, mixer_inputs=inputs)
                with no_autocast(device):
                    value = align_loss(loss, made, wanted, mask, total)
                    if backward and value.requires_grad:  # a mixer without parameters has none
                        value.backward()
            losses[f"layer {layer}"] = value.detach()
            inputs.shared = {key: tensor.detach() for key, tensor in inputs.shared.items()}
            if layer == last:
                raise _LastLayerDone

        return hook

    with ExitStack() as stack:
        for layer, mixer in mixers.items():
            handle = teacher.attention(layer).register_forward_hook(listen(layer, mixer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocast(device, precision))
        with suppress(_LastLayerDone):
            teacher.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return {"loss": torch.stack(list(losses.values())).mean(), **losses}
