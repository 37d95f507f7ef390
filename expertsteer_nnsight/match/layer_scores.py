"""Scores of an expert layer with a target layer on the same texts: `SCORES`, by name.

What mutual information can say here is little. Hidden states are (generically) injective functions of the text
(arXiv 2510.15511), so the true value is the entropy of the texts for every pair of layers; what an estimator returns is
how *linearly or smoothly* one layer can be read from the other, and estimators do not agree on the ranking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial import KDTree
from scipy.special import digamma
from torch import Tensor

OUTLIER = 4.0  # a coordinate's standard deviation is capped at this many times the layer's median one
NEIGHBOURS = 10

# ------------------------------------------------------------------------------------------- work done once per layer


def _standardised(x: Tensor) -> Tensor:
    """Centred states with outlier coordinates scaled down to `OUTLIER` times the median standard deviation.

    Not unit variance everywhere: that would hide a shared subspace that stands out by its variance, which is what PCA
    looks for. But one massive coordinate, hundreds of times the rest, is all that a Gram matrix or a neighbour sees.
    """
    x = x - x.mean(0)
    std = x.std(0)
    x = x[:, std > 1e-12 * std.max()]  # constant coordinates would pull the median down
    std = x.std(0)
    return x * (OUTLIER * std.median() / std).clamp(max=1.0)


def _principal_scores(x: Tensor, r: int) -> Tensor:
    """`[text, r]` scores on the first r principal axes; columns beyond the rank are zero."""
    x = _standardised(x)
    n, d = x.shape
    values, vectors = torch.linalg.eigh(x.T @ x if d <= n else x @ x.T)
    values, vectors = values.flip(0)[:r], vectors.flip(1)[:, :r]
    scores = x @ vectors if d <= n else vectors * values.clamp(min=0).sqrt()
    scores = scores * (values > 1e-10 * values[0])  # eigenvalues of a product: half the digits are noise
    return torch.nn.functional.pad(scores, (0, r - scores.shape[1]))


def _whitened(x: Tensor, r: int) -> Tensor:
    """Principal scores with orthonormal columns: canonical correlations are then singular values of a product."""
    scores = _principal_scores(x, r)
    norms = scores.norm(dim=0)
    return scores / norms.where(norms > 0, 1.0)


def _mi_scores(x: Tensor) -> Tensor:
    return _whitened(x, min(20, len(x) // 20))


def _ridge_scores(x: Tensor) -> Tensor:
    scores = _principal_scores(x, min(64, len(x) // 10))
    return scores / scores.norm()


def _ksg_scores(x: Tensor) -> tuple[np.ndarray, KDTree]:
    scores = (_whitened(x, min(5, len(x) // 20)) * len(x) ** 0.5).numpy()
    return scores, KDTree(scores)


def _centred_gram(x: Tensor) -> Tensor:
    """Linear Gram matrix, U-centred (Székely & Rizzo 2014) and of unit norm: debiased CKA is then an inner product."""
    x = _standardised(x)
    n = len(x)
    gram = (x @ x.T).fill_diagonal_(0.0)
    rows = gram.sum(0) / (n - 2)
    gram = (gram - rows - rows[:, None] + rows.sum() / (n - 1)).fill_diagonal_(0.0)
    return gram / gram.norm()


def _neighbours(x: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(_standardised(x), dim=1)
    return (x @ x.T).fill_diagonal_(-torch.inf).topk(NEIGHBOURS, dim=1).indices


# -------------------------------------------------------------------------- scores of the whole grid, for one row order


def _cross(e: Tensor, t: Tensor) -> Tensor:
    """`[expert, target, p, q]` products of all pairs of `[expert, text, p]` and `[target, text, q]`."""
    product = e.transpose(1, 2).flatten(0, 1) @ t.transpose(0, 1).flatten(1)
    return product.view(len(e), e.shape[2], len(t), t.shape[2]).transpose(1, 2)


def _plug_in_bias(n: int, p: Tensor, q: Tensor) -> Tensor:
    """Expected excess of the plug-in Gaussian mutual information, for p and q dimensions and n centred rows.

    Exact, and the same at every true value: E log|Wishart(Σ, n-1)| = log|Σ| + Σ_i ψ((n-i)/2) + const, so Σ cancels.
    To first order pq/(2n). With one side's rows shuffled it is the mean of -½ log of Wilks' lambda.
    """
    steps = torch.digamma((n - torch.arange(1, int((p.max() + q.max()).item()) + 1, dtype=torch.float64)) / 2)
    total = torch.nn.functional.pad(steps.cumsum(0), (1, 0))
    return 0.5 * (total[p] + total[q] - total[p + q])


def _ranks(e: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    p, q = ((z != 0).any(1).sum(1) for z in (e, t))
    return p[:, None].expand(len(p), len(q)), q.expand(len(p), len(q))


def _gaussian_mi(e: list[Tensor], t: list[Tensor], order: Tensor, split: Tensor) -> Tensor:
    """Gaussian mutual information of min(20, n // 20) principal scores, -½ Σ log(1 - ρ²) less its exact bias; nats.

    Slightly negative at independence, as an unbiased estimate must be. 1 - ρ² is held at 1e-12 or more, so that equal
    layers score 13.8 nats a component. Linear: two layers may depend on each other and still score 0.
    """
    E, T = torch.stack(e), torch.stack(t)
    c = _cross(E, T[:, order])
    left = torch.eye(c.shape[-1], dtype=c.dtype) - c @ c.mT
    mi = -0.5 * torch.linalg.eigvalsh(left).clamp(min=1e-12).log().sum(-1)
    return mi - _plug_in_bias(len(order), *_ranks(E, T))


def _folds(z: Tensor, split: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(fit, test) rows of `[layer, text, r]`, both ways round."""
    half = len(split) // 2
    a, b = z[:, split[:half]], z[:, split[half:]]
    return [(a, b), (b, a)]


def _cca_mi(e: list[Tensor], t: list[Tensor], order: Tensor, split: Tensor) -> Tensor:
    """Held-out CCA: directions from one random half, -½ Σ log(1 - ρ²) on the other, both ways averaged; nats.

    On the same principal scores as `gaussian_mi`. Errs low, since the directions are themselves estimates, the more the
    fewer texts: it asks for what can be found again. Each component's bias on the held-out half is subtracted.
    """
    E, T = torch.stack(e), torch.stack(t)[:, order]
    out = torch.zeros(len(E), len(T), dtype=E.dtype)

    def whiten(fit: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
        fit, test = fit - fit.mean(1, keepdim=True), test - test.mean(1, keepdim=True)
        jitter = 1e-10 * torch.eye(fit.shape[2], dtype=fit.dtype)  # absent components: zero columns
        factor = torch.linalg.cholesky(fit.mT @ fit + jitter)
        fit, test = (torch.linalg.solve_triangular(factor, z.mT, upper=False).mT for z in (fit, test))
        return fit, test

    for fold_e, fold_t in zip(_folds(E, split), _folds(T, split), strict=True):
        (e_fit, e_test), (t_fit, t_test) = whiten(*fold_e), whiten(*fold_t)
        u, _, vh = torch.linalg.svd(_cross(e_fit, t_fit))
        cov = (u * (_cross(e_test, t_test) @ vh.mT)).sum(-2)
        var_e = (u * ((e_test.mT @ e_test)[:, None] @ u)).sum(-2)
        var_t = (vh.mT * ((t_test.mT @ t_test)[None] @ vh.mT)).sum(-2)
        left = 1 - cov.square() / (var_e * var_t).clamp(min=1e-300)
        one = torch.ones((), dtype=torch.int64)
        bias = _plug_in_bias(e_test.shape[1], one, one) * torch.minimum(*_ranks(E, T))
        out += (-0.5 * left.clamp(min=1e-12).log().sum(-1) - bias) / 2
    return out


def _ksg(e: list[Any], t: list[Any], order: Tensor, split: Tensor) -> Tensor:
    """Kraskov, Stögbauer & Grassberger's first estimator (2004), 3 neighbours, on 5 whitened principal scores; nats.

    Sees nonlinear dependence, but saturates near 2 nats at n = 1000: only a rank statistic. Slow: about 30 s for each
    18 x 30 grid at n = 1000 on one core, and every permutation is another grid. Ask for few permutations, or none.
    """
    k, n = 3, len(order)
    out = torch.zeros(len(e), len(t), dtype=torch.float64)
    for i, (x, tree_x) in enumerate(e):
        for j, (y, tree_y) in enumerate(t):
            y = y[order.numpy()]
            joint = np.concatenate([x, y], axis=1)
            radius = KDTree(joint).query(joint, k=k + 1, p=np.inf)[0][:, -1]
            radius = np.nextafter(radius, 0)  # strictly nearer than the k-th neighbour
            counts = [
                tr.query_ball_point(z, radius, p=np.inf, return_length=True) for tr, z in ((tree_x, x), (tree_y, y))
            ]
            out[i, j] = float(
                digamma(k) + digamma(n) - sum(digamma(c).mean() for c in counts)
            )  # counts include the point
    return out


def _cka(e: list[Tensor], t: list[Tensor], order: Tensor, split: Tensor) -> Tensor:
    """Linear CKA from the unbiased HSIC (Song et al. 2012; Nguyen et al., arXiv 2010.15327).

    1 for a rotated copy, 0 on average at independence, also when n < hidden. Keeps an n x n matrix per layer (8 MB each
    at n = 1000).
    """
    out = torch.zeros(len(e), len(t), dtype=torch.float64)
    for i, rows in enumerate(order.split(32)):  # a block of rows of all layers at a time: it stays in the cache
        a = torch.stack([gram[32 * i : 32 * i + len(rows)] for gram in e]).flatten(1)
        b = torch.stack([gram[rows][:, order] for gram in t]).flatten(1)
        out += a @ b.T
    return out


def _mutual_knn(e: list[Tensor], t: list[Tensor], order: Tensor, split: Tensor) -> Tensor:
    """Share of a text's 10 nearest texts, by cosine of the centred states, that both layers have in common.

    After the Platonic Representation work (arXiv 2405.07987), which does not centre. 10 / (n - 1) by chance. Keeps an
    n x n mask per target layer (1 MB each at n = 1000).
    """
    n = len(order)
    near = torch.zeros(len(t), n, n, dtype=torch.bool).scatter_(2, torch.stack(t), True).flatten(1)
    cells = [(order[:, None] * n + order[idx]).flatten() for idx in e]
    return torch.stack([near[:, c].double().mean(1) for c in cells])


def _ridge_r2(e: list[Tensor], t: list[Tensor], order: Tensor, split: Tensor) -> Tensor:
    """Held-out R² of the target's principal scores from the expert's (min(64, n // 10) each), two random halves.

    Ridge of 1e-3 of the mean eigenvalue. Not symmetric. Below 0 where the map only learnt noise.
    """
    E, T = torch.stack(e), torch.stack(t)[:, order]
    error = torch.zeros(len(E), len(T), dtype=E.dtype)
    total = torch.zeros(len(T), dtype=E.dtype)
    for (x, x_test), (y, y_test) in zip(_folds(E, split), _folds(T, split), strict=True):
        x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, x_test, y, y_test = x - x_mean, x_test - x_mean, y - y_mean, y_test - y_mean
        gram = x.mT @ x
        ridge = 1e-3 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)
        weights = torch.linalg.solve((gram + ridge)[:, None], _cross(x, y))
        fitted = (x_test.mT @ x_test)[:, None] @ weights - 2 * _cross(x_test, y_test)
        sst = y_test.square().sum((1, 2))
        error += sst + (weights * fitted).sum((-2, -1))
        total += sst
    return 1 - error / total


class LayerScore(NamedTuple):
    """How a named score works: `prepare` once per layer, `grid(expert, target, order, split)` once per row order.

    `order` permutes the target's rows, `split` is a random order whose halves serve as fit and test rows.
    """

    prepare: Callable[[Tensor], Any]
    grid: Callable[[list[Any], list[Any], Tensor, Tensor], Tensor]
    min_texts: int
    unit: str = ""


SCORES: dict[str, LayerScore] = {
    "gaussian_mi": LayerScore(_mi_scores, _gaussian_mi, 40, "nats"),
    "cca_mi": LayerScore(_mi_scores, _cca_mi, 40, "nats"),
    "ksg": LayerScore(_ksg_scores, _ksg, 40, "nats"),
    "cka": LayerScore(_centred_gram, _cka, 8),
    "mutual_knn": LayerScore(_neighbours, _mutual_knn, NEIGHBOURS + 2),
    "ridge_r2": LayerScore(_ridge_scores, _ridge_r2, 40),
}
