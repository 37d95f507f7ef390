"""Strength under a KL budget, and what a strength does and costs; many plans share one forward.

A batch holds one text in as many rows as there are plans, and row 0 unsteered: nothing is padded, and every row is
compared with the unsteered one of its own forward. KL is KL(steered || unsteered) in nats, per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .steering import SteeringPlan, SteeringVector
from .texts import as_texts, encode


def stack(plans: Sequence[SteeringPlan]) -> SteeringPlan:
    """One plan with a row for each of `plans`, and an unsteered row before them.

    Raises:
        ValueError: their vectors differ in op, place or the layer's residual norm, or are themselves per row.
    """
    layers = sorted({layer for p in plans for layer in p.layers})
    vectors = []
    for layer in layers:
        mine = [[v for v in p.vectors if v.layer == layer] for p in plans]
        if any(len(m) > 1 for m in mine) or any(v.rows is not None for m in mine for v in m):
            raise ValueError(
                f"Plans that share a forward need at most one vector a layer, the same for all rows (layer {layer})."
            )
        known = [v for m in mine for v in m]
        kinds = {(v.op, v.where, v.from_step, v.skip_special, v.residual_norm) for v in known}
        if len(kinds) > 1:
            raise ValueError(
                f"Plans that share a forward must agree in op, place and residual norm at layer {layer}: {kinds}."
            )
        first = known[0]
        rows = [m[0] if m else None for m in [[], *mine]]
        direction = torch.stack([first.direction if v is None else v.direction for v in rows])
        strength = torch.tensor([0.0 if v is None else float(v.strength) for v in rows])
        vectors.append(
            SteeringVector(
                layer,
                direction,
                strength,
                first.residual_norm,
                first.op,
                first.where,
                first.from_step,
                first.skip_special,
            )
        )
    return SteeringPlan(tuple(vectors), plans[0].target)


def row_costs(logits: Tensor, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """KL(row || row 0) `[row, token]` and NLL of the next token `[row, token - 1]`, from position `start` on, in nats.

    Runs inside the trace: row by row, so that no second copy of the logits is made.
    """
    kl, nll = [], []
    base = torch.log_softmax(logits[0, start:].float(), -1)
    for row in logits:
        mine = torch.log_softmax(row[start:].float(), -1)
        kl.append((mine.exp() * (mine - base)).sum(-1).clamp_min(0))
        nll.append(-mine[:-1].gather(-1, ids[start + 1 :, None])[:, 0])
    return torch.stack(kl), torch.stack(nll)


def costs(
    model: Any, plans: Sequence[SteeringPlan], texts: Any, *, rows: int = 96, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """What plans do to a model on texts: KL `[1 + plan, token]` and NLL `[1 + plan, token]`, tokens of all texts joined.

    Args:
        model: the target.
        plans: one a row; row 0 of the results is unsteered.
        texts: strings or chat messages. Special tokens that the tokenizer prepends are not counted.
        rows: plans a forward.
        progress: show a progress bar.
    """
    encoded = [encode(model.tokenizer, t) for t in as_texts(texts)]
    kls: list[list[Tensor]] = []
    nlls: list[list[Tensor]] = []
    chunks = [list(plans[i : i + rows]) for i in range(0, len(plans), rows)]
    with tqdm(total=len(chunks) * len(encoded), desc="KL on neutral text", unit="forward", disable=not progress) as bar:
        for chunk in chunks:
            steered, found_kl, found_nll = stack(chunk), [], []
            for ids, prefix in encoded:
                tokens = torch.tensor([ids] * (len(chunk) + 1))
                with torch.no_grad(), model.trace({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}):
                    steered.apply(model)
                    logits = model.output.logits
                    kl, nll = nnsight.save(row_costs(logits, tokens[0].to(logits.device), prefix))
                found_kl.append(kl.cpu())
                found_nll.append(nll.cpu())
                bar.update()
            keep = slice(None) if not kls else slice(1, None)
            kls.append(torch.cat(found_kl, 1)[keep])
            nlls.append(torch.cat(found_nll, 1)[keep])
    return torch.cat(kls), torch.cat(nlls)


def word_scores(
    model: Any,
    plans: Sequence[SteeringPlan],
    prompts: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    rows: int = 96,
    progress: bool = False,
) -> Tensor:
    """Log-odds of `positive` over `negative` next words after each prompt, `[1 + plan, prompt]`, in nats; row 0 unsteered.

    A word counts with its first token after a space.
    """

    def first(words: Sequence[str]) -> list[int]:
        return sorted({model.tokenizer(" " + w, add_special_tokens=False)["input_ids"][0] for w in words})

    up, down = first(positive), first(negative)
    if set(up) & set(down):
        raise ValueError("Some positive and negative words begin with the same token: choose words that differ there.")
    encoded = [encode(model.tokenizer, t)[0] for t in as_texts(prompts)]
    scores = []
    with tqdm(
        total=-(-len(plans) // rows) * len(encoded), desc="effect on prompts", unit="forward", disable=not progress
    ) as bar:
        for i in range(0, len(plans), rows):
            chunk = list(plans[i : i + rows])
            steered, found = stack(chunk), []
            for ids in encoded:
                tokens = torch.tensor([ids] * (len(chunk) + 1))
                with torch.no_grad(), model.trace({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}):
                    steered.apply(model)
                    last = model.output.logits[:, -1].float()
                    odds = nnsight.save(last[:, up].logsumexp(-1) - last[:, down].logsumexp(-1))
                found.append(odds.cpu())
                bar.update()
            scores.append(torch.stack(found, 1)[slice(None) if i == 0 else slice(1, None)])
    return torch.cat(scores)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Strengths that meet a KL budget, one a plan.

    Attributes:
        strength: total strength of each plan, in residual norms: the root of the summed squares over its layers.
        kl: the KL quantile there, in nats.
        met: whether `kl` is within `tolerance` of the budget.
        curve: for each plan, every (strength, KL) that was tried, ascending.
    """

    strength: Tensor
    kl: Tensor
    met: Tensor
    curve: list[list[tuple[float, float]]]


def total_strength(plan: SteeringPlan) -> float:
    """Root of the summed squares of a plan's strengths: k layers of s / sqrt(k) count as s."""
    return math.sqrt(sum(float(v.strength) ** 2 for v in plan.vectors))


def with_total(plan: SteeringPlan, strength: float) -> SteeringPlan:
    """The plan scaled to a total strength; its own must not be zero."""
    return plan * (strength / total_strength(plan))


def calibrate_many(
    model: Any,
    plans: Sequence[SteeringPlan],
    texts: Any,
    kl_budget: float = 1.0,
    *,
    quantile: float = 0.95,
    tolerance: float = 0.03,
    start: float = 0.3,
    limit: float = 8.0,
    rounds: int = 10,
    progress: bool = False,
) -> Calibration:
    """Finds, for every plan by itself, the strength at which the KL quantile over tokens meets the budget.

    Each round is one batch of forwards for all plans that are not there yet. The KL grows about as the square of the
    strength, so the next try interpolates log KL against log strength between the nearest two tries on either side, and
    bisects where that does not close in.

    Args:
        model: the target.
        plans: their signs count, their strengths do not.
        texts: neutral texts.
        kl_budget: nats.
        quantile: of KL(steered || unsteered) over all tokens.
        tolerance: relative, on the KL.
        start: first strength tried, in residual norms.
        limit: largest strength tried.
        rounds: most evaluations of a plan.
        progress: show a progress bar.
    """
    curves: list[list[tuple[float, float]]] = [[] for _ in plans]
    next_try = [start] * len(plans)
    with tqdm(total=len(plans), desc="calibrated", unit="plan", disable=not progress) as bar:
        for _ in range(rounds):
            open_ = [i for i, tried in enumerate(next_try) if tried > 0]
            if not open_:
                break
            kl, _nll = costs(model, [with_total(plans[i], next_try[i]) for i in open_], texts)
            for i, value in zip(open_, torch.quantile(kl[1:], quantile, dim=1).tolist(), strict=True):
                curves[i] = sorted([*curves[i], (next_try[i], value)])
                next_try[i] = _propose(curves[i], kl_budget, tolerance, limit)
            bar.update(sum(next_try[i] == 0 for i in open_))
    best = [min(curve, key=lambda p: (abs(math.log(max(p[1], 1e-12) / kl_budget)), p[0])) for curve in curves]
    kl_found = torch.tensor([p[1] for p in best])
    met = (kl_found / kl_budget).log().abs() <= math.log1p(tolerance) + 1e-6
    return Calibration(torch.tensor([p[0] for p in best]), kl_found, met, curves)


def _propose(curve: list[tuple[float, float]], budget: float, tolerance: float, limit: float) -> float:
    """The next strength to try, or 0 where one has met the budget or none can."""
    if any(abs(math.log(max(kl, 1e-12) / budget)) <= math.log1p(tolerance) for _, kl in curve):
        return 0.0
    below = max((p for p in curve if p[1] < budget), default=None)
    above = min((p for p in curve if p[1] >= budget and (below is None or p[0] > below[0])), default=None)
    if below is None:
        return curve[0][0] * max(0.1, 0.95 * math.sqrt(budget / curve[0][1]))
    if above is None:
        return (
            0.0
            if below[0] >= limit
            else min(limit, below[0] * min(4.0, 1.05 * math.sqrt(budget / max(below[1], 1e-6))))
        )
    (x0, y0), (x1, y1) = [(math.log(x), math.log(max(y, 1e-12) / budget)) for x, y in (below, above)]
    share = min(0.9, max(0.1, -y0 / (y1 - y0))) if len(curve) < 6 else 0.5
    return math.exp(x0 + share * (x1 - x0))
