"""From states and labels to a direction: RFM, mean difference, PCA, logistic probe, linear discriminant, or your own.

Two kinds of vector come out, and a linear map carries them differently (`Direction.space` says which one it is):

- a *displacement* is a difference of states: mean difference, PCA, and every pattern;
- a *covector* (gradient, filter) is read off with an inner product: RFM, logistic probe, linear discriminant.
  `Sigma w`, with Sigma the covariance of the states, is the displacement that goes with the filter w.

Sources: Haufe et al., NeuroImage 87:96 (2014) for patterns; Beaglehole et al., arXiv 2502.03708, Science 391:787 (2026)
for the RFM and the PCA baseline; Ledoit and Wolf, J. Multivariate Analysis 88:365 (2004) for the shrinkage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Num
from sklearn.base import BaseEstimator
from torch import Tensor

from ..numeric import as_matrix, unit
from .labels import as_labels, auc, grouped_folds, is_binary, pearson, row_names
from .methods import METHODS, of_estimator

Kind = Literal["gradient", "pattern"]
Method = str | BaseEstimator | Callable[..., Any]
States = Num[Tensor, "n d"] | Num[np.ndarray, "n d"]


@dataclass(frozen=True, repr=False, eq=False)
class Direction:
    """A unit vector (or several) in the space of states, pointing to the positive class.

    Attributes:
        vector: [d], or [k, d], rows of unit norm, float64.
        space: "displacement" (a difference of states) or "covector" (read with an inner product).
        method: how it was found.
        details: plain numbers: `held_out_auc` and `held_out_correlation` (of labels with the first vector's inner
            products, mean over folds that split no group), `correlation` on all rows, and the method's own.
    """

    vector: Float[Tensor, "*k d"]
    space: Literal["displacement", "covector"]
    method: str = "given"
    details: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vector.ndim not in (1, 2):
            raise ValueError(f"vector must be [d] or [k, d], but has shape {tuple(self.vector.shape)}.")
        object.__setattr__(self, "vector", unit(self.vector.detach().double()))

    @property
    def kind(self) -> Kind:
        """The name of its space in method settings: "gradient" for a covector, "pattern" for a displacement."""
        return "gradient" if self.space == "covector" else "pattern"

    def pattern(self, X: States) -> Direction:
        """This covector (each one) as a displacement, `Sigma w / ||Sigma w||` with the covariance of `X` [n, d].

        Haufe et al. (2014); `Xc' (Xc w)`, never d x d.

        Raises:
            ValueError: it is a displacement already, or `X` has another width or does not vary along it.
        """
        if self.space == "displacement":
            raise ValueError(f"pattern() needs a covector, but this {self.method} direction is a displacement: use it.")
        rows = as_matrix(X).to(self.vector.device)
        if rows.shape[1] != self.vector.shape[-1]:
            found = f"width {rows.shape[1]}, but the direction {self.vector.shape[-1]}"
            raise ValueError(f"X has {found}: use its own layer.")
        rows = rows - rows.mean(0)
        along = rows @ self.vector.reshape(-1, rows.shape[1]).T
        vector = unit((along.T @ rows).reshape(self.vector.shape), "pattern")
        return replace(self, vector=vector, space="displacement")

    def auc(self, X: States, y: Any) -> float:
        """AUC of two-valued `y` [n] against the inner products of `X` [n, d] with the (first) vector.

        Raises:
            ValueError: `y` is not one finite number a row, or all the same.
        """
        rows = as_matrix(X).to(self.vector.device)
        labels = torch.as_tensor(as_labels(y, len(rows))).to(rows.device)
        return auc(labels, rows @ self.vector.reshape(-1, rows.shape[1])[0])

    def __neg__(self) -> Direction:
        flipped = {k: -v if "correlation" in k else v for k, v in self.details.items()}
        if "held_out_auc" in flipped:
            flipped["held_out_auc"] = 1 - flipped["held_out_auc"]
        return replace(self, vector=-self.vector, details=flipped)

    def __repr__(self) -> str:
        numbers = "".join(f", {name}={value:.3g}" for name, value in self.details.items())
        return f"Direction({self.method} {self.kind}, {self.space}, shape={tuple(self.vector.shape)}{numbers})"


def _checked(X: Any, y: Any, groups: Any, same: Any) -> tuple[Tensor, Tensor]:
    rows = as_matrix(X)
    labels = as_labels(y, len(rows))
    for name, names in (("groups", groups), ("same", same)):
        row_names(names, len(labels), name)
    return rows, torch.as_tensor(labels).to(rows.device)


def _find(
    X: Tensor, y: Tensor, method: Any, kind: Kind | None, groups: Any, random_state: Any, settings: dict[str, Any]
) -> Direction:
    if isinstance(method, str) and method in METHODS:
        name, (finder, space, needs_classes) = method, METHODS[method]
        if needs_classes and not is_binary(y.cpu().numpy()):
            found = f"{len(y.unique())} distinct values"
            raise ValueError(f"{method} needs two classes, but y has {found}: use rfm or mean_difference.")
        vector, details = finder(X, y, groups, random_state, **settings)
    elif isinstance(method, BaseEstimator):
        name, space = type(method).__name__, "covector"
        vector, details = of_estimator(method, X, y, groups, **settings)
    elif callable(method):
        name = getattr(method, "__name__", type(method).__name__)
        space = "displacement" if kind is None else "covector"
        vector, details = torch.as_tensor(method(X, y, **settings)).detach().to(X), {}
    else:
        raise ValueError(f"Unknown method {method!r}: use {', '.join(METHODS)}, a callable or an estimator.")
    if space == "displacement" and kind == "gradient":
        raise ValueError(f"{name} is a displacement and has no gradient: leave kind out, or use rfm, logistic or lda.")
    if vector.shape[-1:] != X.shape[1:] or vector.ndim > 2:
        found = f"shape {tuple(vector.shape)}, but X has width {X.shape[1]}"
        raise ValueError(f"{name} gave {found}: return [d] or [k, d].")
    vector = unit(vector.reshape(-1, X.shape[1]), name)
    r = [pearson(y, X @ v) for v in vector]
    vector = vector * vector.new_tensor([-1.0 if value < 0 else 1.0 for value in r])[:, None]
    vector = vector[0] if len(vector) == 1 else vector
    direction = Direction(vector, space, name, details={"correlation": abs(r[0]), **details})
    return direction.pattern(X) if kind == "pattern" and space == "covector" else direction


def _held_out(
    X: Tensor,
    y: Tensor,
    method: Any,
    kind: Kind | None,
    groups: Any,
    random_state: Any,
    folds: int,
    same: Any,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Means over the folds on which the method finds a direction, which few rows may not be enough for.

    Raises:
        ValueError: it finds one on none of the folds.
    """
    names, labels = None if groups is None else np.asarray(groups), y.cpu().numpy()
    scores: dict[str, list[float]] = {"held_out_auc": [], "held_out_correlation": []}
    failure = None
    for train, test in grouped_folds(labels, names, folds, random_state, same) if folds else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said once, of all rows
            some = None if names is None else names[train]
            try:
                found = _find(X[train], y[train], method, kind, some, random_state, settings)
            except ValueError as error:
                failure = error
                continue
        along = X[test] @ found.vector.reshape(-1, X.shape[1])[0]
        scores["held_out_correlation"].append(pearson(y[test], along))
        if is_binary(labels):
            scores["held_out_auc"].append(auc(y[test], along))
    if failure is not None and not scores["held_out_correlation"]:
        raise failure
    return {name: float(np.mean(values)) for name, values in scores.items() if values}


def find_direction(
    X: States,
    y: Any,
    method: Method = "rfm",
    kind: Kind | None = None,
    groups: Any = None,
    random_state: Any = 0,
    *,
    folds: int = 5,
    same: Any = None,
    **settings: Any,
) -> Direction:
    """The direction in `X` that goes with `y`.

    Args:
        X: states [n, d].
        y: labels [n]: two values (the larger is the positive class), or real values for rfm, mean_difference and pca.
        method: "rfm" (arXiv 2502.03708); "mean_difference" (for real values, the covariance with y); "pca" (of pair
            differences with random signs where groups and two classes are given, else of the states); "logistic" (C
            chosen by log loss on folds that split no group); "lda" (within-class covariance, shrunk after
            Ledoit and Wolf 2004); an estimator with `directions_` or `coef_`, taken as covectors; or a callable `(X, y,
            **settings)` giving [d] or [k, d], taken as a displacement unless `kind` is given.
        kind: "gradient" (the covector itself, the default of methods that give one) or "pattern" (a displacement; Haufe et
            al. 2014).
        groups: [n] names, such as the number of the contrast pair; the rows of one group stay on one side of a split.
        random_state: seed of the splits and of PCA's signs.
        folds: for `details["held_out_auc"]` and `["held_out_correlation"]` the whole search is repeated on this many
            grouped folds; 0 leaves them out. There are none where no fold has enough rows.
        same: [n] names of which copies share one, such as `LabelledTexts.same`: no fold has copies of a row on both sides.
        settings: passed on: those of `RecursiveFeatureMachine` for rfm, `n_components` for pca, `C` for logistic,
            `shrinkage` in [0, 1] for lda.

    Returns:
        Unit float64 vector [d], or [k, d] for several components, each with a positive correlation of y with X v.

    Raises:
        ValueError: X or y hold NaN, differ in length or show one class only; the method is unknown, needs two classes,
            or cannot give the kind; or the result is no direction.
    """
    rows, labels = _checked(X, y, groups, same)
    direction = _find(rows, labels, method, kind, groups, random_state, settings)
    held_out = {}
    with suppress(ValueError):  # what finds a direction in all rows may find none in those of a fold
        held_out = _held_out(rows, labels, method, kind, groups, random_state, folds, same, settings)
    return replace(direction, details={**held_out, **direction.details})


def held_out_auc(
    X: States,
    y: Any,
    method: Method = "rfm",
    kind: Kind | None = None,
    groups: Any = None,
    random_state: Any = 0,
    *,
    folds: int = 5,
    same: Any = None,
    **settings: Any,
) -> float:
    """Mean over grouped folds of the AUC of a direction found on the others; arguments as in `find_direction`.

    Raises:
        ValueError: y has more than two values, no fold has both classes on both sides, or a direction in none of them.
    """
    rows, labels = _checked(X, y, groups, same)
    found = _held_out(rows, labels, method, kind, groups, random_state, folds, same, settings)
    if "held_out_auc" not in found:
        seen = len(labels.unique())
        raise ValueError(f"AUC needs two classes in each of {folds} folds, but y has {seen}: add groups.")
    return found["held_out_auc"]
