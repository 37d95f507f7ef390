"""The methods of `find_direction` by name: each gives raw vectors, and plain numbers about how they were found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils import check_random_state
from torch import Tensor

from .labels import grouped_folds, is_binary, row_space
from .rfm import RecursiveFeatureMachine

Found = tuple[Tensor, dict[str, float]]


def _rfm(X: Tensor, y: Tensor, groups: Any, random_state: Any, **settings: Any) -> Found:
    return of_estimator(RecursiveFeatureMachine(random_state=random_state), X, y, groups, **settings)


def _mean_difference(X: Tensor, y: Tensor, groups: Any, random_state: Any) -> Found:
    # with two classes this is their mean difference times a constant; it serves real-valued labels too
    return (y - y.mean()) @ (X - X.mean(0)), {}


def _pca(X: Tensor, y: Tensor, groups: Any, random_state: Any, n_components: int = 1) -> Found:
    rows = X
    if groups is not None and is_binary(y.cpu().numpy()):
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        member = torch.nn.functional.one_hot(torch.as_tensor(group).to(X.device)).to(X.dtype).T
        top, bottom = member * (y == y.max()), member * (y != y.max())
        paired = (top.sum(1) > 0) & (bottom.sum(1) > 0)
        if paired.sum() < 2:
            raise ValueError(f"pca of pairs needs two groups with both classes, but found {int(paired.sum())}.")
        top, bottom = top[paired], bottom[paired]
        rows = (top / top.sum(1, keepdim=True) - bottom / bottom.sum(1, keepdim=True)) @ X
        # half of the differences change sign, or centring would remove what they share
        half = check_random_state(random_state).permutation(len(rows)) < len(rows) // 2
        rows = rows * torch.as_tensor(1.0 - 2 * half).to(X)[:, None]
    rows, Q = row_space(rows - rows.mean(0))
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    rank = int((values > 1e-10 * values[0]).sum())
    if not 1 <= n_components <= rank:
        raise ValueError(f"pca was asked for {n_components} components, but the rows have {rank}: ask for 1 to {rank}.")
    vectors = vectors[:n_components]
    return vectors if Q is None else vectors @ Q.T, {"spectrum_share": float(values[0] ** 2 / values.square().sum())}


def _logistic(
    X: Tensor,
    y: Tensor,
    groups: Any,
    random_state: Any,
    C: float | int | Sequence[float | int] = (0.1, 1, 10, 100),
) -> Found:
    from sklearn.linear_model import LogisticRegression

    # the penalty is on rows of median norm 1, and the weights lie in the span of the rows
    rows = X - X.mean(0)
    rows, Q = row_space(rows / rows.norm(dim=1).median().clamp(min=1e-300))
    data, grid = rows.cpu().numpy(), [float(c) for c in np.atleast_1d(C)]
    label = (y == y.max()).cpu().numpy()
    solver = "newton-cholesky" if data.shape[1] <= 1000 else "lbfgs"  # lbfgs is slow on separable rows
    loss = np.zeros(len(grid))
    for train, test in grouped_folds(label, groups, 5, random_state) if len(grid) > 1 else ():
        probe = LogisticRegression(solver=solver, max_iter=5000, warm_start=True)
        for i, c in enumerate(grid):
            margin = probe.set_params(C=c).fit(data[train], label[train]).decision_function(data[test])
            loss[i] += np.logaddexp(0, np.where(label[test], -margin, margin)).mean()
    best = grid[int(loss.argmin())]
    weights = LogisticRegression(C=best, solver=solver, max_iter=5000).fit(data, label).coef_[0]
    w = torch.as_tensor(weights).to(rows)
    return w if Q is None else Q @ w, {"C": best}


def _lda(X: Tensor, y: Tensor, groups: Any, random_state: Any, shrinkage: float | int | None = None) -> Found:
    positive = y == y.max()
    means = torch.stack([X[~positive].mean(0), X[positive].mean(0)])
    within, difference = X - means[positive.long()], means[1] - means[0]
    n, d = within.shape
    gram = within @ within.T if n < d else within.T @ within  # same trace, and same norm
    level = float(gram.trace()) / n / d
    if level == 0:  # all rows equal their class mean
        return difference, {"shrinkage": 1.0}
    if shrinkage is None:
        square = float(gram.square().sum()) / n**2
        spread = (float(within.square().sum(1).square().sum()) / n - square) / n
        shrinkage = min(1.0, max(0.0, spread / max(square - d * level**2, 1e-300)))
    a, b = max(shrinkage, 1e-12) * level, (1 - shrinkage) / n
    eye = torch.eye(len(gram), dtype=X.dtype, device=X.device)
    if n < d:  # Woodbury: n x n in place of d x d
        w = (difference - b * within.T @ torch.linalg.solve(a * eye + b * gram, within @ difference)) / a
    else:
        w = torch.linalg.solve(a * eye + b * gram, difference)
    return w, {"shrinkage": shrinkage}


def of_estimator(estimator: Any, X: Tensor, y: Tensor, groups: Any, **settings: Any) -> Found:
    """The direction that a user's estimator learns from `X` `[n, d]` and `y` `[n]`."""
    model: Any = clone(estimator)
    model.set_params(**settings)
    if isinstance(model, RecursiveFeatureMachine):
        model.fit(X, y, groups=groups)
        details = {"bandwidth": model.bandwidth_, "n_iter": float(model.n_iter_)}
        details |= {"sign_correlation": model.sign_correlation_, "spectrum_share": float(model.spectrum_shares_[0])}
        return model.directions_, details
    model.fit(X.cpu().numpy(), y.cpu().numpy())
    found = next((getattr(model, name) for name in ("directions_", "coef_") if hasattr(model, name)), None)
    if found is None:
        name = type(model).__name__
        raise ValueError(f"{name} has neither directions_ nor coef_ after fit: pass a callable instead.")
    return torch.as_tensor(np.asarray(found)).to(X), {}


METHODS: dict[str, tuple[Callable[..., Found], Literal["displacement", "covector"], bool]] = {  # ..., needs classes
    "rfm": (_rfm, "covector", False),
    "mean_difference": (_mean_difference, "displacement", False),
    "pca": (_pca, "displacement", False),
    "logistic": (_logistic, "covector", True),
    "lda": (_lda, "covector", True),
}
