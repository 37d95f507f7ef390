"""Which expert layer goes with which target layer: scores on the same texts, their null, and the choice of pairs.

What mutual information can say here is little. Hidden states are (generically) injective functions of the text
(arXiv 2510.15511), so the true value is the entropy of the texts for every pair of layers; what an estimator returns is
how *linearly or smoothly* one layer can be read from the other, and estimators do not agree on the ranking. ExpertSteer
(arXiv 2505.12313) is reported, by secondary sources only, to choose the *lowest* pairs; measured on two small models
those are mismatches of depth (first expert layers with last target layers) whose vectors transfer worst, and the
highest ones transfer. Hence the depth band, and the null that tells a low score from no score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.spatial import KDTree
from scipy.special import digamma
from torch import Tensor

from ._numeric import as_matrix

OUTLIER = 4.0  # a coordinate's standard deviation is capped at this many times the layer's median one
NEIGHBOURS = 10


class LayerPair(NamedTuple):
    """An expert layer, a target layer, and their score."""

    expert: int
    target: int
    score: float


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


# ----------------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, eq=False, repr=False)
class LayerScores:
    """Scores of every expert layer with every target layer, and the same with the target's texts shuffled.

    Attributes:
        score: name of the score.
        expert_layers: layer of each row, ascending.
        target_layers: layer of each column, ascending.
        matrix: `[expert, target]`; nats for the mutual information scores, else without unit.
        null: `[permutation, expert, target]`; one shuffle is shared by all layers.
        n_texts: texts that both models read.
        expert_depth: decoder layers of the expert model, where known.
        target_depth: decoder layers of the target model, where known.
    """

    score: str
    expert_layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    matrix: Float64[Tensor, "expert target"]
    null: Float64[Tensor, "permutation expert target"]
    n_texts: int
    expert_depth: int | None = None
    target_depth: int | None = None

    def _need_null(self, least: int) -> None:
        if len(self.null) < least:
            raise ValueError(
                f"This needs {least} or more permutations, but the scores have {len(self.null)}: call "
                f"match_layers(..., permutations=20)."
            )

    def z(self) -> Float64[Tensor, "expert target"]:
        """Each score's distance from its own shuffled mean, in shuffled standard deviations.

        Raises:
            ValueError: fewer than two permutations.
        """
        self._need_null(2)
        return (self.matrix - self.null.mean(0)) / self.null.std(0).clamp(min=1e-12)

    def p_values(self) -> Float64[Tensor, "expert target"]:
        """Share of the cell's own shuffles (the unshuffled one counted in) that score at least as high, one-sided.

        Never below 1 / (permutations + 1), and not corrected for the number of cells. A "lowest" pair with a large
        value cannot be told from unrelated texts.

        Raises:
            ValueError: no permutations.
        """
        self._need_null(1)
        return ((self.null >= self.matrix).sum(0) + 1).double() / (len(self.null) + 1)

    def pairs(
        self,
        k: int = 5,
        select: Literal["lowest", "highest"] = "lowest",
        per: Literal["target", "expert", "grid"] = "target",
        band: tuple[float, float] | None = (0.1, 0.9),
        reuse: bool = False,
    ) -> list[LayerPair]:
        """The k chosen pairs, best first; equal scores go to the lower expert, then the lower target layer.

        Args:
            k: how many pairs.
            select: "lowest" is what secondary sources say of the paper, and picks mismatches of depth; "highest" is
                what transferred in our measurements.
            per: "target": the best expert layer of each target layer, then the k best target layers; "expert": the same
                with the roles exchanged; "grid": the best cells one after the other, each layer used at most once.
            band: depths kept, of both models, ends included: 0 is the first decoder layer, 1 the last. Where a
                model's depth is unknown, its highest layer here counts as the last. `None` keeps all layers.
            reuse: let `per="grid"` use a layer more than once.

        Raises:
            ValueError: an unknown option, no layer inside the band, or fewer than k pairs to choose from.
        """
        chosen = self._ranked(select, per, band, reuse)
        if not 1 <= k <= len(chosen):
            raise ValueError(
                f"k={k} pairs were asked for, but per={per!r} with band={band} has {len(chosen)} to choose from: use k "
                f"between 1 and {len(chosen)}, a wider band, or more layers."
            )
        return chosen[:k]

    def _ranked(self, select: str, per: str, band: tuple[float, float] | None, reuse: bool = False) -> list[LayerPair]:
        for name, value, known in (
            ("select", select, ("lowest", "highest")),
            ("per", per, ("target", "expert", "grid")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(known)}.")
        rows = self._in_band("expert", self.expert_layers, self.expert_depth, band)
        columns = self._in_band("target", self.target_layers, self.target_depth, band)
        values = self.matrix.tolist()
        sign = 1 if select == "lowest" else -1
        chosen: list[LayerPair] = []
        used_e: set[int] = set()
        used_t: set[int] = set()
        # the first cell, best first, in which a layer appears is that layer's best: one pass serves every `per`
        for _, i, j in sorted((sign * values[i][j], i, j) for i in rows for j in columns):
            taken = {"target": j in used_t, "expert": i in used_e, "grid": not reuse and (i in used_e or j in used_t)}
            if not taken[per]:
                chosen.append(LayerPair(self.expert_layers[i], self.target_layers[j], values[i][j]))
                used_e.add(i)
                used_t.add(j)
        return chosen

    def _in_band(self, side: str, layers: tuple[int, ...], depth: int | None, band: tuple[float, float] | None):
        if band is None:
            return range(len(layers))
        last = max((depth or max(layers) + 1) - 1, 1)
        inside = [i for i, layer in enumerate(layers) if band[0] - 1e-9 <= layer / last <= band[1] + 1e-9]
        if not inside:
            raise ValueError(
                f"No {side} layer lies in band={band}: the {side} layers are {list(layers)} of 0..{last}; widen the "
                f"band, use band=None, or collect more layers."
            )
        return inside

    def plot(self, pairs: Sequence[LayerPair] | None = None, ax: Any = None) -> Any:
        """Heat map of the scores with pairs marked; returns matplotlib's Figure without showing it.

        Args:
            pairs: pairs to mark; `None` marks those of `pairs()`, as many as there are.
            ax: matplotlib axes to draw on; `None` makes a figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install expertsteer_nnsight[plot]") from error
        if ax is None:
            figure, ax = pyplot.subplots(layout="constrained")
            pyplot.close(figure)  # the caller owns it: no second display in a notebook, no registry to fill
        image = ax.imshow(self.matrix.numpy(), origin="lower", aspect="auto", cmap="viridis")
        ax.figure.colorbar(image, ax=ax, label=self._label())
        for axis, layers in ((ax.xaxis, self.target_layers), (ax.yaxis, self.expert_layers)):
            step = -(-len(layers) // 12)
            axis.set_ticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
        ax.set_xlabel("target layer")
        ax.set_ylabel("expert layer")
        if pairs is None:
            try:
                pairs = self._ranked("lowest", "target", (0.1, 0.9))[:5]
            except ValueError:  # two layers have none inside the band: a picture is still wanted
                pairs = self._ranked("lowest", "target", None)[:5]
        x = [self.target_layers.index(pair.target) for pair in pairs]
        y = [self.expert_layers.index(pair.expert) for pair in pairs]
        ax.scatter(x, y, s=60, facecolors="none", edgecolors="red", linewidths=1.5)
        return ax.figure

    def _label(self) -> str:
        known = SCORES.get(self.score)
        return f"{self.score} ({known.unit})" if known is not None and known.unit else self.score

    def __repr__(self) -> str:
        m = self.matrix
        lines = [
            f"LayerScores: {self._label()}, {m.shape[0]} expert x {m.shape[1]} target layers, {self.n_texts} texts",
            f"  range    {m.min():.3g} to {m.max():.3g}, median {m.median():.3g}",
        ]
        if len(self.null):
            noise = float(np.quantile(self.null.numpy(), 0.95))
            lines.append(
                f"  null     95 % of shuffled scores are below {noise:.3g} ({len(self.null)} permutations); "
                f"{int((m > noise).sum())} of {m.numel()} cells are above"
            )
        for select in ("highest", "lowest"):
            best = ", ".join(f"{p.expert}-{p.target}: {p.score:.3g}" for p in self._ranked(select, "grid", None)[:4])
            lines.append(f"  {select:8} {best}   (expert-target, all depths, each layer once)")
        return "\n".join(lines)


def match_layers(
    E: Mapping[int, Float[Tensor, "text_E hidden_E"] | Float[np.ndarray, "text_E hidden_E"]],
    T: Mapping[int, Float[Tensor, "text_T hidden_T"] | Float[np.ndarray, "text_T hidden_T"]],
    score: str | Callable[[Tensor, Tensor], Any] = "gaussian_mi",
    permutations: int = 20,
    random_state: int | None = 0,
) -> LayerScores:
    """Score every expert layer with every target layer on the same texts.

    Before any named score, states are centred and massive coordinates scaled down to `OUTLIER` = 4 times the layer's
    median standard deviation. Per-layer work is done once, also for the permutations.

    Args:
        E: expert layer -> states `[text, hidden]`. If it has an integer `n_layers`, the depth is known for `pairs`.
        T: target layer -> states of the same texts in the same order.
        score: a name in `SCORES` ("gaussian_mi", "cca_mi", "ksg", "cka", "mutual_knn", "ridge_r2"), or a function
            of two float64 state matrices (as given, nothing done to them) that returns a number.
        permutations: how often the target's texts are shuffled for the null.
        random_state: seed of the shuffles and of the halves of held-out scores; `None` draws one.

    Raises:
        ValueError: no layers, a negative layer, an unknown score, too few texts, layers with different numbers of
            texts, a layer that is the same for all texts, NaN or infinity in the states or in a callable's scores.
    """
    if isinstance(score, str) and score not in SCORES:
        raise ValueError(f"score={score!r} is unknown: use one of {', '.join(SCORES)}, or a function of two matrices.")
    if permutations < 0:
        raise ValueError(f"permutations={permutations} was asked for: use 0 or more.")
    name = score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__)
    method = SCORES[score] if isinstance(score, str) else LayerScore(lambda x: x, _pairwise(score), 2)
    features: list[list[Any]] = []
    first: tuple[int, str] | None = None
    for side, states in (("E", E), ("T", T)):
        if not len(states) or min(states) < 0:
            raise ValueError(f"{side} has layers {sorted(states)}: give one layer or more, counted from 0.")
        features.append([])
        for layer in sorted(states):
            x = as_matrix(states[layer], f"{side}[{layer}]").cpu()
            n, where = first = first or (len(x), f"{side}[{layer}]")
            if len(x) != n:
                raise ValueError(
                    f"{side}[{layer}] has {len(x)} texts but {where} has {n}: every layer of both models must hold "
                    f"the same texts in the same order."
                )
            if n < method.min_texts:
                raise ValueError(
                    f"score={name!r} needs {method.min_texts} texts or more, but {where} has {n}: add texts."
                )
            if bool((x == x[0]).all()):
                raise ValueError(f"{side}[{layer}] is the same for all {n} texts: nothing can be scored; leave it out.")
            features[-1].append(method.prepare(x))
    assert first is not None
    n, (e, t) = first[0], features
    rng = np.random.default_rng(random_state)
    split, *orders = (torch.as_tensor(rng.permutation(n)) for _ in range(permutations + 1))
    matrix = method.grid(e, t, torch.arange(n), split)
    null = [method.grid(e, t, order, split) for order in orders]
    return LayerScores(
        score=name,
        expert_layers=tuple(sorted(E)),
        target_layers=tuple(sorted(T)),
        matrix=matrix,
        null=torch.stack(null) if null else matrix.new_empty(0, *matrix.shape),
        n_texts=n,
        expert_depth=getattr(E, "n_layers", None),
        target_depth=getattr(T, "n_layers", None),
    )


def _pairwise(score: Callable[[Tensor, Tensor], Any]) -> Callable[[list[Any], list[Any], Tensor, Tensor], Tensor]:
    def grid(e: list[Tensor], t: list[Tensor], order: Tensor, split: Tensor) -> Tensor:
        out = torch.tensor([[float(score(x, y[order])) for y in t] for x in e], dtype=torch.float64)
        if not torch.isfinite(out).all():
            raise ValueError(f"The score function gave NaN or infinity for {int((~out.isfinite()).sum())} pairs.")
        return out

    return grid
