"""Activation patching between a steered and an unsteered run: at which layers and positions does the effect pass?

    python -m recipes.activation_patching            # about a minute
    python -m recipes.activation_patching --step 1   # every layer

The residual stream after one layer is replaced, at some positions, by that of the other run on the same prompts. Put into the
unsteered run, the steered states show what suffices for the effect; the other way round, what it needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import nnsight
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

import expertsteer_nnsight as es
from recipes import pair
from recipes.logit_lens import log_odds

GROUPS = ("all", "prompt", "last")


class Patching(NamedTuple):
    """Shares of a plan's effect, 0 to 1 where nothing overshoots.

    Attributes:
        layers: the patched layers.
        recovered: by steered states in an unsteered run, for each of `GROUPS`.
        removed: by unsteered states in a steered run.
        effect: what is shared: mean score steered minus unsteered.
    """

    layers: list[int]
    recovered: Float[Tensor, "group layer"]
    removed: Float[Tensor, "group layer"]
    effect: float


def _states(model: Any, prompts: list[Any], layers: Sequence[int], odds: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """States of each layer, the positions of each group `[group, row, position]`, and the scores."""
    residual = es.Residual(model)
    with torch.no_grad(), model.trace(prompts):
        positions = es.Positions.read(model)  # the model's inputs come before its layers
        # the last prompt token, whose output predicts, is the completion's first
        masks = [positions.mask(where, skip_special=False) for where in ("all", "prompt", "completion")]
        groups = nnsight.save(torch.stack(masks))
        states = nnsight.save([])
        for layer in layers:
            states.append(residual.read(layer))
        scores = nnsight.save(odds(model.output.logits[:, -1]))
    return states, groups, scores


def _patched(model: Any, prompts: list[Any], layer: int, state: Tensor, groups: Tensor, odds: Any) -> Tensor:
    """Scores `[group, prompt]` with the output of `layer` replaced where a group says so; the groups share a forward."""
    residual = es.Residual(model)
    mask = rearrange(groups, "group row position -> (group row) position 1")
    with torch.no_grad(), model.trace(prompts * len(groups)):
        own = residual.read(layer)
        residual.write(layer, torch.where(mask, state.repeat(len(groups), 1, 1), own))
        scores = nnsight.save(odds(model.output.logits[:, -1]))
    return rearrange(scores, "(group row) -> group row", group=len(groups))


def patching(model: Any, plan: es.SteeringPlan, words: es.Words, layers: Sequence[int] | None = None) -> Patching:
    """Patches one layer at a time, both ways.

    Args:
        model: a wrapped model.
        plan: what steers it.
        words: the effect; all prompts go into one batch.
        layers: all if None.

    Raises:
        ValueError: the plan has no effect on the words that could be shared.
    """
    chosen = sorted(range(es.Residual(model).n_layers) if layers is None else layers)
    prompts, odds, steered = list(words.prompts), log_odds(model, words), plan.attach(model)
    plain_states, groups, low = _states(model, prompts, chosen, odds)
    steered_states, _, high = _states(steered, prompts, chosen, odds)
    effect = float((high - low).mean())
    if abs(effect) < 1e-6:
        raise ValueError(f"The plan moves the words by {effect:.1g} nats: there is no effect that layers could share.")
    recovered, removed = [], []
    for layer, plain_state, steered_state in zip(chosen, plain_states, steered_states, strict=True):
        into_plain = _patched(model, prompts, layer, steered_state, groups, odds)
        into_steered = _patched(steered, prompts, layer, plain_state, groups, odds)
        recovered.append((into_plain - low).mean(1) / effect)
        removed.append((high - into_steered).mean(1) / effect)
    return Patching(chosen, torch.stack(recovered, 1), torch.stack(removed, 1), effect)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the shares of the effect, layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts (default: %(default)s)")
    parser.add_argument("--step", type=int, default=3, help="patch every so many layers (default: %(default)s)")
    args = parser.parse_args(argv)
    model, plan, words = pair.target(), pair.plan(), pair.words(args.prompts)
    last = es.Residual(model).index(-1)
    layers = sorted({*range(0, last, args.step), plan.layers[0] - 1, *plan.layers, last} - {-1})
    found = patching(model, plan, words, layers)
    print(
        f"Steered at layers {list(plan.layers)}; effect {found.effect:.2f} nats of log-odds, mean of {len(words)} prompts.\n"
    )
    print("       steered states put in     unsteered states put in")
    print("       recover of the effect     remove of the effect")
    print("layer " + "  ".join(f"{g:>6}" for g in GROUPS) + "    " + "  ".join(f"{g:>6}" for g in GROUPS))
    for i, layer in enumerate(layers):
        # + 0.0: what rounds to zero from below would print a minus
        sides = [
            "  ".join(f"{round(float(x), 3) + 0.0:6.1%}" for x in side[:, i])
            for side in (found.recovered, found.removed)
        ]
        print(f"{layer:>5} " + "    ".join(sides))
    print(
        "\nRead: `last` is the last prompt token, `prompt` all before it. Steered states at the prompt tokens recover what later"
    )
    print(
        "attention fetches from there; where `last` alone recovers all, the effect has arrived at the position that predicts."
    )


if __name__ == "__main__":
    main()
