"""Continuations of prompts, steered or not, and how repetitive they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from ..ndif.argument import host_of
from ..steering.plan import SteeringPlan
from ..texts.texts import tokenizer_of
from .rows import Encoded
from .scoring import encoded

if TYPE_CHECKING:
    from ..ndif.host import Remote


def rollouts(
    model: Any,
    prompts: Any,
    plan: SteeringPlan | None = None,
    max_new_tokens: int = 24,
    *,
    batch_size: int = 32,
    do_sample: bool = False,
    remote: bool | str | Remote = False,
) -> list[Encoded]:
    """Continuations, as token ids: `prompt` tells where each begins. An end token and what follows are cut.

    Args:
        model: the target.
        prompts: strings or chat messages.
        plan: steers the generation, on every step; None for none. One with a row for each prompt will do.
        max_new_tokens: 0 gives the prompts back.
        batch_size: prompts a forward.
        do_sample: draw tokens, as the model's generation settings say, instead of taking the most likely.
        remote: True, "http://...", or a `Remote`: run on NDIF.

    Raises:
        ValueError: a plan with rows for another number of prompts.
    """
    texts = [text._replace(prompt=len(text.ids)) for text in encoded(model, prompts)]
    if max_new_tokens < 1:
        return texts
    host = host_of(remote)
    by_row = plan is not None and plan.n_rows is not None
    if plan is not None and by_row and plan.n_rows != len(texts):
        raise ValueError(f"The plan has a row for each of {plan.n_rows} prompts, but {len(texts)} were given.")
    steered = model if plan is None or by_row else plan.attach(model)
    tokenizer = tokenizer_of(model)
    ends = {tokenizer.eos_token_id, *_as_list(model._module.generation_config.eos_token_id)} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    found: list[Encoded] = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        if plan is not None and by_row:
            steered = plan.take(range(start, start + len(batch))).attach(model)
        width = max(len(text.ids) for text in batch)
        gaps = [width - len(text.ids) for text in batch]
        ids = torch.tensor([[pad] * gap + text.ids for gap, text in zip(gaps, batch, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * len(text.ids) for gap, text in zip(gaps, batch, strict=True)])
        call = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "pad_token_id": pad}
        with host.explained("Continuing prompts", "batch_size=") if host else nullcontext():
            made = _generate(steered, {"input_ids": ids, "attention_mask": mask}, call, host and host.backend(model))
        for text, row in zip(batch, made[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            found.append(text._replace(ids=[*text.ids, *row[:end]]))
    return found


def _generate(model: Any, inputs: dict[str, torch.Tensor], call: dict[str, Any], backend: Any) -> torch.Tensor:
    if backend is not None:
        call = {**call, "backend": backend}
    with torch.no_grad(), model.generate(inputs, **call) as tracer:
        ids = nnsight.save(tracer.result)
    return ids.cpu()


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def completions(model: Any, texts: Sequence[Encoded]) -> list[str]:
    """What each rollout says after its prompt."""
    return [tokenizer_of(model).decode(text.ids[text.prompt :], skip_special_tokens=True) for text in texts]


def variety(texts: Sequence[Encoded], n: int = 2) -> dict[str, float]:
    """How repetitive completions are, in tokens.

    Returns:
        `repetition`: share of each completion's n-grams that occurred in it before, mean over completions; `distinct`:
        distinct n-grams over all n-grams of all completions (distinct-n, arXiv 1510.03055).
    """
    grams = [
        [tuple(new[i : i + n]) for i in range(len(new) - n + 1)] for new in (text.ids[text.prompt :] for text in texts)
    ]
    some = [g for g in grams if g]
    if not some:
        return {"repetition": 0.0, "distinct": 1.0}
    everything = [gram for g in some for gram in g]
    return {
        "repetition": sum(1 - len(set(g)) / len(g) for g in some) / len(some),
        "distinct": len(set(everything)) / len(everything),
    }
