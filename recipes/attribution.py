"""Attribution: the gradient of an effect at each layer's output, and what it foretells of a plan.

    python -m recipes.attribution

A zero vector is added at each layer's output, and the effect's gradient with respect to it is what a small vector there would
do, to first order. Its cosine with the plan's vector tells how much of the plan points where the effect is; its product with the
plan's vector is a prediction, which is held against the measured effect of a small dose. No parameter gets a gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

import expertsteer_nnsight as es
from recipes import pair
from recipes.logit_lens import log_odds


class Attribution(NamedTuple):
    """One layer, or the whole plan (`layer` None).

    Attributes:
        layer: counted from 0.
        norm: of the gradient, nats per unit of the stream.
        cosine: of the gradient with the plan's vector there; None where the plan has none.
        predicted: first-order effect of the dose there, nats; None as before.
        measured: effect of the dose there: half the difference of the scores steered towards and away.
    """

    layer: int | None
    norm: float | None
    cosine: float | None
    predicted: float | None
    measured: float | None


def gradients(
    model: Any, words: es.Words, places: dict[int, tuple[str, int, bool]] | None = None
) -> Float[Tensor, "layer hidden"]:
    """Gradient of the mean score with respect to a vector added at the output of each layer.

    Args:
        model: a wrapped model; `plan.attach(model)` gives the gradient at the steered run.
        words: the effect; all prompts go into one batch.
        places: (where, from_step, skip_special) of some layers, as in a `SteeringVector`; other layers have ("all", 0, True).
    """
    residual, odds, chosen = es.Residual(model), log_odds(model, words), places or {}
    with torch.enable_grad(), model.trace(list(words.prompts)):
        positions = es.Positions.read(model)  # the model's inputs come before its layers
        added = []
        for layer in range(residual.n_layers):
            h = residual.read(layer)
            zero = torch.zeros(h.shape[-1], dtype=h.dtype, device=h.device, requires_grad=True)
            mask = positions.mask(*chosen.get(layer, ("all", 0, True)))[..., None].to(h.device)
            residual.write(layer, h + mask * zero)
            added.append(zero)
        score = odds(model.output.logits[:, -1]).mean()
        # `with score.backward():` works too, but leaves gradients on all parameters
        found = nnsight.save(torch.stack([g.cpu() for g in torch.autograd.grad(score, added)]))
    return found


def attribution(model: Any, plan: es.SteeringPlan, words: es.Words, dose: float = 0.05) -> list[Attribution]:
    """Gradients at each layer against a plan, at the unsteered run; the last row is the whole plan.

    Args:
        model: a wrapped model.
        plan: of vectors that are added, the same for every row.
        words: the effect.
        dose: share of the plan's strength whose effect is predicted and measured.

    Raises:
        ValueError: a vector that is not simply added, or two of one layer at different positions.
    """
    if any(v.op != "add" or v.rows is not None for v in plan.vectors):
        raise ValueError('A first-order prediction is made for vectors with op="add" and one strength for all rows.')
    places = {v.layer: (v.where, v.from_step, v.skip_special) for v in plan.vectors}
    if any(places[v.layer] != (v.where, v.from_step, v.skip_special) for v in plan.vectors):
        raise ValueError("Two vectors of one layer act at different positions: attribute them one by one.")
    slopes = gradients(model, words, places).double()
    found, total = [], 0.0
    for layer, slope in enumerate(slopes):
        mine = [v for v in plan.vectors if v.layer == layer]
        if not mine:
            found.append(Attribution(layer, float(slope.norm()), None, None, None))
            continue
        vector = torch.stack([v.length * v.direction.double() for v in mine]).sum(0)
        cosine = float(torch.cosine_similarity(slope, vector, 0))
        predicted = dose * float(slope @ vector)
        total += predicted
        measured = _measured(model, es.SteeringPlan(mine, plan.target), words, dose)
        found.append(Attribution(layer, float(slope.norm()), cosine, predicted, measured))
    return [*found, Attribution(None, None, None, total, _measured(model, plan, words, dose))]


def _measured(model: Any, plan: es.SteeringPlan, words: es.Words, dose: float) -> float:
    towards, away = words.score(model, [dose * plan, -dose * plan])[1:].double().mean(1).tolist()
    return (towards - away) / 2  # what is even in the dose cancels


def main(argv: Sequence[str] | None = None) -> None:
    """Prints gradient, cosine, prediction and measurement, layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts (default: %(default)s)")
    parser.add_argument("--dose", type=float, default=0.05, help="share of the plan's strength (default: %(default)s)")
    args = parser.parse_args(argv)
    model, plan, words = pair.target(), pair.plan(), pair.words(args.prompts)
    rows = attribution(model, plan, words, args.dose)
    full = _measured(model, plan, words, 1.0)
    print(
        f"Gradient of the log-odds, mean of {len(words)} prompts; effects of {args.dose:g} of the plan's strength, in nats.\n"
    )
    print("layer  gradient  cosine  predicted  measured")
    for row in rows:
        name = "  sum" if row.layer is None else f"{row.layer:>5}"
        cells = ((row.norm, "10.4f"), (row.cosine, "8.3f"), (row.predicted, "11.4f"), (row.measured, "10.4f"))
        print(name + "".join(" " * int(f.split(".")[0]) if x is None else format(x, f) for x, f in cells))
    whole = rows[-1].predicted or 0.0
    print(f"\nAt the whole strength the first order says {whole / args.dose:.2f} nats, and {full:.2f} are measured.")
    print(
        f"Read: a random direction has a cosine of about {plan.vectors[0].direction.shape[0] ** -0.5:.3f} (root mean square)."
    )
    print(
        "Prediction and measurement agree while the model is near linear in the dose; at the whole strength they need not."
    )


if __name__ == "__main__":
    main()
