"""Matrix: mixers learn to mix tokens as the attention they replace does (MOHAWK's first step, arXiv 2408.10189)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mixers.base import Mixer, MixerInputs
from .align import align_module
from .attention import attention_weights
from .data.batch import Batch
from .family import check_matrix
from .precision import autocast, no_autocast
from .stage import Group, Stage, StageSettings
from .teacher import Teacher
from .walk import Rotary, walk

TRIAL = 8
"""Tokens on which it is tried out what a mixing matrix depends on: enough for the chunked forms."""


def matrix_stage(teacher: Teacher, mixers: dict[int, Mixer], settings: StageSettings, name: str = "matrix") -> Stage:
    """The stage in which mixing matrices train on the teacher's attention matrices, on the teacher's layer inputs.

    As in align, one teacher forward a step, and each layer's loss goes backward where the teacher passes it. Only what
    the matrix depends on is in the groups: not values, gates, output norms and projections, which come out untouched.

    Args:
        teacher: frozen.
        mixers: by layer; fp32 here, and made trainable or not.
        settings: `loss` is not read.
        name: of the stage.

    Raises:
        ValueError: no mixer.
        UserError: a mixer whose mixing is no matrix per head.
    """
    if not mixers:
        raise ValueError("matrix needs at least one converted layer")
    for layer, mixer in sorted(mixers.items()):
        check_matrix(mixer.spec, mixer.options, layer, name)
    module = align_module(mixers).float()
    groups = [
        Group(f"layer {layer}", {f"{layer}.{key}": mixer.get_parameter(key) for key in choose_parameters(mixer)})
        for layer, mixer in sorted(mixers.items())
    ]
    frozen = {key: tensor for key, tensor in module.state_dict(keep_vars=True).items() if not tensor.requires_grad}
    return Stage(
        name=name,
        module=module,
        groups=groups,
        step=lambda batch, total: matrix_step(teacher, mixers, batch, total, settings.precision),
        count=matrix_rows,
        frozen={f"teacher {key}": tensor for key, tensor in teacher.model.state_dict(keep_vars=True).items()} | frozen,
    )


def matrix_rows(batch: Batch) -> int:
    """Rows of a batch with any real token: what the loss is a mean over."""
    return int(batch.real.any(1).sum())


def choose_parameters(mixer: Mixer) -> list[str]:
    """Have those parameters require a gradient that the mixer's matrix depends on, and no others; gives their names.

    Which they are a backward pass on a few random tokens tells.
    """
    device = next(mixer.parameters()).device
    x = torch.randn(1, TRIAL, mixer.geometry.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    turned = torch.ones(1, TRIAL, mixer.geometry.head_dim // 2 * 2, device=device)
    names, parameters = zip(*mixer.requires_grad_(True).named_parameters(), strict=True)
    with torch.enable_grad():
        loss = mixer.matrix(x, (turned, torch.zeros_like(turned)), MixerInputs()).square().sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.requires_grad_(grad is not None)
    return [key for key, grad in zip(names, grads, strict=True) if grad is not None]


def matrix_step(
    teacher: Teacher,
    mixers: dict[int, Mixer],
    batch: Batch,
    total: int,
    precision: str = "fp32",
    backward: bool = True,
) -> dict[str, Tensor]:
    """One teacher forward, with every mixer's matrix and its backward on the way.

    The loss of a layer is the mean over rows of the batch and heads of ||M - A||_F (not squared), M the mixer's (T, T)
    matrix, A = softmax(scale q k^T) the teacher's: 0 across document borders and at padding, where M does not count
    either. A row of packed documents is one matrix, so the norm grows with the square root of the length.

    Args:
        teacher: frozen.
        mixers: by layer.
        batch: all of a batch or a part of it.
        total: `matrix_rows` of the whole batch.
        precision: `fp32` or `bf16`; matrices and loss are fp32.
        backward: False only measures.

    Returns:
        `layer N` for every mixer, and `loss`, their mean.
    """
    device = batch.input_ids.device.type
    losses: dict[str, Tensor] = {}

    def visit(layer: int, given: Tensor, rotary: Rotary, wanted: Tensor, inputs: MixerInputs) -> None:
        with no_autocast(device):
            target = attention_weights(teacher, layer, given, rotary, batch)
        with torch.set_grad_enabled(backward):
            with autocast(device, precision):
                made = mixers[layer].matrix(given, rotary, inputs)
            with no_autocast(device):
                value = matrix_loss(made, target, batch.real, total)
                if backward:
                    value.backward()
        losses[f"layer {layer}"] = value.detach()

    walk(teacher, mixers, batch, visit, precision)
    return {"loss": torch.stack(list(losses.values())).mean(), **losses}


def matrix_loss(made: Tensor, target: Tensor, real: Tensor, total: int) -> Tensor:
    """Sum over rows, mean over heads, of ||made - target||_F at real queries, over `total`.

    Args:
        made: (B, H, T, T), the mixer's.
        target: likewise, the teacher's.
        real: (B, T) bool.
        total: see `matrix_step`.
    """
    difference = (made - target).masked_fill(~real[:, None, :, None], 0.0)
    return torch.linalg.vector_norm(difference.flatten(2), dim=-1).mean(1).sum() / total
