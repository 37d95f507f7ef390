"""Which of two sets of words a model would say next, unsteered and steered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .scoring import encoded, in_rows
from .steering import SteeringPlan
from .texts import tokenizer_of

if TYPE_CHECKING:
    from .remote import Remote


def word_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The tokens that `words` begin with after a space, ascending, each once."""
    found = set()
    for word in words:
        ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        # a tokenizer that itself puts a space before a text has a token for the other one
        found.add(next((i for i in ids if tokenizer.decode([i]).strip()), ids[0]))
    return sorted(found)


def word_scores(
    model: Any,
    plans: Sequence[SteeringPlan],
    prompts: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
) -> Tensor:
    """Log-odds of `positive` over `negative` next words after each prompt, `[1 + plan, prompt]`, nats; row 0 unsteered.

    A word counts with its first token after a space.

    Raises:
        ValueError: a positive and a negative word begin with the same token.
    """
    tokenizer = tokenizer_of(model)

    up, down = word_ids(tokenizer, positive), word_ids(tokenizer, negative)
    if set(up) & set(down):
        raise ValueError("Some positive and negative words begin with the same token: choose words that differ there.")

    def odds(logits: Tensor, ids: Tensor) -> list[Tensor]:
        last = logits[:, -1].float()
        return [last[:, up].logsumexp(-1) - last[:, down].logsumexp(-1)]

    known = [text._replace(prompt=len(text.ids)) for text in encoded(model, prompts)]
    label = "effect on prompts"
    found = in_rows(
        model, plans, known, [1] * len(known), odds, rows=rows, remote=remote, progress=progress, label=label
    )
    return torch.stack([score for (score,) in found], 1)
