"""Losses against their naive forms, gradients included; what is masked; how much memory they hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relinear.distill import losses

MIXES = [{"kl": 1.0}, {"reverse_kl": 1.0}, {"ce": 1.0}, {"kl": 0.7, "reverse_kl": 0.2, "ce": 0.4}]


class Case:
    """A small problem; the student's head is tied to an embedding that the hidden states come from, if asked."""

    def __init__(self, dtype: torch.dtype = torch.float64, vocab: int = 37, tied: bool = False, bias: bool = False):
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        rows, length, width = 3, 11, 8
        self.ids = torch.randint(0, vocab, (rows, length), generator=generator)
        self.targets = torch.rand(rows, length, generator=generator) < 0.6
        self.head = nn.Linear(width, vocab, bias=bias, dtype=dtype)
        self.teacher_head = nn.Linear(6, vocab, bias=bias, dtype=dtype)
        self.body = nn.Linear(width, width, bias=False, dtype=dtype)
        with torch.no_grad():
            for module in (self.head, self.teacher_head, self.body):
                for parameter in module.parameters():
                    parameter.copy_(random(*parameter.shape))
        self.tied = tied
        self.noise = random(rows, length, width)
        self.teacher = random(rows, length, 6)

    def hidden(self) -> Tensor:
        return self.body(F.embedding(self.ids, self.head.weight) if self.tied else self.noise)

    def parameters(self) -> list[Tensor]:
        return [*self.head.parameters(), *self.body.parameters()]

    def loss(self, weights: dict[str, float], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.logit_loss(
            self.hidden(), self.head, self.teacher, self.teacher_head, self.ids, self.targets, weights, **options
        )

    def naive(
        self, weights: dict[str, float], temperature: float = 1.0, scale: float = 1.0, softcap: float = math.inf
    ) -> Tensor:
        """The definitions, over full logits."""
        counted = self.targets[:, 1:]
        z = scale * self.head(self.hidden())[:, :-1][counted]
        y = scale * self.teacher_head(self.teacher)[:, :-1][counted].detach()
        if softcap < math.inf:
            z, y = softcap * torch.tanh(z / softcap), softcap * torch.tanh(y / softcap)
        ce = F.cross_entropy(z, self.ids[:, 1:][counted])
        log_p, log_q = (z / temperature).log_softmax(-1), (y / temperature).log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean() * temperature**2
        reverse = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2
        return weights.get("kl", 0) * kl + weights.get("reverse_kl", 0) * reverse + weights.get("ce", 0) * ce


def gradients(case: Case, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, case.parameters()))


@pytest.mark.parametrize("weights", MIXES)
@pytest.mark.parametrize(
    "shape", [{"scale": 0.3}, {"softcap": 2.0}, {"scale": 0.5, "softcap": 1.5, "temperature": 2.0}]
)
def test_logits_that_a_family_scales_or_caps(weights: dict[str, float], shape: dict[str, float]) -> None:
    case = Case(bias=True)
    loss, terms = case.loss(weights, chunk=4, **shape)
    expected = case.naive(weights, **shape)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms["ce"], case.naive({"ce": 1.0}, **shape), rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(gradients(case, loss), gradients(case, expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", MIXES)
@pytest.mark.parametrize(("tied", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_the_naive_form_with_gradients(
    weights: dict[str, float], tied: bool, bias: bool, chunk: int | None, temperature: float
) -> None:
    case = Case(tied=tied, bias=bias)
    loss, terms = case.loss(weights, chunk=chunk, temperature=temperature)
    naive = case.naive(weights, temperature)
    torch.testing.assert_close(loss, naive)
    for ours, theirs in zip(gradients(case, loss * 3), gradients(case, naive * 3), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert set(terms) == set(weights) | {"ce"}
    torch.testing.assert_close(sum(w * terms[name] for name, w in weights.items()), loss.detach())


def test_in_fp32_too() -> None:
    exact, case = Case(), Case(torch.float32)
    weights = MIXES[3]
    loss, naive = case.loss(weights)[0], exact.naive(weights)
    torch.testing.assert_close(loss.double(), naive, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(case, loss), gradients(exact, naive), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_log_softmax_is_fp32_under_autocast() -> None:
    case = Case(torch.float32)
    case.head.weight.data *= 20
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = case.loss({"kl": 1.0})
        hidden = case.hidden()
    rounded = (hidden.bfloat16() @ case.head.weight.bfloat16().t()).float()[:, :-1][case.targets[:, 1:]]
    teacher = (case.teacher.bfloat16() @ case.teacher_head.weight.bfloat16().t()).float()
    log_q = teacher[:, :-1][case.targets[:, 1:]].log_softmax(-1)
    expected = (log_q.exp() * (log_q - rounded.log_softmax(-1))).sum(-1).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(case, loss))


def test_masked_positions_never_count() -> None:
    case = Case()
    loss = case.loss(MIXES[3])[0]
    before = gradients(case, loss)
    masked = ~F.pad(case.targets[:, 1:], (0, 1))
    case.noise[masked] = 1e3
    case.teacher[masked] = float("nan")
    again = case.loss(MIXES[3])[0]
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(case, again), strict=True))


def test_nothing_counted_gives_zero() -> None:
    case = Case()
    case.targets[:] = False
    loss, terms = case.loss(MIXES[3])
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in terms.values())
    assert all(not g.any() for g in gradients(case, loss))


def test_parts_with_a_common_total_add_up_to_the_whole() -> None:
    case = Case()
    whole = case.loss(MIXES[3])[0]
    total = int(case.targets[:, 1:].sum())
    hidden = case.hidden()
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        part = losses.logit_loss(
            hidden[rows],
            case.head,
            case.teacher[rows],
            case.teacher_head,
            case.ids[rows],
            case.targets[rows],
            MIXES[3],
            total=total,
        )
        parts.append(part[0])
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_no_gradient_is_made_where_none_is_needed() -> None:
    case = Case()
    case.head.requires_grad_(False)
    loss = case.loss({"kl": 1.0})[0]
    loss.backward()
    assert case.head.weight.grad is None
    assert case.body.weight.grad is not None
    with torch.no_grad():
        assert not case.loss({"kl": 1.0})[0].requires_grad


def test_cross_entropy_alone_needs_no_teacher() -> None:
    case = Case()
    alone = losses.logit_loss(case.hidden(), case.head, None, None, case.ids, case.targets, {"ce": 1.0})[0]
    torch.testing.assert_close(alone, case.naive({"ce": 1.0}))
    with pytest.raises(ValueError, match="need the teacher"):
        losses.logit_loss(case.hidden(), case.head, None, None, case.ids, case.targets, {"kl": 1.0})
    with pytest.raises(ValueError, match=r"unknown loss 'k'\. Available: kl, reverse_kl, ce"):
        case.loss({"k": 1.0})


def test_never_holds_all_logits(peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """Peak memory of forward and backward grows with the chunk, not with positions times vocabulary."""
    positions, width, vocab, chunk = 512, 4, 1024, 16
    student, teacher = nn.Linear(width, vocab, bias=False), nn.Linear(width, vocab, bias=False)
    teacher.requires_grad_(False)
    hidden = torch.randn(1, positions + 1, width, requires_grad=True)
    ids = torch.randint(0, vocab, (1, positions + 1))
    targets = torch.ones_like(ids, dtype=torch.bool)

    def ours() -> None:
        arguments = (hidden, student, hidden.detach(), teacher, ids, targets, {"kl": 1.0, "reverse_kl": 1.0, "ce": 1.0})
        losses.logit_loss(*arguments, chunk=chunk)[0].backward()

    def naive() -> None:
        log_p, log_q = student(hidden).log_softmax(-1), teacher(hidden.detach()).log_softmax(-1)
        (log_q.exp() * (log_q - log_p)).sum().backward()

    ours(), naive()  # once before measuring: gradients exist from then on
    logits = positions * vocab * 4
    assert peak_bytes(naive) > 3 * logits  # the measure sees them
    weights = vocab * width * 4
    assert peak_bytes(ours) < 12 * chunk * vocab * 4 + 4 * weights + 2**16 < logits


def test_default_chunk_takes_toy_problems_at_once_and_large_vocabularies_in_parts() -> None:
    assert losses.CHUNK_ELEMENTS["cpu"] >= 8 * 512 * 512
    assert losses.CHUNK_ELEMENTS["cuda"] < 8 * 512 * 152_000


@pytest.mark.parametrize("name", list(losses.ALIGN))
def test_align_losses_against_their_definitions(name: str) -> None:
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    total = 0.0
    for s, t in zip(student[mask].tolist(), teacher[mask].tolist(), strict=True):
        square = sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        dot = sum(a * b for a, b in zip(s, t, strict=True))
        lengths = math.sqrt(sum(a * a for a in s)) * math.sqrt(sum(b * b for b in t))
        power = teacher[mask].square().mean().item()
        values = {"l2": math.sqrt(square / 8), "mse": square / 8, "relative": square / 8 / power}
        total += {**values, "cosine": 1 - dot / lengths}[name]
    loss = losses.align_loss(name, student, teacher, mask, 7)
    assert loss.item() == pytest.approx(total / 7, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert not student.grad[~mask].any()
    assert student.grad[mask].any(-1).all()


@pytest.mark.parametrize("name", list(losses.ALIGN))
def test_align_losses_at_the_edges(name: str) -> None:
    same = torch.randn(1, 3, 4)
    student = same.clone().requires_grad_()
    losses.align_loss(name, student, same, None, 3).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()  # the norm has no derivative at 0: it must not be NaN
    nothing = losses.align_loss(name, student, same, torch.zeros(1, 3, dtype=torch.bool), 0)
    assert nothing.item() == 0.0
    nan = same.clone()
    nan[0, 2] = float("nan")
    mask = torch.tensor([[True, True, False]])
    assert losses.align_loss(name, nan.requires_grad_(), same, mask, 2).isfinite()
