"""ExpertSteer with the paper's steps as far as they are known: what each of them finds, and what the vectors do.

    python -m recipes.paper_method                       # as the secondary sources tell
    python -m recipes.paper_method --select highest      # the same, but for the choice of layer pairs

An affine auto-encoder a layer, the layer pairs of lowest mutual information, a Recursive Feature Machine on the encoded states.
The paper's code is not public, and this reproduces none of its tables.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import expertsteer_nnsight as es
from recipes import pair


def fit(select: str = "lowest") -> tuple[es.ExpertSteer, list[str]]:
    """The fitted estimator, and what was warned of.

    Args:
        select: which layer pairs: "lowest", as the paper is said to, or "highest".
    """
    steer = es.ExpertSteer.paper(select=select)
    with warnings.catch_warnings(record=True) as caught:
        # a finding, where two layers have little in common
        warnings.filterwarnings("always", "The direction's correlation with the labels")
        steer.fit(pair.expert(), pair.target(), pair.pairs(), pair.anchors(), cache=pair.cache("paper"))
    return steer, [str(w.message) for w in caught]


def main(argv: Sequence[str] | None = None) -> float:
    """Prints what was found and returns the effect, steered towards minus steered away, in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--select", choices=("lowest", "highest"), default="lowest", help="layer pairs (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=20, help="new tokens (default: %(default)s)")
    args = parser.parse_args(argv)
    steer, warned = fit(args.select)
    for message in dict.fromkeys(warned):
        print(f"Warned: {message}")
    effect = pair.show_fit(steer, max_new_tokens=args.tokens)
    print(
        f"Read the effect, {effect:.2f} nats towards minus away, beside that of recipes.recommended_method at the same KL budget. "
        "The R² is that of the target's states, which the auto-encoder is not fitted to."
    )
    return effect


if __name__ == "__main__":
    main()
