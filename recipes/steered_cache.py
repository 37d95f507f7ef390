"""A cache of every layer in a steered run: what becomes of the added component on its way to the output?

    python -m recipes.steered_cache

nnsight's own `tracer.cache()` holds what later layers see, so in a trace of `plan.attach(model)` it holds the steered states.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import expertsteer_nnsight as es
from expertsteer_nnsight.models.residual import hidden
from recipes import pair


def cached(model: Any, prompts: Sequence[str]) -> Float[Tensor, "layer row position hidden"]:
    """The output of every layer for a batch of prompts (padded on the left), steered if the model is."""
    residual = es.Residual(model)
    blocks = [residual.layers[i] for i in range(residual.n_layers)]
    with torch.no_grad(), model.trace(list(prompts)) as tracer:
        cache = tracer.cache(modules=blocks)  # before any other read
    return torch.stack([hidden(cache[block.path].output) for block in blocks])


class Trail(NamedTuple):
    """Medians over prompts, at the last position, by layer.

    Attributes:
        norm: of the unsteered states.
        steered_norm: of the steered ones.
        cosine: of the two.
        change: norm of their difference, as a share of `norm`.
        along: cosine of the difference with all that has been added up to this layer; NaN before the first steered one.
        kept: the difference's component along that sum, over the sum's length: 1 where what was added is just still there.
    """

    norm: Float[Tensor, " layer"]
    steered_norm: Float[Tensor, " layer"]
    cosine: Float[Tensor, " layer"]
    change: Float[Tensor, " layer"]
    along: Float[Tensor, " layer"]
    kept: Float[Tensor, " layer"]


def trail(model: Any, plan: es.SteeringPlan, prompts: Sequence[str]) -> Trail:
    """Follows a plan's vectors through the layers.

    Args:
        model: a wrapped model.
        plan: of vectors that are added, the same for every row.
        prompts: one batch.

    Raises:
        ValueError: a vector that is not simply added.
    """
    if any(v.op != "add" or v.rows is not None for v in plan.vectors):
        raise ValueError('What was added is known for vectors with op="add" and one strength for all rows.')
    plain, steered = (cached(m, prompts)[:, :, -1].double() for m in (model, plan.attach(model)))
    added = torch.zeros(len(plain), 1, plain.shape[-1], dtype=torch.float64)
    for v in plan.vectors:
        added[v.layer :] += v.length * v.direction.double()
    change, size = steered - plain, added.norm(dim=-1)
    size = size.masked_fill(size == 0, float("nan"))
    component = (change * added).sum(-1) / size
    norm = plain.norm(dim=-1)
    values = (norm, steered.norm(dim=-1), torch.cosine_similarity(plain, steered, -1), change.norm(dim=-1) / norm,
              component / change.norm(dim=-1), component / size)  # fmt: skip
    return Trail(*(value.median(1).values for value in values))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the trail of the shared plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="prompts (default: %(default)s)")
    args = parser.parse_args(argv)
    model, plan = pair.target(), pair.plan()
    prompts: Any = pair.words(args.prompts).prompts
    found = trail(model, plan, prompts)
    print(f"Steered at layers {list(plan.layers)} (*); medians of {len(prompts)} prompts, at the last position.\n")
    print("layer     norm  steered  cosine  change  along added  kept")
    for i, (norm, steered, cosine, change, along, kept) in enumerate(zip(*(x.tolist() for x in found), strict=True)):
        mark = "*" if i in plan.layers else " "
        rest = "" if i < plan.layers[0] else f"{along:>12.2f} {kept:>6.2f}"
        print(f"{i:>4}{mark} {norm:>8.1f} {steered:>8.1f} {cosine:>7.3f} {change:>7.3f} {rest}")
    print(
        "\nRead: `change` is the difference of the two runs as a share of the unsteered norm. `kept` near 1 says that layers leave"
    )
    print(
        "what was added where it is, above 1 that they add to it; a low `along` says that most of the change is by then their own."
    )


if __name__ == "__main__":
    main()
