"""Which expert layer goes with which target layer: several scores, each beside its null, and the figure.

    python -m recipes.match_layers

Both models have read the same general texts. A score is high where two layers tell these texts apart in like ways; its null is the
same with the target's texts shuffled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import expertsteer_nnsight as es
from expertsteer_nnsight.match.layer_matching import LayerPair, LayerScores
from expertsteer_nnsight.plotting import figure
from recipes import pair

SCORES = ("gaussian_mi", "cca_mi", "cka", "mutual_knn", "ridge_r2")  # "ksg" takes minutes


def match(scores: Sequence[str] = SCORES, permutations: int = 20) -> dict[str, LayerScores]:
    """The scores by name, over the layers that the paper's preset reads, which are nearly all."""
    expert, target = (pair.states(name, "anchors", "paper") for name in ("expert", "target"))
    E, T = (states.take(slice(None)) for states in (expert, target))  # in memory: read from disk once
    return {name: es.match_layers(E, T, name, permutations) for name in scores}


def depth_gap(scores: LayerScores, pairs: Sequence[LayerPair]) -> float:
    """Mean difference in depth of the two layers of a pair; 0 is the first decoder layer of a model, 1 the last."""
    expert, target = (scores.expert_depth or 1) - 1, (scores.target_depth or 1) - 1
    return float(np.mean([abs(p.expert / expert - p.target / target) for p in pairs]))


def main(argv: Sequence[str] | None = None) -> dict[str, LayerScores]:
    """Prints the table, saves the figure and returns the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", nargs="+", default=SCORES, help="names of scores (default: all but ksg)")
    parser.add_argument("--permutations", type=int, default=20, help="shuffles for the null (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=pair.FIGURES, help="where the figure goes (default: %(default)s)")
    args = parser.parse_args(argv)
    found = match(args.scores, args.permutations)

    print(
        f"{'score':<13}{'lowest':>8}{'highest':>9}{'null 95 %':>11}{'depth gap of highest, lowest':>30}   highest, expert>target"
    )
    fig, axes = figure(5.6 * len(found), 4.4, columns=len(found))
    fig.get_layout_engine().set(wspace=0.06)
    for (name, scores), ax in zip(found.items(), np.atleast_1d(axes), strict=True):
        best, worst = (scores.pairs(5, select) for select in ("highest", "lowest"))
        gaps = " ".join(f"{depth_gap(scores, pairs):.2f}" for pairs in (best, worst))
        told = ", ".join(f"{p.expert}>{p.target}" for p in best)
        null = float(np.quantile(scores.null.numpy(), 0.95))
        print(f"{name:<13}{scores.matrix.min():>8.2f}{scores.matrix.max():>9.2f}{null:>11.2f}{gaps:>30}   {told}")
        scores.plot(best, ax=ax)
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "match_layers.png", dpi=110)
    print(
        "Read the depth gaps (depth runs from 0 to 1 in either model): the highest pairs should lie at like depths; the lowest, "
        f"which the paper is said to take, need not. The five highest pairs are circled in {args.out / 'match_layers.png'}."
    )
    return found


if __name__ == "__main__":
    main()
