"""The aligners in closed form: ridge regression, a rotation, the cross-covariance, and none at all."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .aligner import Aligner
from .linear import Kind, best_scale, chain, gcv_errors, projected, quick_svd, shrunk_inverse

Factors = tuple[Tensor, Tensor, Tensor]  # U, s, Vt


class RidgeAligner(Aligner):
    """Affine least squares on paired anchors with a relative L2 penalty: alpha * tr(XᵀX) / d_expert.

    One thin SVD of each side (the dual form when n < d, the Gram matrix when n is large); the reverse map, for covectors,
    has a penalty of its own. Linear maps between models: arXiv 2501.02009, 2506.06609.

    Args:
        alpha: relative penalty of both maps, or "gcv": the least generalised cross-validation error (Golub, Heath and
            Wahba 1979; pooled over coordinates) on a log grid, chosen for each map.
        alpha_range: ends of that grid.
        n_alphas: its size.
        max_rank: keep only this many right singular vectors of the fitted values (reduced-rank regression).

    Attributes:
        alpha_, reverse_alpha_: relative penalties of the two maps.
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
        s, Vt, on_left = projected(X, Y, exact=self.alpha == 0)
        alpha, penalty = self._penalty(s, on_left, X.shape[1], Y)
        coef = Vt.T @ ((s / (s.square() + penalty))[:, None] * on_left)
        if self.max_rank is not None and self.max_rank < Y.shape[1]:
            fitted = (s.square() / (s.square() + penalty))[:, None] * on_left  # the fitted values, in U's coordinates
            P = torch.linalg.svd(fitted, full_matrices=False).Vh[: self.max_rank]
            coef = (coef @ P.T) @ P
        return coef, alpha

    def _penalty(self, s: Tensor, on_left: Tensor, width: int, Y: Tensor) -> tuple[float, Tensor]:
        """The relative penalty and the absolute one."""
        unit_penalty = s.square().sum() / width
        alpha = self.alpha
        if isinstance(alpha, str):
            if alpha != "gcv":
                raise ValueError(f"alpha is {alpha!r}: it must be 'gcv' or a number >= 0.")
            low, high = self.alpha_range
            grid = torch.as_tensor(np.geomspace(low, high, self.n_alphas)).to(s)
            alpha = float(grid[gcv_errors(s, on_left, Y, grid * unit_penalty).argmin()])
        elif alpha < 0:
            raise ValueError(f"alpha is {alpha}: it must be 'gcv' or a number >= 0.")
        return float(alpha), alpha * unit_penalty


class ProcrustesAligner(Aligner):
    """A rotation of the anchors' expert states onto their target states.

    Plain: orthogonal Procrustes, as `scipy.linalg.orthogonal_procrustes` on centred states. With n <= d anchors it rotates
    only what they span and sends the rest to zero (SciPy completes arbitrarily). Whitened: PCA-whiten both sides to r
    dimensions, rotate, un-whiten into the target, so that a few large coordinates do not decide the rotation. The solution is
    Schönemann's (Psychometrika 31:1, 1966).

    Args:
        n_components: r, of a whitened one. None: a tenth of the anchors, at most the rank of either side.
        whiten: None whitens where widths differ or `n_components` is given, as it must be there.
        scale: multiply by the least-squares factor, because residual norms differ up to a thousandfold between models.
            It changes `transform` and `score`, not directions.

    Attributes:
        scale_: that factor of the forward map; 1 without `scale`.
        n_components_: dimensions that were rotated.
    """

    def __init__(self, n_components: int | None = None, scale: bool = True, whiten: bool | None = None) -> None:
        self.n_components = n_components
        self.scale = scale
        self.whiten = whiten

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        expert, target, whiten = self._factored(X, Y)
        self.n_components_ = len(expert[1]) if whiten else min(len(expert[1]), len(target[1]))
        coef, reverse = self._rotated(expert, target, whiten)
        self.scale_ = best_scale(X @ coef, Y) if self.scale else 1.0
        self._set_maps(self.scale_ * coef, (best_scale(Y @ reverse, X) if self.scale else 1.0) * reverse)

    def _factored(self, X: Tensor, Y: Tensor) -> tuple[Factors, Factors, bool]:
        """`U, s, Vt` of both sides, cut to the dimensions that are rotated, and whether they are whitened."""
        needed = self.n_components is not None or X.shape[1] != Y.shape[1]
        if needed and self.whiten is False:
            raise ValueError("whiten is False, but unequal widths and n_components need it: leave it out.")
        whiten = needed or bool(self.whiten)
        expert, target = (quick_svd(side, exact=not whiten) for side in (X, Y))
        r = min(len(expert[1]), len(target[1]))
        if self.n_components is not None and not 1 <= self.n_components <= r:
            span = f"the anchors span {len(expert[1])} dimensions of the expert and {len(target[1])} of the target"
            raise ValueError(f"n_components is {self.n_components}: {span}, so it must be from 1 to {r}.")
        if whiten:
            r = self.n_components or min(r, max(1, len(X) // 10))
            expert, target = ((U[:, :r], s[:r], Vt[:r]) for U, s, Vt in (expert, target))
        return expert, target, whiten

    @staticmethod
    def _rotated(expert: Factors, target: Factors, whiten: bool) -> tuple[Tensor, Tensor]:
        """The forward and the backward map, unscaled. Rows of both `U` are the same texts."""
        (Ux, sx, Vx), (Uy, sy, Vy) = expert, target
        cross = Ux.T @ Uy
        L, _, Rt = torch.linalg.svd(cross if whiten else sx[:, None] * cross * sy, full_matrices=False)
        rotation = L @ Rt
        if not whiten:
            coef = Vx.T @ rotation @ Vy
            return coef, coef.T
        coef = (Vx.T / sx) @ rotation @ (sy[:, None] * Vy)
        return coef, (Vy.T / sy) @ rotation.T @ (sx[:, None] * Vx)


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
        return chain(readout, self.expert_anchors_.T, self.target_anchors_)

    def _readout(self, v: Tensor) -> Tensor:
        X = self.expert_anchors_
        return shrunk_inverse(v, X, self.alpha * X.square().sum() / X.shape[1])


class IdentityAligner(Aligner):
    """States and directions as they are, for models of one family that may share a basis. Widths must be equal."""

    def _fit(self, X: Tensor, Y: Tensor) -> None:
        if X.shape[1] != Y.shape[1]:
            found = f"the expert has {X.shape[1]} and the target {Y.shape[1]}"
            raise ValueError(f"IdentityAligner needs equal widths, but {found}: use RidgeAligner.")

    def _transform(self, X: Tensor) -> Tensor:
        return X.clone()

    def _map(self, v: Tensor, kind: Kind) -> Tensor:
        return v.clone()
