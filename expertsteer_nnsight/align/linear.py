"""Linear algebra and random matrices that the aligners share."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["displacement", "covector"]
Seed = int | np.integer | np.random.RandomState | None


def check_kind(kind: str) -> None:
    """Raises ValueError unless `kind` is a `Kind`."""
    if kind not in ("displacement", "covector"):
        raise ValueError(f"kind is {kind!r}: it must be 'displacement' or 'covector'.")


def thin_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD `U, s, Vt` of a centred matrix, cut at its numerical rank (at most rows - 1)."""
    U, s, Vt = torch.linalg.svd(X, full_matrices=False)
    rank = int((s > s[0] * max(X.shape) * torch.finfo(s.dtype).eps).sum())
    rank = min(rank, len(X) - 1)
    return U[:, :rank], s[:rank], Vt[:rank]


def quick_svd(X: Tensor, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`thin_svd`, or where there are many more rows than columns `s, Vt` from the eigenvectors of XᵀX.

    That is several times as fast, and leaves out what lies below 1e-7 of the largest singular value. `exact` keeps to the SVD.
    """
    if exact or not _tall(X):
        return thin_svd(X)
    s, Vt = _right_svd(X)
    return (X @ Vt.T) / s, s, Vt


def _tall(X: Tensor) -> bool:
    n, d = X.shape
    return n >= 2 * d and d >= 64


def _right_svd(X: Tensor) -> tuple[Tensor, Tensor]:
    """`s, Vt` from the eigenvectors of XᵀX."""
    values, vectors = torch.linalg.eigh(X.T @ X)
    keep = torch.nonzero(values > 1e-14 * values[-1])[:, 0].flip(0)
    return values[keep].sqrt(), vectors[:, keep].T


def projected(X: Tensor, Y: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`s, Vt, UᵀY` of `quick_svd(X)`; a penalty hides what that leaves out."""
    if exact or not _tall(X):
        U, s, Vt = thin_svd(X)
        return s, Vt, U.T @ Y
    s, Vt = _right_svd(X)
    return s, Vt, Vt @ (X.T @ Y) / s[:, None]  # without U, which would be as large as X


def gcv_errors(s: Tensor, projected: Tensor, Y: Tensor, penalties: Tensor) -> Tensor:
    """GCV error (1/n) ||Y - HY||² / (1 - tr H / n)² at each penalty; H counts the mean as one degree of freedom."""
    n, r = len(Y), len(s)
    power = projected.square().sum(1)
    rest = (Y.square().sum() - power.sum()).clamp(min=0) if r < n - 1 else 0.0
    shrunk = penalties[:, None] / (s.square() + penalties[:, None])
    return n * (rest + shrunk.square() @ power) / (n - 1 - r + shrunk.sum(1)).square()


def shrunk_inverse(v: Tensor, X: Tensor, penalty: Tensor) -> Tensor:
    """`v @ (XᵀX + penalty I)⁻¹`, through the smaller of the two Gram matrices; zero where the penalty is."""
    n, d = X.shape
    if penalty == 0:
        return torch.zeros_like(v)
    gram = X @ X.T if n < d else X.T @ X
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram)).to(X))
    if n >= d:
        return torch.cholesky_solve(v.T, factor).T
    return (v - torch.cholesky_solve(X @ v.T, factor).T @ X) / penalty


def chain(v: Tensor, *factors: Tensor) -> Tensor:
    """`v @ factors[0] @ factors[1] ...`, with rows that are zero up to rounding set to zero."""
    out, size = v, v.norm(dim=1)
    for factor in factors:
        out, size = out @ factor, size * factor.norm()
    return torch.where((out.norm(dim=1) <= 1e-13 * size)[:, None], torch.zeros_like(out), out)


def best_scale(Z: Tensor, Y: Tensor) -> float:
    """The least-squares factor of `Z` to `Y`."""
    total = float(Z.square().sum())
    return float((Z * Y).sum()) / total if total > 0 else 1.0


def gaussian(rows: int, columns: int, rng: np.random.RandomState) -> Tensor:
    """Random `[rows, columns]` that keeps a row vector's length when rows and columns are alike."""
    return torch.as_tensor(rng.standard_normal((rows, columns)) / rows**0.5)


def orthonormal(rows: int, columns: int, rng: np.random.RandomState) -> Tensor:
    """Uniformly random `[rows, columns]` with orthonormal columns."""
    Q, R = torch.linalg.qr(gaussian(rows, columns, rng))
    return Q * R.diagonal().sign()


def shuffle(n: int, rng: np.random.RandomState) -> Tensor:
    """A random permutation of one cycle (Sattolo): unlike a plain shuffle it leaves nothing in place."""
    p = rng.permutation(n)
    order = np.empty(n, dtype=np.int64)
    order[p] = np.roll(p, 1)
    return torch.as_tensor(order)
