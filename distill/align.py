"""Align: every mixer learns, by itself, to give what the attention it replaces gives (DESIGN §5; RADLADS step 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..mixers.base import Mixer, MixerInputs
from .data.batch import Batch
from .errors import UserError
from .losses import ALIGN, align_loss
from .precision import autocast, no_autocast
from .stage import Group, Stage, StageSettings
from .teacher import Teacher
from .walk import Rotary, Visit, walk

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
    compile_mixers(mixers, settings.compile)
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
        frozen={f"teacher {key}": tensor for key, tensor in teacher.model.state_dict(keep_vars=True).items()}
        | {key: tensor for key, tensor in module.state_dict(keep_vars=True).items() if not tensor.requires_grad},
    )


def align_module(mixers: dict[int, Mixer]) -> nn.ModuleDict:
    """All mixers as one module: what the commits of an align stage hold."""
    return nn.ModuleDict({str(layer): mixers[layer] for layer in sorted(mixers)})


def compile_mixers(mixers: dict[int, Mixer], wanted: bool) -> None:
    """Have torch.compile translate every mixer's forward when it first runs, or run them as they are."""
    for mixer in mixers.values():
        if wanted:
            mixer.compile()
        else:
            mixer._compiled_call_impl = None


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
    losses: dict[str, Tensor] = {}
    visit = align_visit(mixers, losses, total, loss, precision, 1.0 if backward else None)
    walk(teacher, mixers, batch, visit, precision)
    return {"loss": torch.stack(list(losses.values())).mean(), **losses}


def align_visit(
    mixers: dict[int, Mixer],
    losses: dict[str, Tensor],
    total: int,
    loss: str,
    precision: str,
    weight: float | None,
    graph: bool = False,
) -> Visit:
    """What is done at each layer: the mixer's forward, its loss put into `losses`, and backward of `weight` times it.

    Arguments as for `align_step`; a weight of None only measures, and with `graph` leaves the loss with its graph.
    """

    def visit(layer: int, given: Tensor, rotary: Rotary, wanted: Tensor, inputs: MixerInputs) -> None:
        device = given.device.type
        with torch.set_grad_enabled(weight is not None or graph):
            with autocast(device, precision):
                made, _ = mixers[layer](given, position_embeddings=rotary, mixer_inputs=inputs)
            with no_autocast(device):
                value = align_loss(loss, made, wanted, inputs.padding, total)
                if weight is not None and value.requires_grad:  # a mixer without parameters has none
                    (weight * value).backward()
        losses[f"layer {layer}"] = value if graph else value.detach()

    return visit
