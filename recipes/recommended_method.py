"""ExpertSteer with the settings that we measured to work: what each step finds, and what the vectors do.

    python -m recipes.recommended_method
    python -m recipes.recommended_method --direction rfm      # one part replaced, the others as they are

Ridge on paired activations, the five most similar pairs of middle layers, the expert's mean difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import expertsteer_nnsight as es
from recipes import pair


def fit(direction: str = "mean_difference", n_pairs: int = 5) -> es.ExpertSteer:
    """The fitted estimator.

    Args:
        direction: a method of `find_direction`.
        n_pairs: how many layer pairs.
    """
    steer = es.ExpertSteer.recommended(direction=direction, n_pairs=n_pairs)
    steer.fit(pair.expert(), pair.target(), pair.pairs(), pair.anchors(), cache=pair.cache())
    return steer


def main(argv: Sequence[str] | None = None) -> float:
    """Prints what was found and returns the effect, steered towards minus steered away, in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", default="mean_difference", help="how it is found (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="how many layer pairs (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="new tokens (default: %(default)s)")
    args = parser.parse_args(argv)
    effect = pair.show_fit(fit(args.direction, args.pairs), max_new_tokens=args.tokens)
    print(
        f"Read the effect, {effect:.2f} nats towards minus away, beside that of recipes.paper_method at the same KL budget. "
        "Whether it is the expert's is another question: recipes.measure_receipt asks it."
    )
    return effect


if __name__ == "__main__":
    main()
