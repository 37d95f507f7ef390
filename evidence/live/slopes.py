"""A map that is fitted on right answers: from an activation at the last prompt token to the gradient of the target's answer.

What it adds raises the probability of the right option to first order. It needs labels, which no other map of a live expert does.
The same map from the target's own activation at the edited layer is an adapter to the task without an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import nnsight
import torch
from torch import Tensor

import expertsteer_nnsight as es
from evidence.live.texts import fitted
from expertsteer_nnsight.align.aligner import massive_coordinates, ordinary_rows
from expertsteer_nnsight.fit.live_expert import LiveMap
from expertsteer_nnsight.states.forward import padded
from expertsteer_nnsight.texts.texts import encode_continued, tokenizer_of

ALPHAS, SHARES = (1.0, 10.0, 100.0), (0.1, 0.2, 0.4)  # relative penalties; shares of the residual norm


def gradient(target: Any, layer: int, prompt: Any, options: Sequence[str], right: int) -> Tensor:
    """Gradient `[hidden]` of the right option's log-probability among the options, at the last prompt token after a layer.

    Options are compared by their log-likelihood a character, as `MultipleChoice` does.
    """
    texts = [encode_continued(tokenizer_of(target), prompt, option) for option in options]
    rows, starts = [ids for ids, _, _ in texts], [start for _, _, start in texts]
    ids = padded(rows)
    mask = torch.tensor([[i < len(row) for i in range(ids.shape[1])] for row in rows])
    scored = torch.tensor(
        [[s <= i < len(row) for i in range(1, ids.shape[1])] for row, s in zip(rows, starts, strict=True)]
    )
    lengths = torch.tensor([len(option.removeprefix(" ")) for option in options])
    residual, place = es.Residual(target), torch.zeros(*ids.shape, 1)
    place[torch.arange(len(rows)), torch.tensor(starts) - 1] = 1.0
    with torch.enable_grad(), target.trace(input_ids=ids, attention_mask=mask.long(), use_cache=False):
        h = residual.read(layer)
        added = torch.zeros(h.shape[-1], requires_grad=True)
        residual.write(layer, h + place * added)
        told = torch.log_softmax(target.output.logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        score = torch.log_softmax((told * scored).sum(1) / lengths, 0)[right]
        (slope,) = torch.autograd.grad(score, [added])
        found = nnsight.save(slope)
    return found.detach()


def best_map(
    live: es.LiveExpert, items: es.MultipleChoice, slopes: Tensor, validation: es.MultipleChoice
) -> es.LiveExpert:
    """A live expert with such a map in place of its own, its penalty and size chosen on validation items.

    Args:
        live: a fitted one of one layer pair, which adds ("add").
        items: questions with their right answers, whose prompts its expert reads.
        slopes: `gradient` of each, `[item, hidden]`.
        validation: other questions.
    """
    ((expert, target),) = live.layers_
    (known,) = live.maps_.values()
    x = es.collect(live.expert_, [prompt for prompt, _, _ in items.items], [expert], progress=False)[expert].float()
    massive = massive_coordinates(x)
    x = x.masked_fill(massive, 0.0)
    keep = ordinary_rows(x)
    tried = []
    for alpha in ALPHAS:
        made = fitted(x[keep], None, slopes[keep], known.norm, target, alpha)
        assert made.expert is not None
        weight, bias = made.size * made.expert.masked_fill(massive[:, None], 0.0), made.size * made.bias
        nothing = torch.zeros(len(bias) + 1, len(bias))
        for share in SHARES:
            one = copy.copy(live)
            one.maps_ = {(expert, target): LiveMap(expert, target, weight, bias, 0 * bias, known.norm, nothing)}
            one.amount_ = share
            tried.append(one)
    return tried[int(validation.score(live.target_, tried, progress=False)[1:].mean(1).argmax())]


def centred(live: es.LiveExpert, prompts: Sequence[Any]) -> es.LiveExpert:
    """The same with each map shifted, so that its mean over the ends of prompts is that of the target's own activations there."""
    made = copy.copy(live)
    made.maps_ = {}
    for (expert, target), m in live.maps_.items():
        x = es.collect(live.expert_, list(prompts), [expert], progress=False)[expert].float()
        y = es.collect(live.target_, list(prompts), [target], progress=False)[target].float()
        shift = (y - m(x)).mean(0)
        predictor = torch.cat([m.predictor[:-1], m.predictor[-1:] + shift])
        made.maps_[expert, target] = replace(m, bias=m.bias + shift, mean=m.mean + shift, predictor=predictor)
    return made
