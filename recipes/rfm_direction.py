"""A Recursive Feature Machine on an expert's states: its spectrum, and how its direction does beside simpler ones.

    python -m recipes.rfm_direction

The machine is fitted on the states of contrast pairs in one layer. Its first AGOP eigenvector, a mean difference and a logistic
probe are then judged on pairs that none of them has seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import expertsteer_nnsight as es
from expertsteer_nnsight.directions.find import Direction
from expertsteer_nnsight.plotting import plot_spectrum
from recipes import pair


def directions(
    X: Float[Tensor, "text hidden"], labels: Sequence[int], groups: Sequence[int]
) -> tuple[es.RecursiveFeatureMachine, dict[str, Direction]]:
    """The fitted machine, and directions by method, the machine's among them.

    Args:
        X: states of the labelled texts.
        labels: 1 and 0.
        groups: the pair that each text belongs to.
    """
    machine = es.RecursiveFeatureMachine().fit(X, labels, groups=groups)
    found = {
        name: es.find_direction(X, labels, name, groups=groups, folds=0) for name in ("mean_difference", "logistic")
    }
    return machine, {"rfm": Direction(machine.directions_[0], "covector", "rfm"), **found}


def accuracy(
    direction: Direction, X: Float[Tensor, "text hidden"], y: Sequence[int], X_test: Float[Tensor, "test hidden"],
    y_test: Sequence[int],
) -> float:  # fmt: skip
    """Share of test texts on the right side of the midpoint between the two training classes along the direction."""
    along, test = (x.double() @ direction.vector.double() for x in (X, X_test))
    label, truth = torch.as_tensor(y), torch.as_tensor(y_test)
    midpoint = (along[label == 1].mean() + along[label == 0].mean()) / 2
    return float(((test > midpoint) == (truth == 1)).double().mean())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints the table, saves the spectrum and returns the held-out AUC by method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=9, help="of the expert, one of 6 to 11 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=pair.FIGURES, help="where the figure goes (default: %(default)s)")
    args = parser.parse_args(argv)
    train, test = pair.pairs(), pair.pairs("test")
    X, X_test = (pair.states("expert", texts)[args.layer] for texts in ("pairs", "test"))
    machine, found = directions(X, train.labels, train.groups)

    auc = {name: one.auc(X_test, test.labels) for name, one in found.items()}
    print(f"Expert layer {args.layer}, {len(X)} texts of pairs to fit on and {len(X_test)} held out")
    print(f"{'direction':<18}{'held-out AUC':>13}{'accuracy':>10}   cosine with " + "".join(f"{n:>17}" for n in found))
    for name, one in found.items():
        cosines = "".join(f"{float(one.vector @ other.vector):>17.2f}" for other in found.values())
        right = accuracy(one, X, train.labels, X_test, test.labels)
        print(f"{name:<18}{auc[name]:>13.3f}{right:>10.2f}{'':>15}{cosines}")
    guess = machine.predict(X_test) > 0.5
    whole = float((guess == (torch.tensor(test.labels) == 1)).double().mean())
    shares = machine.spectrum_shares_
    args.out.mkdir(parents=True, exist_ok=True)
    plot_spectrum(machine).savefig(args.out / "rfm_spectrum.png", dpi=130)
    print(f"The machine itself, with its kernel, is right on {whole:.2f} of the held-out texts.")
    print(
        f"Read the first share of the spectrum, {shares[0]:.2f}: above 0.9 one direction says what the machine knows. Then the AUC "
        f"beside the cosines: other vectors may tell the texts apart as well. The spectrum is in {args.out / 'rfm_spectrum.png'}."
    )
    return auc


if __name__ == "__main__":
    main()
