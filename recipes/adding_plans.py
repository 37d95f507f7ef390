"""Two plans at once: do their effects add up, or do they interfere?

    python -m recipes.adding_plans

The shared sentiment plan, and one for past against present tense made of the target's own states (`own_plan`), each calibrated to
the same KL. `first + second` is one plan that steers by both.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import expertsteer_nnsight as es
from expertsteer_nnsight.measure.calibration import neutral_tokens
from expertsteer_nnsight.measure.scoring import costs
from recipes import pair

PAST = ("was", "had", "went", "said", "took", "made", "came", "saw", "found", "gave", "thought", "knew", "left", "kept")
PRESENT = (
    "is",
    "has",
    "goes",
    "says",
    "takes",
    "makes",
    "comes",
    "sees",
    "finds",
    "gives",
    "thinks",
    "knows",
    "leaves",
    "keeps",
)
TENSE = (
    ("She walked to the market and bought bread.", "She walks to the market and buys bread."),
    ("The dog slept while the children played.", "The dog sleeps while the children play."),
    ("My brother wrote a letter and posted it.", "My brother writes a letter and posts it."),
    ("The train left the station and crossed the river.", "The train leaves the station and crosses the river."),
    ("He opened the window and looked outside.", "He opens the window and looks outside."),
    ("The cook tasted the soup and added salt.", "The cook tastes the soup and adds salt."),
    ("We sat in the garden and drank tea.", "We sit in the garden and drink tea."),
    ("The teacher asked a question and waited.", "The teacher asks a question and waits."),
    ("They painted the fence and went home.", "They paint the fence and go home."),
    ("The clock struck six and the shop closed.", "The clock strikes six and the shop closes."),
    ("A farmer drove the cows to the hill.", "A farmer drives the cows to the hill."),
    ("The nurse took the pen and signed the form.", "The nurse takes the pen and signs the form."),
)
SUBJECTS = ("My neighbour", "The old captain", "Her sister", "The new clerk", "The man at the door", "His aunt",
            "Our guide", "The woman next to me", "The baker", "A tall stranger")  # fmt: skip


def own_plan(model: Any, pairs: Any, layers: Sequence[int], anchors: Sequence[str], **settings: Any) -> es.SteeringPlan:
    """A plan of mean differences of the model's own states; `anchors` give the layers' norms, `settings` go to `ExpertSteer`."""
    steer = es.ExpertSteer(es.IdentityAligner(), layers=[(i, i) for i in layers], **settings)
    return steer.fit(model, model, pairs, anchors, progress=False)


@dataclass(frozen=True)
class Interference:
    """What two plans do alone and together.

    Attributes:
        effects: by the effect's name: mean score steered minus unsteered, of the first plan, the second, and the sum.
        kl: 95th percentile over neutral tokens of KL(steered || unsteered), nats, of the same three.
        cosines: of the two plans' vectors, by layer, where both have one.
    """

    effects: dict[str, tuple[float, float, float]]
    kl: tuple[float, float, float]
    cosines: dict[int, float]

    def beyond(self, name: str) -> float:
        """Effect of the sum less the sum of the effects."""
        first, second, both = self.effects[name]
        return both - first - second


def interference(
    model: Any, first: es.SteeringPlan, second: es.SteeringPlan, effects: Mapping[str, Any], neutral: Sequence[str]
) -> Interference:
    """Measures two plans and their sum, on the same prompts and tokens.

    Args:
        model: what they steer.
        first: a plan.
        second: another.
        effects: by name, such as `es.Words`.
        neutral: texts that have nothing to do with either, for the KL.
    """
    plans, found = [first, second, first + second], {}
    for name, effect in effects.items():
        scores = effect.score(model, plans).double().mean(1)
        found[name] = tuple((scores[1:] - scores[0]).tolist())
    kl, _ = costs(model, plans, neutral_tokens(model, neutral))
    mine = [{i: sum(v.length * v.direction for v in p.vectors if v.layer == i) for i in p.layers} for p in plans[:2]]
    shared = sorted(mine[0].keys() & mine[1].keys())
    cosines = {i: float(torch.cosine_similarity(*(torch.as_tensor(m[i]) for m in mine), dim=0)) for i in shared}
    first_kl, second_kl, both_kl = kl[1:].quantile(0.95, 1).tolist()
    return Interference(found, (first_kl, second_kl, both_kl), cosines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints effects, costs and cosines of the two plans and of their sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="prompts for sentiment (default: %(default)s)")
    parser.add_argument("--neutral", type=int, default=8, help="neutral texts (default: %(default)s)")
    # two plans at the budget of one would cost more than the recipes' other runs
    parser.add_argument("--kl", type=float, default=0.5, help="budget of either plan, in nats (default: %(default)s)")
    args = parser.parse_args(argv)
    model, sentiment, neutral = pair.target(), pair.plan(), pair.neutral()[: args.neutral]
    # the mean over a text's tokens: its last one is a full stop
    tense = own_plan(model, TENSE, sentiment.layers, pair.anchors()[:100], position="mean")
    first, second = es.calibrate([sentiment, tense], model, neutral, args.kl)
    effects = {"sentiment": pair.words(args.prompts), "past tense": es.Words(SUBJECTS, PAST, PRESENT)}
    found = interference(model, first, second, effects, neutral)
    print("Mean change of the log-odds, nats, by plan:\n")
    print(f"{'measured':<12} {'sentiment':>10} {'past tense':>11} {'sum of both':>12} {'beyond additive':>16}")
    rows = [(name, *values, found.beyond(name)) for name, values in found.effects.items()]
    for name, *values in (*rows, ("KL, p95", *found.kl, found.kl[2] - found.kl[0] - found.kl[1])):
        print(f"{name:<12}" + "".join(f"{x:>{w}.2f}" for x, w in zip(values, (11, 12, 13, 17), strict=True)))
    print("\nCosine of the two vectors: " + ", ".join(f"layer {i} {c:.2f}" for i, c in found.cosines.items()))
    print(
        "Read: off the diagonal is what a plan does to the other's effect; `beyond additive` is what only both together do."
    )


if __name__ == "__main__":
    main()
