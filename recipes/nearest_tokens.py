"""Nearest tokens of a steering vector: what it would say if it went straight to the output.

    python -m recipes.nearest_tokens

A long state along v leaves the final norm along g * v, with g the norm's weight (a LayerNorm also takes v's mean away). Its
cosines with the rows of the unembedding, less the mean row, which moves all logits alike, rank the tokens. A random direction has
nearest tokens too, so the same is printed for random ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_nnsight.texts.texts import tokenizer_of
from recipes import pair
from recipes.logit_lens import log_odds, output_parts


def token_cosines(
    model: Any, directions: Float[Tensor, "direction hidden"], centre: bool = True
) -> Float[Tensor, "direction vocabulary"]:
    """Cosine of each direction, after the final norm, with every token's row of the unembedding.

    Args:
        model: a wrapped model whose weights are here: NDIF's sandbox shows none.
        directions: of any length; it has no effect.
        centre: take the mean row from all rows, since the softmax does not see it.
    """
    norm, unembed = output_parts(model)
    with torch.no_grad(), model.trace("a") as tracer:
        rows = unembed.weight
        # so long that the norm's epsilon plays no part; what the norm makes of zero is its bias
        v = 1e3 * torch.nn.functional.normalize(directions.to(rows.device, rows.dtype), dim=-1)
        seen = norm(v[None])[0] - norm(torch.zeros_like(v)[None])[0]
        wide = rows.float() - rows.float().mean(0) if centre else rows.float()
        cosines = torch.nn.functional.normalize(seen.float(), dim=-1) @ torch.nn.functional.normalize(wide, dim=-1).T
        found = nnsight.save(cosines.cpu())
        tracer.stop()
    return found


def nearest_tokens(
    model: Any, cosines: Float[Tensor, " vocabulary"], k: int = 6
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The `k` tokens of largest and the `k` of smallest cosine, each with its cosine."""
    decode = tokenizer_of(model).decode
    ends = (cosines.topk(k), cosines.topk(k, largest=False))
    high, low = ([(decode([i]), float(c)) for c, i in zip(*end, strict=True)] for end in ends)
    return high, low


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the nearest tokens of each vector of the plan, and what random directions give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=6, help="tokens at either end (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=100, help="random directions (default: %(default)s)")
    args = parser.parse_args(argv)
    model, plan, words = pair.target(), pair.plan(), pair.words()
    mine = torch.stack([v.direction for v in plan.vectors])
    random = torch.randn(args.draws, mine.shape[1], generator=torch.Generator().manual_seed(0))
    cosines = token_cosines(model, torch.cat([mine, random]))
    favour = log_odds(model, words)(cosines)  # about the mean cosine of positive words less that of negative ones
    null, highest = favour[len(mine) :], cosines[len(mine) :].amax(1)
    names = [f"layer {v.layer}" for v in plan.vectors] + ["random 1", "random 2"]
    print("                 highest  words")
    print("direction         cosine      z  nearest tokens | tokens at the other end")
    for i, name in enumerate(names):
        high, low = nearest_tokens(model, cosines[i], args.k)
        z = float((favour[i] - null.mean()) / null.std())
        tokens = " | ".join(" ".join(repr(token) for token, _ in side) for side in (high, low))
        print(f"{name:<16} {high[0][1]:>7.3f} {z:>6.1f}  {tokens}")
    print(
        f"\nOf {args.draws} random directions the highest cosine is {float(highest.median()):.3f} (median; 95th percentile"
    )
    print(
        f"{float(highest.quantile(0.95)):.3f}). Read: z tells how far the cosines with the positive words exceed those with the"
    )
    print(
        "negative ones, in standard deviations of random directions. A list of tokens that looks meaningful is no evidence while"
    )
    print("its highest cosine is one that random directions reach.")


if __name__ == "__main__":
    main()
