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

from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from expertsteer_nnsight._numeric import as_matrix, like, unit

Kind = Literal["displacement", "covector"]
Seed = int | np.integer | np.random.RandomState | None
A = TypeVar("A", bound="Aligner")


class Aligner(TransformerMixin, BaseEstimator):
    """What every aligner does. A subclass defines `_fit`, on centred float64 states.

    Attributes:
        coef_: forward map, `[d_expert, d_target]`.
        reverse_coef_: backward map, `[d_target, d_expert]`.
        intercept_: `[d_target]`, so that `transform(X) = X @ coef_ + intercept_`.
        expert_mean_: mean of the anchors' expert states, `[d_expert]`.
        target_mean_: mean of the anchors' target states, `[d_target]`.
        n_features_in_: d_expert.
        n_features_out_: d_target.
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
        targets = self._no_target(states) if y is None else _targets(y).to(states.device)
        if len(states) != len(targets):
            raise ValueError(
                f"expert_states has {len(states)} rows and target_states {len(targets)}: row i of both must be the "
                "same text."
            )
        self.expert_mean_, self.target_mean_ = states.mean(0), targets.mean(0)
        self.n_features_out_ = targets.shape[1]
        self._fit(states - self.expert_mean_, targets - self.target_mean_)
        return self

    def transform(self, X: Any) -> Float[Tensor, "text d_target"] | Float[np.ndarray, "text d_target"]:
        """States in the target's space, `[text, d_target]`, in the container of `X` (`[text, d_expert]`)."""
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
            ValueError: another kind or width, or a direction that the map sends to zero.
        """
        check_is_fitted(self)
        if kind not in ("displacement", "covector"):
            raise ValueError(f"kind is {kind!r}: it must be 'displacement' or 'covector'.")
        rows = _states(v if v.ndim == 2 else v[None], "direction").to(self.expert_mean_)
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(
                f"The direction has width {rows.shape[1]}, but {type(self).__name__} was fitted on expert states of "
                f"width {self.n_features_in_}."
            )
        out = self._map(unit(rows), kind)
        if bool((out == 0).all(1).any()):
            raise ValueError(
                f"The {kind} maps to zero: it lies outside of what the {type(self).__name__}'s anchors span. Fit on "
                "more texts, or on texts in which the direction varies."
            )
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
        targets = _targets(y).to(mapped.device)
        if targets.shape != mapped.shape:
            raise ValueError(
                f"target_states has shape {tuple(targets.shape)}, and the mapped expert_states {tuple(mapped.shape)}: "
                "row i of both must be the same text, and the width the one at fit."
            )
        total = (targets - self.target_mean_).square().sum()
        if total == 0:
            raise ValueError("target_states do not vary: R² is not defined. Score on states of different texts.")
        return float(1 - (targets - mapped).square().sum() / total)

    def _input(self, X: Any, reset: bool = False) -> Tensor:
        states = _states(X, "expert_states")
        if reset and len(states) < 2:
            raise ValueError("expert_states has n_samples = 1: a map needs at least two texts.")
        validate_data(self, X, reset=reset, skip_check_array=True)  # n_features_in_, feature_names_in_
        return states if reset else states.to(self.expert_mean_.device)

    def _no_target(self, X: Tensor) -> Tensor:
        raise ValueError(
            f"{type(self).__name__} requires y to be passed, but the target y is None: give the target's states for "
            "the same texts."
        )

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} defines no _fit: use one of the aligners.")

    def _set_maps(self, coef: Tensor, reverse: Tensor) -> None:
        self.coef_, self.reverse_coef_ = coef, reverse
        self.intercept_ = self.target_mean_ - self.expert_mean_ @ coef

    def _transform(self, X: Tensor) -> Tensor:
        return X @ self.coef_ + self.intercept_

    def _map(self, v: Tensor, kind: Kind) -> Tensor:
        return _chain(v, self.coef_ if kind == "displacement" else self.reverse_coef_.T)

    def _permuted(self, X: Tensor, Y: Tensor, v: Tensor, kind: Kind, orders: list[Tensor]) -> Tensor:
        return torch.cat([_copy(self).fit(X, Y[order])._map(v[None], kind) for order in orders])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = tags.target_tags.multi_output = True
        tags.target_tags.single_output = False
        return tags


class RidgeAligner(Aligner):
    """Affine least squares on paired anchors with a relative L2 penalty: alpha * tr(XᵀX) / d_expert.

    One thin SVD of each side (a factor of n rows, so the dual form when n < d); the reverse map, for covectors, is
    fitted too, with a penalty of its own. Linear maps between models: arXiv 2501.02009, 2506.06609.

    Args:
        alpha: relative penalty of both maps, or "gcv": the least generalised cross-validation error (Golub, Heath and
            Wahba 1979; pooled over coordinates) on a log grid, chosen for each map.
        alpha_range: ends of that grid.
        n_alphas: its size.
        max_rank: keep only this many right singular vectors of the fitted values (reduced-rank regression).

    Attributes:
        alpha_: relative penalty of the forward map.
        reverse_alpha_: relative penalty of the reverse map.
    """

    def __init__(
        self,
        alpha: float | int | Literal["gcv"] = "gcv",
        alpha_range: tuple[float, float] = (1e-6, 1e3),
        n_alphas: int = 28,
        max_rank: int | None = None,
    ) -> None:
        self.alpha = alpha
        self.alpha_range = alpha_range
        self.n_alphas = n_alphas
        self.max_rank = max_rank

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        forward, self.alpha_ = self._solve(X, Y)
        reverse, self.reverse_alpha_ = self._solve(Y, X)
        self._set_maps(forward, reverse)

    def _solve(self, X: Tensor, Y: Tensor) -> tuple[Tensor, float]:
        """`(XᵀX + penalty I)⁻¹ XᵀY` of centred `X`, `Y`, and the relative penalty."""
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank is {self.max_rank}: it must be at least 1, or None for full rank.")
        U, s, Vt = _svd(X)
        alpha, penalty = self._penalty(U, s, X.shape[1], Y)
        projected = U.T @ Y
        coef = Vt.T @ ((s / (s.square() + penalty))[:, None] * projected)
        if self.max_rank is not None and self.max_rank < Y.shape[1]:
            fitted = (s.square() / (s.square() + penalty))[:, None] * projected  # the fitted values, in U's coordinates
            P = torch.linalg.svd(fitted, full_matrices=False).Vh[: self.max_rank]
            coef = (coef @ P.T) @ P
        return coef, alpha

    def _penalty(self, U: Tensor, s: Tensor, width: int, Y: Tensor) -> tuple[float, Tensor]:
        """The relative penalty and the absolute one."""
        unit_penalty = s.square().sum() / width
        alpha = self.alpha
        if isinstance(alpha, str):
            if alpha != "gcv":
                raise ValueError(f"alpha is {alpha!r}: it must be 'gcv' or a number >= 0.")
            low, high = self.alpha_range
            grid = torch.as_tensor(np.geomspace(low, high, self.n_alphas)).to(s)
            alpha = float(grid[_gcv(U, s, Y, grid * unit_penalty).argmin()])
        elif alpha < 0:
            raise ValueError(f"alpha is {alpha}: it must be 'gcv' or a number >= 0.")
        return float(alpha), alpha * unit_penalty

    def _permuted(self, X: Tensor, Y: Tensor, v: Tensor, kind: Kind, orders: list[Tensor]) -> Tensor:
        forward = kind == "displacement"
        source, other = (X - X.mean(0), Y - Y.mean(0)) if forward else (Y - Y.mean(0), X - X.mean(0))
        U, s, Vt = _svd(source)
        alpha, penalty = self._penalty(U, s, source.shape[1], other)
        if self.max_rank is not None:
            return Aligner._permuted(_copy(self).set_params(alpha=alpha), X, Y, v, kind, orders)
        pinv = (Vt.T * (s / (s.square() + penalty))) @ U.T
        # both kinds are [d_target, text] @ (one number for each expert text): only those numbers' order changes
        scores = _chain(v[None], pinv if forward else other.T)[0]
        shuffled = torch.stack([scores[order.argsort()] for order in orders])
        return shuffled @ (other if forward else pinv.T)


class ProcrustesAligner(Aligner):
    """A rotation of the anchors' expert states onto their target states.

    Equal widths and no `n_components`: orthogonal Procrustes, as `scipy.linalg.orthogonal_procrustes` on centred
    states. With n <= d anchors it rotates only what they span and sends the rest to zero (SciPy completes arbitrarily).
    Otherwise: PCA-whiten both sides to r dimensions, rotate, un-whiten into the target.

    Args:
        n_components: r. None with unequal widths: a tenth of the anchors, at most the rank of either side.
        scale: multiply by the least-squares factor, because residual norms differ up to a thousandfold between models.
            It changes `transform` and `score`, not directions.

    Attributes:
        scale_: that factor of the forward map; 1 without `scale`.
        n_components_: dimensions that were rotated.
    """

    def __init__(self, n_components: int | None = None, scale: bool = True) -> None:
        self.n_components = n_components
        self.scale = scale

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        (Ux, sx, Vx), (Uy, sy, Vy) = _svd(X), _svd(Y)
        r = min(len(sx), len(sy))
        whiten = self.n_components is not None or X.shape[1] != Y.shape[1]
        if self.n_components is not None and not 1 <= self.n_components <= r:
            raise ValueError(
                f"n_components is {self.n_components}: the anchors span {len(sx)} dimensions of the expert and "
                f"{len(sy)} of the target, so it must be from 1 to {r}."
            )
        if whiten:
            r = self.n_components or min(r, max(1, len(X) // 10))
            Ux, sx, Vx, Uy, sy, Vy = Ux[:, :r], sx[:r], Vx[:r], Uy[:, :r], sy[:r], Vy[:r]
        cross = Ux.T @ Uy
        L, _, Rt = torch.linalg.svd(cross if whiten else sx[:, None] * cross * sy, full_matrices=False)
        rotation = L @ Rt
        if whiten:
            coef = (Vx.T / sx) @ rotation @ (sy[:, None] * Vy)
            reverse = (Vy.T / sy) @ rotation.T @ (sx[:, None] * Vx)
        else:
            coef = Vx.T @ rotation @ Vy
            reverse = coef.T
        self.n_components_ = r
        self.scale_ = _best_scale(X @ coef, Y) if self.scale else 1.0
        self._set_maps(self.scale_ * coef, (_best_scale(Y @ reverse, X) if self.scale else 1.0) * reverse)


class AutoencoderAligner(Aligner):
    """The paper's alignment (arXiv 2505.12313): an affine encoder and decoder, trained only to reconstruct the expert.

    `y` gives nothing but its width (and the mean that `score` compares with). Replacing (encoder, decoder) by
    (encoder A, A⁻¹ decoder), A invertible, leaves the loss as it is: nothing ties the encoded axes to the target's, and
    another `random_state` gives another, unrelated direction. `score` against the target is therefore near or below 0;
    what the paper can report is `reconstruction_score`. The encoder is `coef_`, the decoder `reverse_coef_`.

    Args:
        solver: "closed_form" (the PCA optimum, W_e = V_r Qᵀ with Q orthonormal, exact) or "adam". Solver and what
            follows are ours; the sources that could be read give the loss and the affine form.
        width: d_target, if no `y` is given (`target_mean_` is then zero).
        init: Q, or Adam's start. "random": seeded, orthonormal (closed form) or Gaussian (Adam); "pca": component i on
            axis i; "identity": for equal widths, keeps a basis that two models of one family share.
        lr: Adam's first learning rate, on states divided by one global scale; halved whenever the loss stalls.
        batch_size: texts a step.
        max_epochs: passes over the anchors, at most.
        tol: a loss that ten epochs lower by less than this share has stalled; Adam stops once lr fell a thousandfold.
            It comes within 1 % of the closed form's loss unless the spectrum is steep; there it can need more epochs.
        random_state: seed of Q, the start and the batches.

    Attributes:
        reverse_intercept_: the decoder's, `[d_expert]`.
        n_epochs_: epochs run; 0 in closed form.
    """

    def __init__(
        self,
        solver: Literal["closed_form", "adam"] = "closed_form",
        width: int | None = None,
        init: Literal["random", "pca", "identity"] = "random",
        lr: float = 1e-2,
        batch_size: int = 256,
        max_epochs: int = 1000,
        tol: float = 1e-5,
        random_state: Seed = 0,
    ) -> None:
        self.solver = solver
        self.width = width
        self.init = init
        self.lr = lr
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.tol = tol
        self.random_state = random_state

    def inverse_transform(self, Z: Any) -> Float[Tensor, "text d_expert"] | Float[np.ndarray, "text d_expert"]:
        """Decode `Z`, `[text, d_target]`, to expert states `[text, d_expert]`."""
        check_is_fitted(self)
        codes = _states(Z, "encoded states").to(self.expert_mean_.device)
        if codes.shape[1] != self.n_features_out_:
            raise ValueError(f"The codes have width {codes.shape[1]}, but the decoder takes {self.n_features_out_}.")
        return like(self._decode(codes), Z)

    def reconstruction_loss(self, X: Any) -> float:
        """Mean over the texts of ||h - decoder(encoder(h))||², for expert_states `X`, `[text, d_expert]`."""
        check_is_fitted(self)
        states = self._input(X)
        return float((states - self._decode(self._transform(states))).square().sum(1).mean())

    def reconstruction_score(self, X: Any) -> float:
        """R² of the reconstruction of `X`, `[text, d_expert]`, pooled over coordinates: what the loss is about."""
        loss = self.reconstruction_loss(X)
        total = (self._input(X) - self.expert_mean_).square().sum(1).mean()
        if total == 0:
            raise ValueError("expert_states do not vary: R² is not defined. Score on states of different texts.")
        return 1 - loss / float(total)

    def _decode(self, Z: Tensor) -> Tensor:
        return Z @ self.reverse_coef_ + self.reverse_intercept_

    def _no_target(self, X: Tensor) -> Tensor:
        return super()._no_target(X) if self.width is None else X.new_zeros(len(X), self.width)

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        d, width = X.shape[1], Y.shape[1]
        if self.width not in (None, width):
            raise ValueError(f"width is {self.width}, but target_states has width {width}: leave one of them out.")
        if self.solver not in ("closed_form", "adam") or self.init not in ("random", "pca", "identity"):
            raise ValueError(
                f"solver is {self.solver!r} and init {self.init!r}: they must be 'closed_form' or 'adam', and "
                "'random', 'pca' or 'identity'."
            )
        if self.init == "identity" and d != width:
            raise ValueError(f"init='identity' needs equal widths: the expert has {d}, the target {width}.")
        rng = check_random_state(self.random_state)
        if self.init == "identity":
            encoder = torch.eye(d).to(X)
        else:
            V = _svd(X)[2][:width]  # a target wider than the states' rank reconstructs them exactly
            Q = _orthonormal(width, len(V), rng).to(X) if self.init == "random" else torch.eye(width, len(V)).to(X)
            encoder = V.T @ Q.T
        decoder, bias_e, bias_d = encoder.T, X.new_zeros(width), X.new_zeros(d)
        self.n_epochs_ = 0
        if self.solver == "adam":
            if self.init == "random":
                encoder, decoder = _gaussian(d, width, rng).to(X), _gaussian(width, d, rng).to(X)
            scale = float(X.norm(dim=1).mean()) / d**0.5 or 1.0  # one number: the geometry stays, lr means the same
            encoder, bias_e, decoder, bias_d = self._adam(X / scale, [encoder, bias_e, decoder, bias_d], rng)
            encoder, decoder, bias_d = encoder / scale, decoder * scale, bias_d * scale
        self.coef_, self.intercept_ = encoder, bias_e - self.expert_mean_ @ encoder
        self.reverse_coef_, self.reverse_intercept_ = decoder, bias_d + self.expert_mean_

    def _adam(self, X: Tensor, start: list[Tensor], rng: np.random.RandomState) -> list[Tensor]:
        with torch.enable_grad():
            params = [p.clone().requires_grad_() for p in start]
            E, e, D, d = params
            optimizer = torch.optim.Adam(params, lr=self.lr)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.5, patience=10, threshold=self.tol
            )
            for epoch in range(self.max_epochs):
                total = 0.0
                for rows in torch.as_tensor(rng.permutation(len(X))).to(X.device).split(self.batch_size):
                    x = X[rows]
                    loss = ((x @ E + e) @ D + d - x).square().sum()
                    optimizer.zero_grad()
                    (loss / x.numel()).backward()
                    optimizer.step()
                    total += float(loss.detach())
                schedule.step(total)
                self.n_epochs_ = epoch + 1
                if schedule.get_last_lr()[0] < 1e-3 * self.lr:
                    break
        return [p.detach() for p in params]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.width is None
        return tags


class CovarianceAligner(Aligner):
    """No map between the spaces: the target displacement that co-occurs with the expert's readout over the anchors.

    A covector w goes to Cov(h_target, w.h_expert), the pattern of Haufe et al. (NeuroImage 87, 2014, eq. 6) across
    models, in O(text * (d_expert + d_target)). Anchors in the concept's domain matter more than their number.
    A displacement is no readout; it becomes one by the shrunk inverse covariance of the expert's anchors, w = (XᵀX +
    penalty I)⁻¹ d, and that is the ridge map with this penalty. `transform` is this ridge map too. So only for
    covectors does it differ from `RidgeAligner(alpha)`.

    Args:
        alpha: relative penalty of displacements and `transform`, as in `RidgeAligner`, above 0; covectors need none.

    Attributes:
        expert_anchors_: centred, `[text, d_expert]`; kept in place of a `[d_expert, d_target]` map.
        target_anchors_: centred, `[text, d_target]`.
    """

    def __init__(self, alpha: float | int = 0.1) -> None:
        self.alpha = alpha

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}: it must be above 0. It has no effect on covectors.")
        self.expert_anchors_, self.target_anchors_ = X, Y

    def _transform(self, X: Tensor) -> Tensor:
        readout = self._readout(X - self.expert_mean_)
        return self.target_mean_ + (readout @ self.expert_anchors_.T) @ self.target_anchors_

    def _map(self, v: Tensor, kind: Kind) -> Tensor:
        readout = v if kind == "covector" else self._readout(v)
        return _chain(readout, self.expert_anchors_.T, self.target_anchors_)

    def _readout(self, v: Tensor) -> Tensor:
        """`v @ (XᵀX + penalty I)⁻¹`, through the smaller of the two Gram matrices."""
        X = self.expert_anchors_
        n, d = X.shape
        penalty = self.alpha * X.square().sum() / d
        if penalty == 0:
            return torch.zeros_like(v)
        gram = X @ X.T if n < d else X.T @ X
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram)).to(X))
        if n >= d:
            return torch.cholesky_solve(v.T, factor).T
        return (v - torch.cholesky_solve(X @ v.T, factor).T @ X) / penalty

    def _permuted(self, X: Tensor, Y: Tensor, v: Tensor, kind: Kind, orders: list[Tensor]) -> Tensor:
        fitted = _copy(self).fit(X, Y)
        readout = v[None] if kind == "covector" else fitted._readout(v[None])
        scores = _chain(readout, fitted.expert_anchors_.T)[0]
        return torch.stack([scores[order.argsort()] for order in orders]) @ fitted.target_anchors_


class IdentityAligner(Aligner):
    """States and directions as they are, for models of one family that may share a basis. Widths must be equal."""

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        if X.shape[1] != Y.shape[1]:
            raise ValueError(
                f"IdentityAligner needs equal widths, but the expert has {X.shape[1]} and the target {Y.shape[1]}: "
                "use RidgeAligner."
            )

    def _transform(self, X: Tensor) -> Tensor:
        return X.clone()

    def _map(self, v: Tensor, kind: Kind) -> Tensor:
        return v.clone()


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
        order = _shuffle(len(X), check_random_state(self.random_state)).to(X.device)
        aligner = _copy(self.aligner or RidgeAligner())
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
        G = _gaussian(X.shape[1], Y.shape[1], check_random_state(self.random_state)).to(X)
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
    is as cheap. Other aligners are refitted for every draw.

    Args:
        aligner: its parameters are used; it is neither fitted nor changed.
        X: expert_states of the anchors.
        y: target_states of the anchors.
        v: the direction in the expert's space.
        kind: "displacement" or "covector", as in `Aligner.map_direction`.
        draws: number of shufflings.
        random_state: seed.

    Returns:
        Unit vectors, in the container of `v`.

    Raises:
        ValueError: as in `Aligner.fit` and `Aligner.map_direction`, or fewer than one draw.
    """
    states = _states(X, "expert_states")
    targets, direction = _targets(y).to(states.device), _states(v[None], "direction")[0].to(states)
    if kind not in ("displacement", "covector"):
        raise ValueError(f"kind is {kind!r}: it must be 'displacement' or 'covector'.")
    if len(states) != len(targets) or len(states) < 2 or states.shape[1] != len(direction) or draws < 1:
        raise ValueError(
            f"expert_states has shape {tuple(states.shape)}, target_states {tuple(targets.shape)}, the direction "
            f"{tuple(direction.shape)}, draws is {draws}: give two or more rows, row i of both the same text, a "
            "direction of the expert's width, and at least one draw."
        )
    rng = check_random_state(random_state)
    orders = [_shuffle(len(states), rng).to(states.device) for _ in range(draws)]
    return like(unit(aligner._permuted(states, targets, unit(direction), kind, orders), "A permuted direction"), v)


def _copy(aligner: A) -> A:
    return cast("A", clone(aligner))


def _states(x: Any, name: str) -> Tensor:
    """`x` as a float64 matrix; see `as_matrix`."""
    if issparse(x):
        raise TypeError(f"{name} is a sparse matrix: hidden states are dense; pass {name}.toarray().")
    if not isinstance(x, Tensor):
        x = np.asarray(x)
        if x.dtype == object:
            x = x.astype(np.float64)
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} has 0 feature(s) (shape={x.shape}) while a minimum of 1 is required.")
        if not x.flags.writeable:  # torch warns of tensors that share read-only memory
            x = x.copy()
    return as_matrix(x, name)


def _targets(y: Any) -> Tensor:
    """Target states as a float64 matrix; scikit-learn's convention lets one column be flat."""
    if not issparse(y):
        y = y if isinstance(y, Tensor) else np.asarray(y)
        y = y[:, None] if y.ndim == 1 else y
    return _states(y, "target_states")


def _svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD `U, s, Vt` of a centred matrix, cut at its numerical rank (at most rows - 1)."""
    U, s, Vt = torch.linalg.svd(X, full_matrices=False)
    rank = int((s > s[0] * max(X.shape) * torch.finfo(s.dtype).eps).sum())
    rank = min(rank, len(X) - 1)
    return U[:, :rank], s[:rank], Vt[:rank]


def _gcv(U: Tensor, s: Tensor, Y: Tensor, penalties: Tensor) -> Tensor:
    """GCV error (1/n) ||Y - HY||² / (1 - tr H / n)² at each penalty; H counts the mean as one degree of freedom."""
    n, r = len(Y), len(s)
    power = (U.T @ Y).square().sum(1)
    rest = (Y.square().sum() - power.sum()).clamp(min=0) if r < n - 1 else 0.0
    shrunk = penalties[:, None] / (s.square() + penalties[:, None])
    return n * (rest + shrunk.square() @ power) / (n - 1 - r + shrunk.sum(1)).square()


def _chain(v: Tensor, *factors: Tensor) -> Tensor:
    """`v @ factors[0] @ factors[1] ...`, with rows that are zero up to rounding set to zero."""
    out, size = v, v.norm(dim=1)
    for factor in factors:
        out, size = out @ factor, size * factor.norm()
    return torch.where((out.norm(dim=1) <= 1e-13 * size)[:, None], torch.zeros_like(out), out)


def _best_scale(Z: Tensor, Y: Tensor) -> float:
    total = float(Z.square().sum())
    return float((Z * Y).sum()) / total if total > 0 else 1.0


def _gaussian(rows: int, columns: int, rng: np.random.RandomState) -> Tensor:
    """Random `[rows, columns]` that keeps a row vector's length when rows and columns are alike."""
    return torch.as_tensor(rng.standard_normal((rows, columns)) / rows**0.5)


def _orthonormal(rows: int, columns: int, rng: np.random.RandomState) -> Tensor:
    """Uniformly random `[rows, columns]` with orthonormal columns."""
    Q, R = torch.linalg.qr(_gaussian(rows, columns, rng))
    return Q * R.diagonal().sign()


def _shuffle(n: int, rng: np.random.RandomState) -> Tensor:
    """A random permutation of one cycle (Sattolo): unlike a plain shuffle it leaves nothing in place."""
    p = rng.permutation(n)
    order = np.empty(n, dtype=np.int64)
    order[p] = np.roll(p, 1)
    return torch.as_tensor(order)
