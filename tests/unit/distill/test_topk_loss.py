"""The KL over k + 1 outcomes: against its definition and autograd, against the full KL, and at the edges of numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from relinear.distill.losses import logit_loss
from relinear.distill.topk_loss import TopK, outcomes

VOCAB, ROWS, LENGTH = 41, 3, 9


class Case:
    """Hidden states, heads and counted positions in fp64."""

    def __init__(self, seed: int = 5, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
        self.targets = torch.rand(ROWS, LENGTH, generator=generator) < 0.7
        self.head = nn.Linear(8, VOCAB, bias=True, dtype=dtype)
        self.teacher_head = nn.Linear(6, VOCAB, bias=True, dtype=dtype)
        with torch.no_grad():
            for module in (self.head, self.teacher_head):
                for parameter in module.parameters():
                    parameter.copy_(random(*parameter.shape))
        self.hidden = random(ROWS, LENGTH, 8).requires_grad_()
        self.teacher = random(ROWS, LENGTH, 6)
        self.counted = self.targets[:, 1:]

    def logits(self, scale: float = 1.0, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """Student's and teacher's, (n, VOCAB), at the counted positions."""
        made = []
        for hidden, head in ((self.hidden, self.head), (self.teacher, self.teacher_head)):
            z = scale * head(hidden)[:, :-1][self.counted]
            made.append(z if softcap is None else softcap * torch.tanh(z / softcap))
        return made[0], made[1].detach()

    def loss(self, cached: TopK | None, weights: dict[str, float], **options) -> tuple[Tensor, dict[str, Tensor]]:
        known = (None, None) if cached is not None else (self.teacher, self.teacher_head)
        return logit_loss(self.hidden, self.head, *known, self.ids, self.targets, weights, cached=cached, **options)

    def grads(self, loss: Tensor) -> list[Tensor]:
        wanted = [self.hidden, self.head.weight, self.head.bias]
        return list(torch.autograd.grad(loss, wanted))


def definition(z: Tensor, y: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """The loss by explicit probabilities: everything that is not among the k summed up."""
    q, p = torch.softmax(y / temperature, -1), torch.softmax(z / temperature, -1)
    ids = y.topk(k, -1).indices
    chosen_q, chosen_p = q.gather(1, ids), p.gather(1, ids)
    rest = torch.ones_like(q, dtype=torch.bool).scatter(1, ids, False)
    tail_q, tail_p = (q * rest).sum(-1), (p * rest).sum(-1)
    value = (chosen_q * (chosen_q / chosen_p).log()).sum(-1)
    if k < y.shape[-1]:
        value = value + tail_q * (tail_q / tail_p).log()
    return temperature**2 * value.sum() / len(z)


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize(("scale", "softcap", "temperature"), [(1.0, None, 1.0), (0.3, 2.0, 2.5), (3.0, None, 0.7)])
@pytest.mark.parametrize("k", [1, 5, VOCAB - 1, VOCAB])
def test_equals_its_definition_and_autograd(k, scale, softcap, temperature, chunk):
    case = Case()
    z, y = case.logits(scale, softcap)
    wanted = definition(z, y, k, temperature)
    weights = {"kl": 0.8, "ce": 0.3}
    ce = nn.functional.cross_entropy(z, case.ids[:, 1:][case.counted])
    expected = case.grads(0.8 * wanted + 0.3 * ce)
    cached = outcomes(y, k, temperature)
    options = {"scale": scale, "softcap": softcap, "temperature": temperature, "chunk": chunk}
    loss, terms = case.loss(cached, weights, **options)
    assert terms["kl"].item() == pytest.approx(wanted.item(), rel=1e-12)
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-12)
    for found, right in zip(case.grads(loss), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_whole_vocabulary_it_is_the_full_kl(temperature):
    case = Case()
    full, _ = case.loss(None, {"kl": 1.0}, temperature=temperature)
    wanted = case.grads(full)
    cached = outcomes(case.logits()[1], VOCAB, temperature)
    assert torch.isinf(cached.log_tail).all()
    loss, _ = case.loss(cached, {"kl": 1.0}, temperature=temperature)
    assert loss.item() == pytest.approx(full.item(), rel=1e-12)
    for found, right in zip(case.grads(loss), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-13)


def test_is_a_lower_bound_that_rises_with_k_and_misses_the_tails_own_kl():
    case = Case()
    z, y = case.logits()
    full = case.loss(None, {"kl": 1.0})[0].item()
    values = [case.loss(outcomes(y, k), {"kl": 1.0})[0].item() for k in range(1, VOCAB + 1)]
    assert all(low <= high + 1e-12 for low, high in pairwise(values))
    assert values[0] < full * 0.9 and values[-1] == pytest.approx(full, rel=1e-12)
    k = 7
    ids = y.topk(k, -1).indices
    rest = [t.scatter(1, ids, -torch.inf) for t in (y, z)]
    q, p = (torch.log_softmax(t, -1) for t in rest)
    tail = torch.softmax(y, -1).scatter(1, ids, 0.0).sum(-1)
    own = (q.exp() * (q - p)).nan_to_num(0.0).sum(-1)
    assert full - values[k - 1] == pytest.approx((tail * own).mean().item(), rel=1e-9)


def test_finite_where_the_tail_is_next_to_nothing_for_one_of_the_two():
    """In fp32, with a student that is sure and a teacher that is not, and the other way round."""
    for sign in (1.0, -1.0):
        case = Case(dtype=torch.float32)
        with torch.no_grad():
            case.head.weight.mul_(60.0)
            case.teacher_head.weight.mul_(60.0 if sign < 0 else 0.01)
        cached = outcomes(case.logits()[1], 3)
        loss, _ = case.loss(cached, {"kl": 1.0})
        assert torch.isfinite(loss)
        assert all(torch.isfinite(grad).all() for grad in case.grads(loss))
        z, y = (t.double() for t in case.logits())
        assert loss.item() == pytest.approx(
            _stable(z, y, 3).item(), rel=2e-5
        )  # the naive form overflows where this does not


def _stable(z: Tensor, y: Tensor, k: int) -> Tensor:
    q, p = outcomes(y, k), torch.log_softmax(z, -1)
    known = (q.log_probs.exp() * (q.log_probs - p.gather(1, q.ids))).sum()
    tail = p.scatter(1, q.ids, -torch.inf).logsumexp(-1)
    rest = q.log_tail.exp() * (q.log_tail - tail)
    return (known + rest.nan_to_num(0.0).sum()) / len(z)


def test_half_precision_is_made_to_sum_to_one():
    case = Case()
    exact = outcomes(case.logits()[1].float(), 5)
    stored = TopK(exact.ids.to(torch.int32), exact.log_probs.half(), exact.log_tail)
    read = stored.normalised(torch.float32)
    total = read.log_probs.exp().sum(-1) + read.log_tail.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(read.log_probs, exact.log_probs, rtol=2e-3, atol=2e-3)
    assert case.loss(stored, {"kl": 1.0})[0].item() == pytest.approx(case.loss(exact, {"kl": 1.0})[0].item(), rel=2e-3)


def test_refuses_reverse_kl_and_another_number_of_positions():
    case = Case()
    cached = outcomes(case.logits()[1], 4)
    with pytest.raises(ValueError, match="every token, not k of them"):
        case.loss(cached, {"kl": 1.0, "reverse_kl": 0.1})
    with pytest.raises(ValueError, match="cached positions for"):
        case.loss(cached.rows(slice(1, None)), {"kl": 1.0})


def test_cross_entropy_alone_leaves_the_outcomes_alone():
    case = Case()
    cached = outcomes(case.logits()[1], 4)
    alone, terms = case.loss(cached, {"ce": 1.0})
    assert set(terms) == {"ce"} and alone.item() == pytest.approx(terms["ce"].item())


def test_nothing_counted_is_nothing():
    case = Case()
    case.targets.fill_(False)
    case.counted = case.targets[:, 1:]
    loss, _ = case.loss(outcomes(case.logits()[1], 4), {"kl": 1.0})
    assert loss.item() == 0 and all(grad.eq(0).all() for grad in case.grads(loss))
