"""What align and glue minimise. Masked positions never count, and never reach a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .topk_loss import TopK, topk_terms

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits computed at once, by device: tokens times vocabulary."""

TERMS = ("kl", "reverse_kl", "ce")


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    """‖teacher - student‖₂ · D^(-1/2) per token, not squared: RADLADS step 1 (arXiv 2505.03005 §4.2). (…, D) -> (…)."""
    return torch.linalg.vector_norm(student.float() - teacher.float(), dim=-1) * student.shape[-1] ** -0.5


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference per token. (…, D) -> (…)."""
    return (student.float() - teacher.float()).square().mean(-1)


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference per token over the mean square of all that `teacher` holds. (…, D) -> (…)."""
    return mse(student, teacher) / teacher.float().square().mean().clamp(min=1e-12)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of the angle between the two, per token. (…, D) -> (…)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


ALIGN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": l2, "mse": mse, "relative": relative, "cosine": cosine}


def align_loss(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, total: int) -> Tensor:
    """Distance of layer outputs: sum over the counted tokens / `total`.

    Args:
        name: a key of `ALIGN`.
        student: (B, T, D) mixer output.
        teacher: (B, T, D) attention output.
        mask: (B, T) bool, True where a token counts; None where all do.
        total: counted tokens of the whole batch that this micro-batch is a part of; 0 gives a loss of 0.
    """
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    return ALIGN[name](student, teacher).sum() / max(1, total)


def logit_loss(
    student_hidden: Tensor,
    student_head: nn.Linear,
    teacher_hidden: Tensor | None,
    teacher_head: nn.Linear | None,
    input_ids: Tensor,
    targets: Tensor,
    weights: dict[str, float],
    *,
    total: int | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    cached: TopK | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted mix of forward KL, reverse KL and cross-entropy over the counted positions.

    Logits are made a chunk of positions at a time, and each chunk's gradient with respect to them is taken in closed
    form while they are there: neither forward nor backward ever holds a (positions, vocabulary) tensor of more than
    one chunk. Softmax, loss and their gradients are fp32 (fp64 for fp64 inputs). With z the student's logits, p its
    probabilities and q the teacher's:

        kl          Σ q (log q - log p)     d/dz = p - q
        reverse_kl  Σ p (log p - log q)     d/dz = p (log p - log q - reverse_kl)
        ce          -log p[target]          d/dz = p - onehot(target)

    With a temperature τ the first two take z/τ and are multiplied by τ² (Hinton et al., arXiv 1503.02531).

    Args:
        student_hidden: (B, T, D) after the final norm.
        student_head: the student's output projection, tied or not.
        teacher_hidden: (B, T, D'), or None where only `ce` has a weight.
        teacher_head: the teacher's output projection, or None likewise.
        input_ids: (B, T).
        targets: (B, T) bool; True at t counts position t - 1, whose target is input_ids[:, t].
        weights: of the terms `kl`, `reverse_kl` and `ce`; absent is 0.
        total: counted targets of the whole batch that this micro-batch is a part of; this one's own by default.
        temperature: τ.
        scale: factor of both models' logits z (Granite, Cohere).
        softcap: bound c of them, after the factor: c tanh(z / c) (Gemma).
        chunk: positions at once; by default as many as `CHUNK_ELEMENTS` allows.
        cached: the teacher's k + 1 outcomes at the counted positions, row after row, at this temperature, in place of
            its hidden states and head: `kl` is then that of these outcomes (see `topk_loss`), a lower bound of the
            KL over the vocabulary. There is no `reverse_kl` of it.

    Returns:
        The loss, and the terms that it is made of with `ce` in any case, detached, each summed over counted positions
        and divided by `total`. All are 0 where nothing counts.
    """
    unknown = set(weights) - set(TERMS)
    if unknown:
        raise ValueError(f"unknown loss {sorted(unknown)[0]!r}. Available: {', '.join(TERMS)}")
    counted = targets[:, 1:].reshape(-1).nonzero().squeeze(1)
    # Position b * (T - 1) + t of the shifted grid is row b * T + t of the hidden states.
    rows = counted + counted.div(targets.shape[1] - 1, rounding_mode="floor") if targets.shape[1] > 1 else counted
    distil = cached is None and bool(weights.get("kl") or weights.get("reverse_kl"))
    if distil and (teacher_hidden is None or teacher_head is None):
        raise ValueError("kl and reverse_kl need the teacher")
    if cached is not None and weights.get("reverse_kl"):
        raise ValueError("reverse_kl needs the teacher's logits of every token, not k of them")
    if cached is not None and len(cached) != len(rows):
        raise ValueError(f"{len(cached)} cached positions for {len(rows)} counted ones")
    student = student_hidden.flatten(0, 1).index_select(0, rows)
    teacher = teacher_hidden.flatten(0, 1).index_select(0, rows) if distil and teacher_hidden is not None else None
    labels = input_ids.flatten().index_select(0, rows + 1)
    per_chunk = chunk or max(1, CHUNK_ELEMENTS.get(student.device.type, 2**26) // student_head.weight.shape[0])
    denominator = max(1, len(rows) if total is None else total)
    known: Known = cached
    if teacher is not None and teacher_head is not None:
        known = teacher, teacher_head.weight, teacher_head.bias
    values = _LogitLoss.apply(
        student,
        student_head.weight,
        student_head.bias,
        known,
        labels,
        (weights.get("kl", 0.0), weights.get("reverse_kl", 0.0), weights.get("ce", 0.0)),
        (denominator, temperature, per_chunk, scale, softcap, torch.is_grad_enabled()),
    )
    terms = values[1].detach()
    shown = {name: terms[i] for i, name in enumerate(TERMS) if weights.get(name) or name == "ce"}
    return values[0], shown


Known = TopK | tuple[Tensor, Tensor, Tensor | None] | None
"""What a loss knows of the teacher: its k + 1 outcomes; or its hidden states, and weight and bias of its head."""


class _LogitLoss(torch.autograd.Function):
    """The loss and, in the same pass over the chunks, its gradients. See `logit_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Known,
        labels: Tensor,
        weights: tuple[float, float, float],
        numbers: tuple[int, float, int, float, float | None, bool],
    ) -> tuple[Tensor, Tensor]:
        total, temperature, chunk, scale, softcap, with_grad = numbers
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        need = [with_grad and bool(needed) for needed in ctx.needs_input_grad[:3]]
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        grad_hidden = torch.empty_like(hidden) if need[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if need[2] and bias is not None else None
        sums = torch.zeros(3, dtype=exact, device=hidden.device)
        with torch.autocast(device, enabled=False):
            head = weight.to(compute)
            offset = None if bias is None else bias.to(compute)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                x = hidden[rows].to(compute)
                z, slope = _shaped(F.linear(x, head, offset).to(exact), scale, softcap)
                if isinstance(teacher, TopK):
                    y = teacher.rows(rows).normalised(exact)
                else:
                    other = compute if compute != weight.dtype else None
                    y = None if teacher is None else teacher_logits(*teacher, rows, exact, scale, softcap, other)
                grad = _terms(z, y, labels[rows], weights, temperature, sums, any(need))
                if grad is None:
                    continue
                grad = grad.mul_(slope).div_(total) if isinstance(slope, Tensor) else grad.div_(total / slope)
                small = grad.to(compute)
                if grad_hidden is not None:
                    grad_hidden[rows] = small @ head
                if grad_weight is not None:
                    if compute == exact:
                        grad_weight.addmm_(small.t(), x)
                    else:
                        grad_weight += small.t() @ x
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        sums = sums.div_(total)
        ctx.grads = grad_hidden, grad_weight, grad_bias
        loss = weights[0] * sums[0] + weights[1] * sums[1] + weights[2] * sums[2]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale = outputs[0]
        grads = [
            None if grad is None else (grad * scale).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return *grads, None, None, None, None


def _shaped(z: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """Logits as the model gives them, from the head's products z (overwritten), and their derivative by z."""
    if scale != 1.0:
        z = z.mul_(scale)
    if softcap is None:
        return z, scale
    bounded = z.div_(softcap).tanh_()
    slope = bounded.square().neg_().add_(1.0).mul_(scale)
    return bounded * softcap, slope


def teacher_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: slice,
    exact: torch.dtype,
    scale: float = 1.0,
    softcap: float | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """A model's logits at some positions, as the model gives them.

    Args:
        hidden: (n, D) after the final norm.
        weight: (V, D) of the output projection.
        bias: (V,), or None.
        rows: which positions.
        exact: dtype of the result, and of what follows the projection.
        scale: factor of the logits.
        softcap: their bound, after the factor.
        compute: dtype of the product; None takes the weight's own.
    """
    dtype = compute or weight.dtype
    z = F.linear(hidden[rows].to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(exact)
    return _shaped(z, scale, softcap)[0]


def _terms(
    z: Tensor,
    y: Tensor | TopK | None,
    labels: Tensor,
    weights: tuple[float, float, float],
    temperature: float,
    sums: Tensor,
    with_grad: bool,
) -> Tensor | None:
    """Add a chunk's terms to `sums`; the gradient of their weighted sum with respect to z. Overwrites z and y."""
    kl, reverse, ce = weights
    log_p = torch.log_softmax(z, -1)
    sums[2] -= log_p.gather(1, labels[:, None]).sum()
    p1 = None
    if ce and with_grad:
        p1 = log_p.exp().mul_(ce)
        p1.scatter_add_(1, labels[:, None], p1.new_full((len(labels), 1), -ce))
    if y is None:
        return p1
    if temperature != 1.0:
        log_p = torch.log_softmax(z.div_(temperature), -1)
    if isinstance(y, TopK):
        return _cached_terms(log_p, y, kl, temperature, sums, with_grad, p1)
    log_q = torch.log_softmax(y if temperature == 1.0 else y.div_(temperature), -1)
    p = log_p.exp()
    gap = log_p.sub_(log_q)
    grad = p1
    square = temperature**2
    if kl:
        q = log_q.exp_()
        sums[0] -= torch.dot(q.flatten(), gap.flatten()) * square
        if with_grad:
            # d/dz of τ² KL(z/τ) is τ (p - q).
            part = torch.sub(p, q).mul_(kl * temperature)
            grad = part if grad is None else grad.add_(part)
    if reverse:
        per_token = (p * gap).sum(-1, keepdim=True)
        sums[1] += per_token.sum() * square
        if with_grad:
            part = gap.sub_(per_token).mul_(p).mul_(reverse * temperature)
            grad = part if grad is None else grad.add_(part)
    return grad


def _cached_terms(
    log_p: Tensor, y: TopK, kl: float, temperature: float, sums: Tensor, with_grad: bool, grad: Tensor | None
) -> Tensor | None:
    """What `_terms` adds to `grad` where k + 1 outcomes of the teacher are known."""
    if not kl:
        return grad
    value, part = topk_terms(log_p, y, with_grad)
    sums[0] += value.sum() * temperature**2
    if part is None:
        return grad
    part.mul_(kl * temperature)
    return part if grad is None else grad.add_(part)
