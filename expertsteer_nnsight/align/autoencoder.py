"""The paper's alignment: an affine auto-encoder of the expert's states."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..numeric import as_matrix, like
from .aligner import Aligner
from .linear import Seed, gaussian, orthonormal, thin_svd


class AutoencoderAligner(Aligner):
    """The paper's alignment (arXiv 2505.12313): an affine encoder and decoder, trained only to reconstruct the expert.

    `y` gives nothing but its width (and the mean that `score` compares with). Replacing (encoder, decoder) by
    (encoder A, A⁻¹ decoder), A invertible, leaves the loss as it is: nothing ties the encoded axes to the target's, and
    another `random_state` gives another, unrelated direction. `score` against the target is therefore near or below 0;
    what the paper can report is `reconstruction_score`. The encoder is `coef_`, the decoder `reverse_coef_`.

    Args:
        solver: "closed_form" (the PCA optimum, W_e = V_r Qᵀ with Q orthonormal, exact; Baldi and Hornik 1989) or "adam".
            Solver and what follows are ours; the sources that could be read give the loss and the affine form.
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
        """Decode `Z`, `[text, d_target]`, to expert states `[text, d_expert]`.

        Raises:
            NotFittedError: before `fit`.
            ValueError: another width than the encoder's, or NaN or infinity.
        """
        check_is_fitted(self)
        codes = as_matrix(Z, "encoded states").to(self.expert_mean_.device)
        if codes.shape[1] != self.n_features_out_:
            raise ValueError(f"The codes have width {codes.shape[1]}, but the decoder takes {self.n_features_out_}.")
        return like(self._decode(codes), Z)

    def reconstruction_loss(self, X: Any) -> float:
        """Mean over the texts of ||h - decoder(encoder(h))||², for expert_states `X`, `[text, d_expert]`."""
        check_is_fitted(self)
        states = self._input(X)
        return float((states - self._decode(self._transform(states))).square().sum(1).mean())

    def reconstruction_score(self, X: Any) -> float:
        """R² of the reconstruction of `X`, `[text, d_expert]`, pooled over coordinates: what the loss is about.

        Raises:
            NotFittedError: before `fit`.
            ValueError: states that do not vary.
        """
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
            V = thin_svd(X)[2][:width]  # a target wider than the states' rank reconstructs them exactly
            Q = orthonormal(width, len(V), rng).to(X) if self.init == "random" else torch.eye(width, len(V)).to(X)
            encoder = V.T @ Q.T
        decoder, bias_e, bias_d = encoder.T, X.new_zeros(width), X.new_zeros(d)
        self.n_epochs_ = 0
        if self.solver == "adam":
            if self.init == "random":
                encoder, decoder = gaussian(d, width, rng).to(X), gaussian(width, d, rng).to(X)
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
