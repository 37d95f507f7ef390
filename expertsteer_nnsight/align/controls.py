"""Controls of an alignment: pairs that were shuffled, and a random map."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils import check_random_state
from torch import Tensor

from ..numeric import as_matrix, like, unit
from .aligner import Aligner
from .closed_form import CovarianceAligner, ProcrustesAligner, RidgeAligner
from .linear import Kind, Seed, chain, check_kind, gaussian, shuffle, thin_svd


class PermutedAligner(Aligner):
    """Control: `aligner` fitted on shuffled pairs, so that no row keeps its partner.

    It shows what the method yields from the two sets of states without their correspondence. It does not show what
    text features without an expert would yield: for that, give the aligner an untrained expert's states.

    Args:
        aligner: what is fitted (a clone of it); None is `RidgeAligner()`.
        random_state: seed of the permutation.

    Attributes:
        aligner_: the fitted clone.
    """

    def __init__(self, aligner: Aligner | None = None, random_state: Seed = 0) -> None:
        self.aligner = aligner
        self.random_state = random_state

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        order = shuffle(len(X), check_random_state(self.random_state)).to(X.device)
        aligner = (self.aligner or RidgeAligner())._copy()
        self.aligner_ = aligner.fit(X + self.expert_mean_, (Y + self.target_mean_)[order])

    def _transform(self, X: Tensor) -> Tensor:
        return self.aligner_._transform(X)

    def _map(self, v: Tensor, kind: Kind) -> Tensor:
        return self.aligner_._map(v, kind)


class RandomAligner(Aligner):
    """Control: a Gaussian random map that gives the anchors the target's mean and total variance.

    Its reverse map is the transpose: for a Gaussian matrix about the inverse, up to a factor.
    """

    def __init__(self, random_state: Seed = 0) -> None:
        self.random_state = random_state

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        G = gaussian(X.shape[1], Y.shape[1], check_random_state(self.random_state)).to(X)
        size = (X @ G).norm()
        coef = G * (Y.norm() / size) if size > 0 else G
        self._set_maps(coef, coef.T)


def permuted_directions(
    aligner: Aligner,
    X: Float[Tensor, "text d_expert"] | Float[np.ndarray, "text d_expert"],
    y: Float[Tensor, "text d_target"] | Float[np.ndarray, "text d_target"],
    v: Float[Tensor, " d_expert"] | Float[np.ndarray, " d_expert"],
    kind: Kind,
    draws: int = 100,
    random_state: Seed = 0,
) -> Float[Tensor, "draws d_target"] | Float[np.ndarray, "draws d_target"]:
    """The null of a mapped direction: `v` mapped by `aligner` fitted on `draws` shufflings of the pairs.

    Draw 0 is that of `PermutedAligner(aligner, random_state)`. Ridge factors once and reorders one number a text for
    each draw; alpha="gcv" keeps the penalty of the true pairs, so that the draws differ in the pairing only. Covariance
    is as cheap, and Procrustes factors once. Other aligners are refitted for every draw.

    Args:
        aligner: its parameters are used; it is neither fitted nor changed.
        X: expert_states of the anchors, `[text, d_expert]`.
        y: target_states of the anchors, `[text, d_target]`.
        v: the direction in the expert's space, `[d_expert]`.
        kind: "displacement" or "covector", as in `Aligner.map_direction`.
        draws: number of shufflings.
        random_state: seed.

    Returns:
        Unit vectors `[draws, d_target]`, in the container of `v`.

    Raises:
        ValueError: as in `Aligner.fit` and `Aligner.map_direction`, or fewer than one draw.
    """
    states = as_matrix(X, "expert_states")
    targets = as_matrix(y, "target_states", flat=True).to(states.device)
    direction = as_matrix(v[None], "direction")[0].to(states)
    check_kind(kind)
    if len(states) != len(targets) or len(states) < 2 or states.shape[1] != len(direction) or draws < 1:
        raise ValueError(
            f"expert_states has shape {tuple(states.shape)}, target_states {tuple(targets.shape)}, the direction "
            f"{tuple(direction.shape)}, draws is {draws}: give two or more rows, row i of both the same text, a "
            "direction of the expert's width, and at least one draw."
        )
    rng = check_random_state(random_state)
    orders = [shuffle(len(states), rng).to(states.device) for _ in range(draws)]
    return like(unit(_permuted(aligner, states, targets, unit(direction), kind, orders), "A permuted direction"), v)


def _permuted(aligner: Aligner, X: Tensor, Y: Tensor, v: Tensor, kind: Kind, orders: list[Tensor]) -> Tensor:
    """`v` as `aligner` maps it when fitted on each order of the rows of `Y`, `[order, d_target]`."""
    # ridge and covariance map to [d_target, text] @ (one number for each expert text): only their order changes
    if isinstance(aligner, CovarianceAligner):
        fitted = aligner._copy().fit(X, Y)
        readout = v[None] if kind == "covector" else fitted._readout(v[None])
        scores, back = chain(readout, fitted.expert_anchors_.T)[0], fitted.target_anchors_
    elif isinstance(aligner, RidgeAligner):
        forward = kind == "displacement"
        source, other = (X - X.mean(0), Y - Y.mean(0)) if forward else (Y - Y.mean(0), X - X.mean(0))
        U, s, Vt = thin_svd(source)
        alpha, penalty = aligner._penalty(s, U.T @ other, source.shape[1], other)
        if aligner.max_rank is not None:
            return _refitted(aligner._copy().set_params(alpha=alpha), X, Y, v, kind, orders)
        pinv = (Vt.T * (s / (s.square() + penalty))) @ U.T
        scores, back = chain(v[None], pinv if forward else other.T)[0], other if forward else pinv.T
    elif isinstance(aligner, ProcrustesAligner):
        expert, (U, s, Vt), whiten = aligner._factored(X - X.mean(0), Y - Y.mean(0))
        maps = (aligner._rotated(expert, (U[order], s, Vt), whiten) for order in orders)
        return torch.cat([chain(v[None], coef if kind == "displacement" else reverse.T) for coef, reverse in maps])
    else:
        return _refitted(aligner, X, Y, v, kind, orders)
    return torch.stack([scores[order.argsort()] for order in orders]) @ back


def _refitted(aligner: Aligner, X: Tensor, Y: Tensor, v: Tensor, kind: Kind, orders: list[Tensor]) -> Tensor:
    return torch.cat([aligner._copy().fit(X, Y[order])._map(v[None], kind) for order in orders])
