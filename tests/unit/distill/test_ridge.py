"""Normal equations summed batch by batch."""

from __future__ import annotations

import pytest
import torch

from relinear.distill.ridge import Gram

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randn(60, 3, generator=torch.Generator().manual_seed(1)).double()


def summed(bias: bool, sizes: tuple[int, ...] = (7, 30, 23)) -> Gram:
    gram = Gram(5, 3, bias)
    for x, y in zip(X.split(sizes), Y.split(sizes), strict=True):
        gram.add(x, y)
    return gram


@pytest.mark.parametrize("bias", [False, True])
def test_streamed_sums_give_the_least_squares_of_all_rows(bias: bool):
    gram = summed(bias)
    whole = torch.cat([X, torch.ones(60, 1)], 1) if bias else X
    expected = torch.linalg.lstsq(whole, Y).solution
    found = gram.solve(1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert gram.error(found) == pytest.approx(float((whole @ expected - Y).norm() / Y.norm()))
    weight, constant = gram.unpack(found)
    made = X @ weight.mT + (0 if constant is None else constant)
    torch.testing.assert_close(made, whole @ found)
    assert torch.equal(gram.pack(weight, constant), found)


def test_damping_pulls_towards_the_prior_and_leaves_the_constant_alone():
    gram, prior = summed(True), torch.randn(6, 3).double()
    torch.testing.assert_close(gram.solve(1e9, prior)[:-1], prior[:-1], rtol=1e-5, atol=1e-5)
    assert float(gram.solve(1e9)[:-1].abs().max()) < 1e-6
    torch.testing.assert_close(gram.solve(1e9)[-1], Y.mean(0), rtol=1e-4, atol=1e-6)
    ridge = 0.3 * float(X.square().sum() / 5)
    expected = torch.linalg.solve(X.mT @ X + ridge * torch.eye(5), X.mT @ Y)
    torch.testing.assert_close(summed(False).solve(0.3), expected)


def test_what_cannot_be_solved_is_refused():
    gram = Gram(5, 3)
    gram.add(torch.zeros(4, 5), torch.ones(4, 3))
    with pytest.raises(ValueError, match="all features are zero"):
        gram.solve(1e-3)
    assert gram.error(torch.zeros(5, 3)) == 1.0
    gram.add(torch.full((1, 5), torch.nan), torch.ones(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        gram.solve(1e-3)
