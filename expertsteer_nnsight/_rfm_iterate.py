"""One iterate of the Recursive Feature Machine: a kernel predictor under the metric that has been learnt so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def distances(A: Tensor, B: Tensor) -> Tensor:
    a, b = A.square().sum(1)[:, None], B.square().sum(1)
    squared = a + b - 2 * A @ B.T
    # rounding leaves about 1e-15 (a + b) between equal rows: make those exactly 0, or 1/D turns it into a gradient
    return squared.masked_fill(squared <= 1e-12 * (a + b), 0.0).sqrt()


@dataclass(frozen=True)
class Iterate:
    """One predictor: coefficients, the metric's factor (None: identity), projected rows, L, mean label, gradients."""

    alpha: Tensor
    factor: Tensor | None
    centers: Tensor
    length: Tensor
    intercept: Tensor
    gradients: Tensor

    def predict(self, X: Tensor) -> Tensor:
        Z = X if self.factor is None else X @ self.factor.T
        return (-distances(Z, self.centers) / self.length).exp() @ self.alpha + self.intercept

    def eigen(self) -> tuple[Tensor, Tensor]:
        """AGOP eigenvalues, descending, and eigenvectors in columns."""
        _, values, vectors = torch.linalg.svd(self.gradients, full_matrices=False)
        return values.square(), vectors.T

    def widened(self, Q: Tensor | None) -> Iterate:
        """The same predictor for rows of full width, given in the basis `Q` here."""
        if Q is None:
            return self
        if self.factor is None:
            return replace(self, centers=self.centers @ Q.T, gradients=self.gradients @ Q.T)
        return replace(self, factor=self.factor @ Q.T, gradients=self.gradients @ Q.T)
