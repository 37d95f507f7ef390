"""The Recursive Feature Machine, in factored form: no matrix is ever d x d where n < d.

    K(x, z) = exp(-||x - z||_M / L),  ||u||_M^2 = u' M u,  M = I at first
    alpha = (K + reg I)^-1 y;  G = the gradients of f(x) = sum_i alpha_i K(x_i, x) at the training rows  [n, d]
    M <- F' F with F = G / sqrt(largest diagonal entry of G' G);  repeat

so ||x - z||_M = ||F x - F z||, AGOP = G' G, and its eigenvectors are the right singular vectors of G. Gradients stay in
the span of the rows, so the loop runs in an orthonormal basis of that span: O(n^2 d) once and O(n^3) per iteration.

Sources: Radhakrishnan et al., Science 383:1461 (2024); Beaglehole et al., "Toward universal steering and monitoring of
AI models", arXiv 2502.03708, Science 391:787 (2026).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..numeric import as_matrix, like
from .labels import as_labels, auc, group_positions, is_binary, pearson, row_space

FEW = 30  # rows of a class below which a mean difference is the safer choice
WEAK = 0.2  # correlation with the labels below which a sign is not to be trusted
TINY = 1e-100


def distances(A: Tensor, B: Tensor) -> Tensor:
    """Euclidean distances `[a, b]` of the rows of `A` `[a, d]` and `B` `[b, d]`."""
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
        """Predictions `[n]` for centred and scaled rows `[n, d]`."""
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


class RecursiveFeatureMachine(RegressorMixin, BaseEstimator):
    """Kernel regression that learns which directions of its input matter (arXiv 2502.03708, Science 391:787).

    Settings (bandwidth, iteration) are chosen on a held-out part: by AUC for two-valued labels, ties broken by the
    squared error since AUC saturates on contrast pairs, and by the squared error for real-valued labels. Arithmetic is
    in float64 on the device of `X`; learnt arrays are tensors if `X` is one, else numpy arrays.

    Args:
        bandwidth: the kernel's L, or several to choose from.
        adaptive: L is `bandwidth` times the median pairwise M-distance, measured anew in each iteration; else absolute.
        reg: ridge term added to the kernel's diagonal.
        n_iter: how many times the metric is learnt anew.
        center: subtract the mean row. The kernel does not see it; rounding and `scale` do.
        scale: "median" divides by the median row norm (of the centred rows), None does not.
        center_y: subtract the mean label, so that the kernel need not spend capacity on a constant.
        center_grads: subtract the mean gradient before the outer products.
        validation_fraction: share of the rows (of groups, where given) held out for the choice; 0: no choice is made,
            the last iteration is used and `bandwidth` must be one number.
        refit: having chosen on the held-out part, fit again on all rows. Not with `validation=`, which is never
            trained on.
        n_components: how many AGOP eigenvectors to keep in `directions_`.
        random_state: seed of the split.

    Attributes:
        directions_: [n_components, d], unit rows, covectors. Each has a positive Pearson correlation of y with X v over
            all rows; without `refit`, over the held-out part.
        spectrum_: [min(n, d)], eigenvalues of the AGOP, descending; `spectrum_shares_` sum to 1 (a first share above
            0.9 is one direction, below 0.5 a subspace).
        sign_correlation_: Pearson correlation, on held-out rows where there are any, of y with the first direction as
            learnt without these rows.
        agop_factor_: [min(n, d), d], G with AGOP = G' G, the sum over training rows of the outer products of
            `predict`'s gradients.
        bandwidth_, n_iter_: the chosen ones; `length_scale_` is L itself, in units of the scaled rows.
        validation_score_: AUC, or R^2 for real-valued labels, of the chosen settings on the held-out part; else NaN.
        validation_indices_: rows of `X` that were held out by the split.
    """

    def __init__(
        self,
        bandwidth: float | int | Sequence[float | int] = (1.0, 3.0, 10.0),
        adaptive: bool = True,
        reg: float | int = 1e-3,
        n_iter: int = 5,
        *,
        center: bool = True,
        scale: str | None = "median",
        center_y: bool = True,
        center_grads: bool = False,
        validation_fraction: float | int = 0.2,
        refit: bool = True,
        n_components: int = 1,
        random_state: Any = 0,
    ) -> None:
        self.bandwidth = bandwidth
        self.adaptive = adaptive
        self.reg = reg
        self.n_iter = n_iter
        self.center = center
        self.scale = scale
        self.center_y = center_y
        self.center_grads = center_grads
        self.validation_fraction = validation_fraction
        self.refit = refit
        self.n_components = n_components
        self.random_state = random_state

    @classmethod
    def recommended(cls, **changes: Any) -> RecursiveFeatureMachine:
        """Our defaults: scaled rows, centred labels, bandwidths 1, 3 and 10 times the median distance, a refit."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> RecursiveFeatureMachine:
        """The values of the reference code (neural_controllers): L of 1, 10 or 100 on raw states, 8 iterations."""
        reference = {"bandwidth": (1.0, 10.0, 100.0), "adaptive": False, "n_iter": 8, "scale": None}
        return cls(**{**reference, "center_y": False, "refit": False, **changes})

    def _grid(self) -> list[float]:
        grid = [float(b) for b in np.atleast_1d(self.bandwidth)]
        rules = {
            "bandwidth": (bool(grid) and min(grid) > 0, "positive"),
            "reg": (self.reg > 0, "positive"),
            "n_iter": (self.n_iter >= 0, "0 or more"),
            "n_components": (self.n_components >= 1, "1 or more"),
            "validation_fraction": (0 <= self.validation_fraction < 1, "at least 0 and below 1"),
            "scale": (self.scale in (None, "median"), '"median" or None'),
        }
        for name, (fine, wanted) in rules.items():
            if not fine:
                raise ValueError(f"{name} must be {wanted}, but is {getattr(self, name)!r}.")
        return grid

    def _iterates(self, C: Tensor, y: Tensor, bandwidth: float, n_iter: int, Q: Tensor | None) -> Iterator[Iterate]:
        """The predictors with M_0 = I, M_1 ... M_n_iter on rows `C`, which are coordinates in the basis `Q`."""
        factor, ridge = None, self.reg * torch.eye(len(C), dtype=C.dtype, device=C.device)
        intercept = y.mean() if self.center_y else y.new_zeros(())
        for _ in range(n_iter + 1):
            Z = C if factor is None else C @ factor.T
            D = distances(Z, Z)
            if not (D > 0).any():  # all rows alike under this metric
                return
            length = bandwidth * (D[D > 0].median() if self.adaptive else D.new_ones(()))
            K = (-D / length).exp()
            K = K.masked_fill(K < TINY, 0.0)  # denormal numbers make a CPU ten times slower
            alpha = torch.linalg.solve(K + ridge, y - intercept)
            # row j holds the weights of (x_j - x_i) in the gradient at x_j; coinciding rows add nothing
            A = torch.where(D > 0, -alpha * K / (length * D), 0.0)
            G = A.sum(1, keepdim=True) * Z - A @ Z
            G = G if factor is None else G @ factor
            if self.center_grads:
                G = G - G.mean(0)
            if G.shape[0] > G.shape[1]:  # the same G' G in fewer rows
                G = torch.linalg.qr(G, mode="r")[1]
            peak = G.abs().max()
            if not peak > TINY:  # K is the identity to machine precision: there is nothing to learn from
                return
            yield Iterate(alpha, factor, Z, length, intercept, G)
            factor = G / peak
            # an adaptive length makes the metric's scale irrelevant, and saves the way back to d dimensions
            columns = factor if Q is None or self.adaptive else factor @ Q.T
            factor = factor / columns.square().sum(0).max().sqrt()

    def _choose(
        self, C: Tensor, y: Tensor, train: Tensor, val: Tensor, Q: Tensor | None
    ) -> tuple[tuple[float, float], float, int, Iterate]:
        """The best `(score, squared error)`, bandwidth, iteration and predictor; the last where `val` is empty."""
        best: tuple[tuple[float, float], float, int, Iterate] | None = None
        binary = is_binary(y.cpu().numpy())
        for bandwidth in self._grid():
            for t, iterate in enumerate(self._iterates(C[train], y[train], bandwidth, self.n_iter, Q)):
                score = (0.0, float(t))
                if len(val):
                    guess = iterate.predict(C[val])
                    rank = auc(y[val], guess) if binary else 0.0
                    score = (0.0 if np.isnan(rank) else rank, -float((guess - y[val]).square().mean()))
                if best is None or score > best[0]:
                    best = (score, bandwidth, t, iterate)
        if best is None:
            found = f"the median distance between rows is {float(distances(C, C).median()):.3g}"
            raise ValueError(
                f"bandwidth {self.bandwidth} leaves no gradient: {found}; use adaptive=True or a larger one."
            )
        return best

    def fit(
        self, X: Any, y: Any, groups: Any = None, validation: tuple[Any, Any] | None = None
    ) -> RecursiveFeatureMachine:
        """Learn the metric.

        Args:
            X: states [n, d].
            y: labels [n], two-valued or real-valued.
            groups: [n] names; rows of one group (a contrast pair) are never split between training and validation.
            validation: `(X, y)` to choose on, in place of a split.

        Raises:
            ValueError: X or y are not as described, settings are out of range, the rows are too few to split, all rows
                are equal, or the bandwidth is so small that no row sees another.
        """
        grid, rows = self._grid(), as_matrix(X)
        if len(rows) < 2:
            raise ValueError(f"X has n_samples = {len(rows)}: a direction needs at least two rows.")
        labels, (n, d) = as_labels(y, len(rows)), rows.shape
        mean = rows.mean(0) if self.center else rows.new_zeros(d)
        scale = float((rows - mean).norm(dim=1).median()) if self.scale else 1.0
        scale = scale if scale > 0 else 1.0
        held = group_positions(labels, groups, self.random_state) < self.validation_fraction
        if validation is not None:
            extra = as_matrix(validation[0]).to(rows.device)
            rows, held = torch.cat([rows, extra]), np.arange(n + len(extra)) >= n
            binary = is_binary(labels)
            labels = np.concatenate([labels, as_labels(validation[1], len(extra))])
            if binary and not is_binary(labels):
                raise ValueError(
                    f"validation labels are not the two of y: found {np.unique(labels)}; use the same two."
                )
        elif self.validation_fraction == 0 and len(grid) > 1:
            raise ValueError(
                f"bandwidth has {len(grid)} values to choose from, but validation_fraction is 0: give one."
            )
        elif self.validation_fraction > 0 and not 0 < held.sum() < n - 1:
            share = f"a share of {self.validation_fraction:g}"
            raise ValueError(f"n_samples={n} is too few to hold out {share} of them: pass 0 or more rows.")
        C, Q = row_space((rows - mean) / scale)
        target = torch.as_tensor(labels).to(C.device)
        train, val = (torch.as_tensor(np.flatnonzero(part), device=C.device) for part in (~held, held))
        if self.n_components > min(len(train), d):
            found = f"{len(train)} training rows of width {d}"
            raise ValueError(f"n_components is {self.n_components}, more than {found} allow: ask for fewer.")
        binary, few = is_binary(labels), int(np.unique(labels[:n], return_counts=True)[1].min())
        if binary and few < FEW:
            warnings.warn(f"A class has {few} rows, fewer than {FEW}: a mean difference is safer.", stacklevel=2)

        score, self.bandwidth_, self.n_iter_, iterate = self._choose(C, target, train, val, Q)
        judge = val if len(val) else train
        first, sign_on = iterate.eigen()[1][:, 0], judge
        if self.refit and validation is None and len(val):
            sign_on = torch.arange(n, device=C.device)
            *_, iterate = self._iterates(C, target, self.bandwidth_, self.n_iter_, Q)
        spectrum, vectors = iterate.eigen()
        vectors = vectors[:, : self.n_components]
        vectors = vectors * vectors.new_tensor(
            [1 - 2 * (pearson(target[sign_on], p) < 0) for p in (C[sign_on] @ vectors).T]
        )
        same_side = 1 if first @ vectors[:, 0] >= 0 else -1
        self.sign_correlation_ = same_side * pearson(target[judge], C[judge] @ first)
        if self.sign_correlation_ < WEAK:
            text = f"The direction's correlation with the labels is {self.sign_correlation_:.2f}, below {WEAK}"
            warnings.warn(f"{text}: its sign is not to be trusted, or the concept is not one direction.", stacklevel=2)

        r2 = 1 + score[1] / max(float(target[judge].var(correction=0)), TINY)
        self.validation_score_ = float("nan") if not len(val) else score[0] if binary else r2
        self.validation_indices_ = np.flatnonzero(held[:n])
        wide = iterate.widened(Q)
        give = (lambda t: t.contiguous()) if isinstance(X, Tensor) else (lambda t: t.cpu().numpy())
        self.directions_ = give(vectors.T if Q is None else vectors.T @ Q.T)
        self.spectrum_, self.spectrum_shares_ = give(spectrum / scale**2), give(spectrum / spectrum.sum())
        self.agop_factor_ = give(wide.gradients / scale)
        self._predictor_, self._mean_, self._scale_ = replace(wide, gradients=wide.gradients[:0]), mean, scale
        self.length_scale_, self.n_features_in_ = float(iterate.length), d
        return self

    def predict(self, X: Any) -> Any:
        """Predicted labels [n] for states [n, d], in the container of `X`.

        Raises:
            ValueError: `X` has another width than the states of `fit`.
        """
        check_is_fitted(self)
        rows = as_matrix(X)
        if rows.shape[1] != self.n_features_in_:
            found = f"X has {rows.shape[1]} features, but {type(self).__name__}"
            raise ValueError(f"{found} is expecting {self.n_features_in_} features as input.")
        return like(self._predictor_.predict((rows.to(self._mean_.device) - self._mean_) / self._scale_), X)
