"""Maps from the expert's state space (width d_expert) to the target's (width d_target).

Row i of `expert_states` and row i of `target_states` come from the same text. Every aligner centres both sides, works
in float64, and keeps what it learnt as float64 tensors. With the means m_E, m_T, a linear aligner learns

    coef_         [d_expert, d_target]   forward map:  target state  = m_T + (expert state - m_E) @ coef_
    reverse_coef_ [d_target, d_expert]   backward map: expert state ~= m_E + (target state - m_T) @ reverse_coef_

Two kinds of direction map differently. A *displacement* d (mean difference, pattern) is a difference of states and goes
forward, d @ coef_. A *covector* w (probe weights, AGOP eigenvector) reads a state, x -> w.x, and is pulled back:
w.(y @ reverse_coef_) = y.(reverse_coef_ @ w), so the target reads the same with reverse_coef_ @ w.

No anchor may be one of the labelled texts: least squares would carry the labels over for any expert, a random one too.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ..numeric import as_matrix, like, unit
from .linear import Kind, chain, check_kind

A = TypeVar("A", bound="Aligner")
MASSIVE = 5.0  # median norms: no ordinary activation is longer
MASSIVE_COORDINATE = 2.0  # median norms: no ordinary coordinate is further from its median, anywhere
RARE = 1e-3  # of the anchors: so few rows with a massive coordinate are left out by themselves
CONCENTRATED = 1 / 8  # of the width: over how many coordinates a row with a massive one is spread at most


def ordinary_rows(*sides: Float[Tensor, "anchor _"]) -> Bool[Tensor, " anchor"]:
    """Which anchors to fit a map on: those without a massive activation in any model, `[anchor]`.

    At a few tokens, mostly the first ones, a model has activations of a hundred times the usual norm, which say nothing of
    the text (Sun et al., 2024, arXiv 2402.17762). A few such rows turn a least-squares map.

    Args:
        sides: activations of the same anchors in each model, `[anchor, hidden]`.
    """
    norms = [side.norm(dim=1) for side in sides]
    return torch.stack([(n <= MASSIVE * n.median()).cpu() for n in norms]).all(0)


def massive_coordinates(
    anchors: Float[Tensor, "anchor hidden"], labelled: Float[Tensor, "text hidden"] | None = None
) -> Bool[Tensor, " hidden"]:
    """The coordinates that hold massive activations: most models have none, and some have two or three.

    It takes one labelled text, or one in a thousand anchors: where fewer have them, `ordinary_rows` leaves out those. A row
    counts if few coordinates hold nearly all of it (a participation ratio below an eighth of the width), so that one which is
    large everywhere counts nothing.

    Args:
        anchors: activations of one layer; the median norm of their rows is the unit.
        labelled: activations of this layer that a direction is found in.
    """
    wide = anchors.float()
    center, unit = wide.median(0).values, wide.norm(dim=1).median()

    def counts(states: Tensor) -> Tensor:
        squares = (states.float() - center).square()
        far = squares > (MASSIVE_COORDINATE * unit) ** 2
        rows = far.any(1)
        mine, far = squares[rows], far[rows]
        few = (
            mine.sum(1).square() / mine.square().sum(1) < CONCENTRATED * states.shape[1]
        )  # never of a row that is not finite
        return (far & few[:, None]).sum(0)

    found = counts(anchors) > RARE * len(anchors)
    return found if labelled is None else found | (counts(labelled) > 0).to(found.device)


def without_massive(
    anchors: Float[Tensor, "anchor hidden"], labelled: Float[Tensor, "text hidden"]
) -> tuple[Float[Tensor, "anchor hidden"], Float[Tensor, "text hidden"]]:
    """Both with zeros in the massive coordinates: a map and a direction leave these out.

    A model keeps its massive activations in a few coordinates, the same for all texts (Sun et al., 2024, arXiv 2402.17762). At a
    full stop they may have any size from none to many times the rest, and a difference of means is then mostly theirs, and noise.

    Args:
        anchors: as in `massive_coordinates`.
        labelled: the same.
    """
    massive = massive_coordinates(anchors, labelled)
    if not bool(massive.any()):
        return anchors, labelled
    return anchors.masked_fill(massive, 0.0), labelled.masked_fill(massive.to(labelled.device), 0.0)


class Aligner(TransformerMixin, BaseEstimator):
    """What every aligner does. A subclass defines `_fit`, on centred float64 states.

    Attributes:
        coef_: forward map, `[d_expert, d_target]`.
        reverse_coef_: backward map, `[d_target, d_expert]`.
        intercept_: `[d_target]`, so that `transform(X) = X @ coef_ + intercept_`.
        expert_mean_, target_mean_: means of the anchors' states, `[d_expert]` and `[d_target]`.
        n_features_in_, n_features_out_: d_expert and d_target.
    """

    n_features_in_: int

    def fit(self: A, X: Any, y: Any = None) -> A:
        """Learn the map from paired anchors.

        Args:
            X: expert_states, `[text, d_expert]`, a tensor or array.
            y: target_states, `[text, d_target]`; row i is the same text as row i of `X`.

        Raises:
            ValueError: no `y`, row counts that differ, fewer than two rows, or NaN or infinity.
        """
        states = self._input(X, reset=True)
        targets = self._no_target(states) if y is None else as_matrix(y, "target_states", flat=True).to(states.device)
        if len(states) != len(targets):
            found = f"expert_states has {len(states)} rows and target_states {len(targets)}"
            raise ValueError(f"{found}: row i of both must be the same text.")
        self.expert_mean_, self.target_mean_ = states.mean(0), targets.mean(0)
        self.n_features_out_ = targets.shape[1]
        self._fit(states - self.expert_mean_, targets - self.target_mean_)
        return self

    def transform(self, X: Any) -> Float[Tensor, "text d_target"] | Float[np.ndarray, "text d_target"]:
        """States in the target's space, `[text, d_target]`, in the container of `X` (`[text, d_expert]`).

        Raises:
            NotFittedError: before `fit`.
            ValueError: another width than at fit, or NaN or infinity.
        """
        check_is_fitted(self)
        return like(self._transform(self._input(X)), X)

    def map_direction(
        self, v: Float[Tensor, "*k d_expert"] | Float[np.ndarray, "*k d_expert"], kind: Kind
    ) -> Float[Tensor, "*k d_target"] | Float[np.ndarray, "*k d_target"]:
        """Carry one direction or several into the target's space, always as unit vectors.

        Args:
            v: `[d_expert]` or `[k, d_expert]`; its length has no effect, its sign does.
            kind: "displacement" (a difference of states) or "covector" (weights that read a state).

        Raises:
            NotFittedError: before `fit`.
            ValueError: another kind or width, or a direction that the map sends to zero.
        """
        check_is_fitted(self)
        check_kind(kind)
        rows = as_matrix(v if v.ndim == 2 else v[None], "direction").to(self.expert_mean_)
        if rows.shape[1] != self.n_features_in_:
            fitted = f"{type(self).__name__} was fitted on expert states of width {self.n_features_in_}"
            raise ValueError(f"The direction has width {rows.shape[1]}, but {fitted}.")
        out = self._map(unit(rows), kind)
        if bool((out == 0).all(1).any()):
            span = f"it lies outside of what the {type(self).__name__}'s anchors span"
            raise ValueError(f"The {kind} maps to zero: {span}. Fit on more texts, or on texts in which it varies.")
        return like(unit(out).reshape(*v.shape[:-1], -1), v)

    def score(self, X: Any, y: Any) -> float:
        """R² pooled over coordinates: 1 - ||y - transform(X)||² / ||y - target_mean_||². Use held-out texts.

        Args:
            X: expert_states, `[text, d_expert]`.
            y: target_states, `[text, d_target]`.

        Raises:
            ValueError: row counts or widths that differ, or target states that are all `target_mean_`.
        """
        check_is_fitted(self)
        mapped = self._transform(self._input(X))
        targets = as_matrix(y, "target_states", flat=True).to(mapped.device)
        if targets.shape != mapped.shape:
            found = f"{tuple(targets.shape)}, and the mapped expert_states {tuple(mapped.shape)}"
            raise ValueError(f"target_states has shape {found}: give the same texts, and the width at fit.")
        total = (targets - self.target_mean_).square().sum()
        if total == 0:
            raise ValueError("target_states do not vary: R² is not defined. Score on states of different texts.")
        return float(1 - (targets - mapped).square().sum() / total)

    def _input(self, X: Any, reset: bool = False) -> Tensor:
        states = as_matrix(X, "expert_states")
        if reset and len(states) < 2:
            raise ValueError("expert_states has n_samples = 1: a map needs at least two texts.")
        validate_data(self, X, reset=reset, skip_check_array=True)  # n_features_in_, feature_names_in_
        return states if reset else states.to(self.expert_mean_.device)

    def _no_target(self, X: Tensor) -> Tensor:
        missing = f"{type(self).__name__} requires y to be passed, but the target y is None"
        raise ValueError(f"{missing}: give the target's states for the same texts.")

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} defines no _fit: use one of the aligners.")

    def _set_maps(self, coef: Tensor, reverse: Tensor) -> None:
        self.coef_, self.reverse_coef_ = coef, reverse
        self.intercept_ = self.target_mean_ - self.expert_mean_ @ coef

    def _transform(self, X: Tensor) -> Tensor:
        return X @ self.coef_ + self.intercept_

    def _map(self, v: Tensor, kind: Kind) -> Tensor:
        return chain(v, self.coef_ if kind == "displacement" else self.reverse_coef_.T)

    def _copy(self: A) -> A:
        return cast("A", clone(self))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = tags.target_tags.multi_output = True
        tags.target_tags.single_output = False
        return tags
