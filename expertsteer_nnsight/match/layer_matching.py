"""Which expert layer goes with which target layer: scores on the same texts, their null, and the choice of pairs.

The scores, and what they can say, are in `layer_scores`. ExpertSteer (arXiv 2505.12313) is reported, by secondary
sources only, to choose the *lowest* pairs; measured on two small models those are mismatches of depth (first expert
layers with last target layers) whose vectors transfer worst, and the highest ones transfer. Hence the depth band, and
the null that tells a low score from no score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..numeric import as_matrix
from .layer_scores import SCORES, LayerScore


class LayerPair(NamedTuple):
    """An expert layer, a target layer, and their score."""

    expert: int
    target: int
    score: float


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
        """Heat map of the scores with the given pairs marked; returns matplotlib's Figure without showing it.

        Args:
            pairs: pairs to mark, such as those of `pairs()`.
            ax: matplotlib axes to draw on; `None` makes a figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ..plotting import plot_layer_scores

        return plot_layer_scores(self, pairs, ax)

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

    Returns:
        The matrix `[expert, target]`, in nats for "gaussian_mi", "cca_mi" and "ksg", and its null
        `[permutation, expert, target]`. Sources of the scores: arXiv 2010.15327 (cka), 2405.07987 (mutual_knn), Kraskov et
        al. 2004 (ksg); the choice by mutual information is after 2505.12313.

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
