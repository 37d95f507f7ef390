"""What estimators that learn from labels share: the labels, groups and folds, and how well scores go with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.utils import check_random_state
from sklearn.utils.validation import column_or_1d
from torch import Tensor


def as_labels(y: Any, rows: int) -> Float[np.ndarray, " n"]:
    """`y` as float64 `[rows]`; two distinct values are classes (the larger is the positive one), more are real-valued.

    Raises:
        ValueError: `y` is missing, not one number for each row, not finite, or all the same.
    """
    if y is None:
        raise ValueError("This estimator requires y to be passed, but the target y is None.")
    array = column_or_1d(y.detach().cpu().double().numpy() if isinstance(y, Tensor) else np.asarray(y), warn=True)
    try:
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"Unknown label type: y must be numbers, but holds '{array[0]}'; use 0 and 1.") from None
    if len(array) != rows:
        raise ValueError(f"y must have one label for each of the {rows} rows of X, but has {len(array)}.")
    if not np.isfinite(array).all():
        found = "NaN" if np.isnan(array).any() else "infinity or a value too large for dtype('float64')."
        raise ValueError(f"Input y contains {found}")
    if (array == array[0]).all():
        raise ValueError(f"y is {array[0]:g} in all {rows} rows: a direction needs at least two different labels.")
    return array


def is_binary(y: Float[np.ndarray, " n"]) -> bool:
    """Whether labels hold exactly two values."""
    return bool(np.isin(y, (y.min(), y.max())).all())


def row_names(names: Any, rows: int, what: str) -> np.ndarray:
    """A name for each row, its own where there are none.

    Raises:
        ValueError: `names` does not have one entry for each row.
    """
    found = np.arange(rows) if names is None else np.asarray(names)
    if found.shape != (rows,):
        raise ValueError(f"{what} must have one entry for each of the {rows} rows, but has shape {found.shape}.")
    return found


def group_positions(y: Float[np.ndarray, " n"], groups: Any, random_state: Any) -> Float[np.ndarray, " n"]:
    """A place in (0, 1) for each row, the same within a group, spread evenly over the groups with the same classes.

    `positions < 0.2` is a stratified fifth that splits no group, and `floor(5 * positions)` numbers five folds. The
    places do not depend on which class is called positive.

    Raises:
        ValueError: `groups` does not have one entry for each row.
    """
    names = row_names(groups, len(y), "groups")
    _, group = np.unique(names, return_inverse=True)
    order = check_random_state(random_state).permutation(int(group.max()) + 1)
    stratum = np.zeros(len(order), dtype=int)
    if is_binary(y):  # groups of one class, of the other, and of both are dealt out separately
        for code, value in ((1, y.min()), (2, y.max())):
            stratum += code * (np.bincount(group, y == value) > 0)
    position = np.empty(len(order))
    for s in np.unique(stratum):
        members = order[stratum[order] == s]
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return position[group]


def auc(y: Float[Tensor, " n"], scores: Float[Tensor, " n"]) -> float:
    """Area under the ROC curve of `scores` for two-valued `y`; ties count half, NaN where a class is missing."""
    positive, negative = scores[y == y.max()], scores[y != y.max()]
    gap = positive[:, None] - negative
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean()) if gap.numel() else float("nan")


def pearson(y: Float[Tensor, " n"], scores: Float[Tensor, " n"]) -> float:
    """Pearson correlation, 0 where either side is constant."""
    a, b = y - y.mean(), scores - scores.mean()
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm > 0 else 0.0


def row_space(X: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, "d r"] | None]:
    """`(C, Q)`: `X = C Q'` with orthonormal columns in `Q`: the same distances in n dimensions (Q None if d <= n)."""
    if X.shape[1] <= X.shape[0]:
        return X, None
    Q, R = torch.linalg.qr(X.T)
    return R.T.contiguous(), Q


def joined_groups(groups: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Number of each row's group where groups that have a name of `same` in common are one."""
    (_, left), (_, right) = (np.unique(names, return_inverse=True) for names in (groups, same))
    size, shift = int(left.max()) + int(right.max()) + 2, int(left.max()) + 1
    links = coo_array((np.ones(len(left)), (left, right + shift)), shape=(size, size))
    return connected_components(links, directed=False)[1][left]


def grouped_folds(
    y: np.ndarray, groups: Any, folds: int, random_state: Any, same: Any = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Train and test rows of each fold; folds where either side lacks one of two classes are left out.

    Rows of one name in `same` are copies of one another: groups that share one stay on one side together.
    """
    if same is not None:
        groups = joined_groups(row_names(groups, len(y), "groups"), row_names(same, len(y), "same"))
    number = np.floor(folds * group_positions(y.astype(np.float64), groups, random_state))
    for k in np.unique(number):
        train, test = np.flatnonzero(number != k), np.flatnonzero(number == k)
        sides = [len(np.unique(y[part])) for part in (train, test)]
        if min(sides) > 1:
            yield train, test
