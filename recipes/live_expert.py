"""A live expert in plain nnsight: one trace of the expert, one line in the target's generation.

    python -m recipes.live_expert

What `es.LiveExpert` does at the last prompt token, written out for your own loop, beside the package's. The recipe shows the
mechanics. Whether the expert contributes to the answers is another question: `live.receipt(...)` answers it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

import expertsteer_nnsight as es
from expertsteer_nnsight.measure.rollouts import completions, rollouts
from recipes import pair

LAYERS = (15, 22)  # of expert and target
QUESTIONS = (
    "Question: Which gas do plants take in from the air?\nAnswer:",
    "Question: What do bees make from nectar?\nAnswer:",
    "Question: Which planet is closest to the sun?\nAnswer:",
    "Question: What is water called when it is frozen?\nAnswer:",
)


def by_hand(
    expert: Any, target: Any, aligner: Callable[[Tensor], Tensor], prompts: Sequence[str], max_new_tokens: int = 12
) -> list[str]:
    """Greedy continuations, with the expert's mapped activation in place of the target's own at the last prompt token.

    Args:
        expert: a wrapped model that reads the prompts.
        target: the wrapped model that continues them.
        aligner: from the expert's activations at the first of `LAYERS` to the target's at the second.
        prompts: strings.
        max_new_tokens: of each.
    """
    with torch.no_grad(), expert.trace(list(prompts)) as tracer:
        read = nnsight.save(expert.model.layers[LAYERS[0]].output[:, -1])  # prompts are padded on the left
        tracer.stop()
    mapped = aligner(read)
    with torch.no_grad(), target.generate(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0) as tracer:
        with tracer.invoke(list(prompts)):
            target.model.layers[LAYERS[1]].output[:, -1] = (
                mapped  # without a loop over steps: the prompt's forward alone
            )
        with tracer.invoke():
            ids = nnsight.save(tracer.result)
    width = target.tokenizer(list(prompts), padding=True, return_tensors="pt")["input_ids"].shape[1]
    return target.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what the target says alone and with the live expert; gives in how many rows the package's loop says the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12, help="new tokens a row (default: %(default)s)")
    args = parser.parse_args(argv)
    expert, target, questions = pair.expert(), pair.target(), list(QUESTIONS)
    live = es.LiveExpert(layers=[LAYERS], anchor_ends=12).fit(
        expert, target, pair.anchors(), cache=pair.cache() / "live"
    )
    said = live.generate(questions, args.tokens)
    hand = by_hand(expert, target, live.maps_[LAYERS], questions, args.tokens)
    alone = completions(target, rollouts(target, questions, None, args.tokens))
    for question, *answers in zip(questions, alone, said, strict=True):
        print(f"\n{question}")
        for name, answer in zip(("unsteered", "live expert"), answers, strict=True):
            print(f"{name:>11}: {answer!r}")
    same = sum(a == b for a, b in zip(said, hand, strict=True))
    print(f"\n{same} of {len(said)} continuations are those of the loop written by hand.")
    return same


if __name__ == "__main__":
    main()
