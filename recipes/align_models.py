"""Align an expert's states with a target's, and see that a good reconstruction is not an alignment.

    python -m recipes.align_models

Five aligners are fitted on general texts that both models read. For each: R² of the target's states on held-out texts, and the
cosine of the expert's sentiment direction, mapped, with the direction found in the target's own states of the same texts. The
same is done with the target in the expert's place, which is the most that can be had, and with experts of random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from sklearn.base import clone
from torch import Tensor

import expertsteer_nnsight as es
from recipes import pair

ALIGNERS: dict[str, tuple[es.Aligner, str]] = {
    "identity": (es.IdentityAligner(), "mean_difference"),
    "ridge": (es.RidgeAligner(), "mean_difference"),
    "Procrustes, whitened": (es.ProcrustesAligner(whiten=True), "mean_difference"),
    # made for covectors: of a displacement it makes what ridge does
    "covariance": (es.CovarianceAligner(), "lda"),
    "auto-encoder": (es.AutoencoderAligner(), "mean_difference"),
}


class Fit(NamedTuple):
    """What an aligner does: R² of held-out target states, cosine with the native direction, and R² of its own reconstruction."""

    r2: float
    cosine: float
    reconstruction: float | None


def compare(
    expert_anchors: Float[Tensor, "anchor d_expert"],
    expert_labelled: Float[Tensor, "text d_expert"],
    target_anchors: Float[Tensor, "anchor d_target"],
    native: Float[Tensor, " d_target"],
    labels: Sequence[int],
) -> dict[str, Fit]:
    """Every aligner that the widths allow, fitted on three quarters of the anchors.

    Args:
        expert_anchors: states of the anchors in one expert layer; the last quarter is held out.
        expert_labelled: states of the labelled texts in that layer.
        target_anchors: states of the same anchors in one target layer.
        native: the direction in the target's own states of the labelled texts, a unit vector.
        labels: of the labelled texts.
    """
    n, rows = len(expert_anchors) * 3 // 4, {}
    for name, (aligner, method) in ALIGNERS.items():
        if isinstance(aligner, es.IdentityAligner) and expert_anchors.shape[1] != target_anchors.shape[1]:
            continue
        fitted: Any = clone(aligner)
        fitted.fit(expert_anchors[:n], target_anchors[:n])
        found = es.find_direction(expert_labelled, labels, method, folds=0)
        mapped = fitted.map_direction(found.vector, found.space)
        encoder = isinstance(aligner, es.AutoencoderAligner)
        own = fitted.reconstruction_score(expert_anchors[n:]) if encoder else None
        rows[name] = Fit(fitted.score(expert_anchors[n:], target_anchors[n:]), float(mapped @ native.to(mapped)), own)
    return rows


def align(expert_layer: int = 9, target_layer: int = 16, seeds: int = 2) -> dict[str, dict[str, Fit]]:
    """`compare` for the target in the expert's place, for the expert, and for untrained experts of several seeds."""
    labels = pair.pairs().labels
    own, own_labelled = (pair.states("target", texts)[target_layer] for texts in ("anchors", "pairs"))
    native = es.find_direction(own_labelled, labels, "mean_difference", folds=0).vector
    found = {"target": compare(own, own_labelled, own, native, labels)}
    for name in ("expert", *(f"untrained-{seed}" for seed in range(1, seeds + 1))):
        x, labelled = (pair.states(name, texts)[expert_layer] for texts in ("anchors", "pairs"))
        found[name] = compare(x, labelled, own, native, labels)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Fit]]:
    """Prints the table and returns its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert-layer", type=int, default=9, help="one of 6 to 11 (default: %(default)s)")
    parser.add_argument("--target-layer", type=int, default=16, help="one of 9 to 20 (default: %(default)s)")
    parser.add_argument("--untrained", type=int, default=2, help="experts with random weights (default: %(default)s)")
    args = parser.parse_args(argv)
    found = align(args.expert_layer, args.target_layer, args.untrained)

    print(
        f"Layers {args.expert_layer}>{args.target_layer}: R² of held-out target states | cosine with the native direction"
    )
    print(f"{'':<22}" + "".join(f"{name:>17}" for name in found))
    for name in ALIGNERS:
        cells = [f"{rows[name].r2:.2f} | {rows[name].cosine:+.2f}" if name in rows else "" for rows in found.values()]
        print(f"{name:<22}" + "".join(f"{cell:>17}" for cell in cells))
    width = pair.states("target", "pairs").model.hidden_size or 1
    print(f"A random direction has a cosine within {1.96 / width**0.5:.2f} of zero in 95 of 100 cases.")
    encoded = found["expert"]["auto-encoder"]
    print(
        f"Read the cosines, beside those of untrained experts. The auto-encoder gives back {encoded.reconstruction:.2f} of the "
        f"variance of the expert's held-out states, and yet its direction has a cosine of {encoded.cosine:.2f}."
    )
    return found


if __name__ == "__main__":
    main()
