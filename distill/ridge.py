"""Ridge least squares from normal equations that are summed up batch by batch, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


class Gram:
    """X^T X, X^T Y and Y^T Y of rows seen so far: enough for every linear map from X to Y, and for its error.

    Args:
        features: columns of X.
        targets: columns of Y.
        bias: fit a constant too: X has one more column, of ones.
        device: where the sums are kept.
    """

    def __init__(self, features: int, targets: int, bias: bool = False, device: torch.device | str = "cpu") -> None:
        size = features + bias
        self.bias = bias
        self.square = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(size, targets, dtype=torch.float64, device=device)
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x (n, features) and y (n, targets)."""
        x, y = x.to(self.square), y.to(self.square)
        if self.bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.square.addmm_(x.mT, x)
        self.cross.addmm_(x.mT, y)
        self.norm += y.square().sum()
        self.rows += len(x)

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear layer's weight (targets, features) and bias (targets,) as a map (features [+ 1], targets), fp64."""
        packed = weight.to(self.square).mT
        if self.bias:
            last = torch.zeros_like(packed[:1]) if bias is None else bias.to(self.square)[None]
            packed = torch.cat([packed, last])
        return packed

    def unpack(self, solution: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `pack` packed."""
        return (solution[:-1].mT, solution[-1]) if self.bias else (solution.mT, None)

    def solve(self, ridge: float, prior: Tensor | None = None) -> Tensor:
        """argmin_W |X W - Y|^2 + ridge * m * |W - prior|^2, m the mean diagonal of X^T X; the constant is not damped.

        Args:
            ridge: relative damping, above 0.
            prior: (features [+ 1], targets), as from `pack`; zero by default.

        Raises:
            ValueError: the sums are not finite, or all features are zero.
        """
        if not bool(self.square.isfinite().all() and self.cross.isfinite().all()):
            raise ValueError("the features or targets are not finite")
        size = len(self.square)
        inner = self.square.diagonal()[: size - self.bias]
        damping = torch.full_like(self.square.diagonal(), float(inner.mean()) * ridge)
        if not float(damping[0]) > 0:
            raise ValueError("all features are zero")
        if self.bias:
            damping[-1] = self.rows * 1e-9
        start = torch.zeros_like(self.cross) if prior is None else prior
        factor = torch.linalg.cholesky(self.square + damping.diag())
        return start + torch.cholesky_solve(self.cross - self.square @ start, factor)

    def error(self, weight: Tensor) -> float:
        """|X W - Y| / |Y| for W (features [+ 1], targets); 0 where Y is zero and met."""
        weight = weight.to(self.square)
        rest = (weight * (self.square @ weight - 2 * self.cross)).sum() + self.norm
        if float(self.norm) == 0.0:
            return 0.0 if float(rest) <= 0.0 else float("inf")
        return float((rest.clamp(min=0.0) / self.norm).sqrt())
