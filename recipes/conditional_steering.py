"""Conditional steering: a probe at an early layer decides, row by row, whether the later layers are steered.

    python -m recipes.conditional_steering

The probe reads the last prompt token in the same trace, before the first steered layer; its verdict holds for the whole
generation. Rows where it does not fire are left exactly as they are, whatever the plan's op.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor

import expertsteer_nnsight as es
from expertsteer_nnsight.measure.rollouts import completions, rollouts
from expertsteer_nnsight.texts.texts import tokenizer_of
from recipes import pair


@dataclass(frozen=True, eq=False)
class Probe:
    """Fires where a state's inner product with `direction` exceeds `threshold`.

    Attributes:
        layer: whose output it reads.
        direction: `[hidden]`.
        threshold: in units of the inner product.
        auc: on held-out texts.
    """

    layer: int
    direction: Float[Tensor, " hidden"]
    threshold: float
    auc: float = float("nan")


def fit_probe(model: Any, texts: Any, layer: int) -> Probe:
    """A logistic probe for the positive class of labelled texts, or pairs, with the threshold midway between the class means."""
    labelled = es.LabelledTexts.of(texts)
    states, labels = es.collect(model, labelled.texts, [layer], progress=False)[layer], torch.tensor(labelled.labels)
    found = es.find_direction(states, labels, "logistic", groups=labelled.groups)
    along, positive = states.double() @ found.vector, labels == labels.max()
    threshold = (along[positive].mean() + along[~positive].mean()) / 2
    return Probe(layer, found.vector.float(), float(threshold), found.details["held_out_auc"])


def generate_where(
    model: Any, plan: es.SteeringPlan, probe: Probe, prompts: Sequence[str], max_new_tokens: int = 20
) -> tuple[Int[Tensor, "row new"], Float[Tensor, " row"]]:
    """Greedy continuations, steered in the rows where the probe fires.

    Args:
        model: a wrapped model.
        plan: what steers it; its layers come after the probe's.
        probe: what decides.
        prompts: one a row.
        max_new_tokens: of each row; a row that ends earlier is padded.

    Returns:
        The new tokens, and each row's inner product less the threshold: it is steered where that is above 0.

    Raises:
        ValueError: the probe's layer does not come before the plan's.
    """
    if probe.layer >= plan.layers[0]:
        raise ValueError(f"The probe reads layer {probe.layer}, but the plan steers from layer {plan.layers[0]} on.")
    residual, tokenizer = es.Residual(model), tokenizer_of(model)
    call = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad(), model.generate(**call) as tracer:
        margins = nnsight.save([])
        with tracer.invoke(list(prompts)):
            for _ in tracer.iter[:]:
                positions = es.Positions.read(model)  # first: the inputs come before every layer
                if positions.step == 0:
                    h = residual.read(probe.layer)
                    last = positions.mask("completion")[..., None].to(h.device)  # of a prompt: its last token
                    state = (h * last).sum(1).float()
                    margins.append((state @ probe.direction.to(h.device) - probe.threshold).cpu())
                plan.apply(model, positions.only_rows(margins[0] > 0))
        with tracer.invoke():
            ids = nnsight.save(tracer.result)
    return ids[:, -max_new_tokens:].cpu(), margins[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Steers towards the positive only where a text is negative, and compares with all rows steered and with none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="texts of either class (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens a row (default: %(default)s)")
    args = parser.parse_args(argv)
    model, plan = pair.target(), pair.plan()
    # the probe learns from the very token that it will read
    negative_first = [(f"{negative} I", f"{positive} I") for positive, negative in pair.pairs()]
    probe = fit_probe(model, negative_first, plan.layers[0] - 1)
    prompts = [f"{text} I" for text in pair.pairs("test")[: args.rows].texts]
    ids, margins = generate_where(model, plan, probe, prompts, args.tokens)
    texts = tokenizer_of(model).batch_decode(ids, skip_special_tokens=True)
    never, always = (completions(model, rollouts(model, prompts, p, args.tokens)) for p in (None, plan))
    print(
        f"Probe for negative texts at layer {probe.layer}, AUC {probe.auc:.2f} held out; steered from layer {plan.layers[0]}.\n"
    )
    print("margin  fires  equals      text, first of a positive one, then of its negative twin, and continuation")
    for prompt, text, margin, plain, steered in zip(prompts, texts, margins.tolist(), never, always, strict=True):
        same = [name for name, other in (("unsteered", plain), ("steered", steered)) if text == other]
        print(f"{margin:>6.1f}  {'yes' if margin > 0 else 'no':<5}  {' & '.join(same) or 'NEITHER':<10}  {prompt!r}")
        print(f"{'':>27}{text!r}")
    right = sum(text == (s if m > 0 else p) for text, m, p, s in zip(texts, margins, never, always, strict=True))
    print(
        f"\n{right} of {len(texts)} rows are what their gate says, word for word: steered where the probe fires, else unsteered."
    )


if __name__ == "__main__":
    main()
