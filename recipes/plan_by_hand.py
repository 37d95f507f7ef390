"""A steering plan without a fit: one layer, the target's own mean difference, a strength that you choose.

    python -m recipes.plan_by_hand

No expert takes part. Strength is in residual norms: 0.2 adds a vector of a fifth of the median length of the residual stream there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import nnsight

import expertsteer_nnsight as es
from recipes import pair


def build(layer: int, strength: float) -> es.SteeringPlan:
    """A plan of one vector: mean of the positive states minus mean of the negative ones, in the target's own layer."""
    states = pair.states("target", "pairs")
    found = es.find_direction(states[layer], pair.pairs().labels, "mean_difference", folds=0)
    vector = es.SteeringVector(layer, found.vector, strength, residual_norm=states.norm(layer))
    return es.SteeringPlan([vector], target=states.model)


def write_on(plan: es.SteeringPlan, prompt: str, tokens: int) -> str:
    """A greedy continuation of the prompt by a steered copy of the target."""
    steered = plan.attach(pair.target())  # an edited copy: the weights are shared, every trace of it is steered
    with steered.generate(prompt, max_new_tokens=tokens, do_sample=False) as tracer:
        ids = nnsight.save(tracer.result)
    return pair.target().tokenizer.decode(ids[0], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> dict[float, float]:
    """Prints what several strengths do, and returns the log-odds by strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=14, help="one of 9 to 20 (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=0.2, help="in residual norms (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="new tokens (default: %(default)s)")
    args = parser.parse_args(argv)
    plan, words = build(args.layer, args.strength), pair.words()

    prompt, doses = str(words.prompts[0]), (-1.0, -0.5, 0.0, 0.5, 1.0)
    odds = words.score(pair.target(), [dose * plan for dose in doses])[1:].mean(1).tolist()
    print("strength   log-odds of positive next words, nats   continuation")
    for dose, value in zip(doses, odds, strict=True):
        print(f"{dose * args.strength:>8.2f}{value:>30.2f}{'':>12}{write_on(dose * plan, prompt, args.tokens)!r}")
    print(
        "Read the log-odds downwards: they should rise with the strength, and the text should stay a text. How much does no harm "
        "differs by model and layer: recipes.calibrate_strength gives a strength its unit."
    )
    return {dose * args.strength: value for dose, value in zip(doses, odds, strict=True)}


if __name__ == "__main__":
    main()
