"""A small receipt of the shared plan: its effect beside what controls reach at the same cost, with the figure.

    python -m recipes.measure_receipt

Controls are the target's own direction, experts with random weights, n-grams in the expert's place, shuffled anchors and random
directions. Few draws are taken here; `make demo` takes enough to believe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import expertsteer_nnsight as es
from expertsteer_nnsight.plotting import figure
from recipes import pair, recommended_method


def measure(untrained: int = 3, draws: int = 5, prompts: int = 16) -> es.Receipt:
    """The receipt.

    Args:
        untrained: how many experts with random weights.
        draws: of shuffled anchors and of random directions.
        prompts: items of the effect.
    """
    steer = recommended_method.fit()  # what the shared plan was made by
    controls = steer.controls(
        pair.expert(), pair.target(), pair.pairs(), pair.anchors(), untrained=untrained, draws=draws, cache=pair.cache()
    )
    neutral = pair.neutral()[:4]  # half of what the plan was calibrated on, for the time of it
    return es.receipt(pair.plan(), pair.target(), pair.words(prompts), neutral, controls, rollout_tokens=0)


def main(argv: Sequence[str] | None = None) -> es.Receipt:
    """Prints the receipt, saves it with its figure and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--untrained", type=int, default=3, help="experts with random weights (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=5, help="of shuffled and random arms (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="items of the effect (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=pair.FIGURES, help="where the files go (default: %(default)s)")
    args = parser.parse_args(argv)
    found = measure(args.untrained, args.draws, args.prompts)

    fig, (left, right) = figure(13, 4.6, columns=2)
    found.plot(ax=left)
    found.plot_doses(ax=right)
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "receipt.png", dpi=120)
    found.save(args.out / "receipt.json")
    print(found)
    print(
        "Read the last line, and what the controls reach: few seeds and draws make that high, since a further one might go far "
        f"beyond them (--untrained, --draws). The figure is {args.out / 'receipt.png'}."
    )
    return found


if __name__ == "__main__":
    main()
