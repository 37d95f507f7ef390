"""Strength under a KL budget: what a dose is.

One definition of KL for the whole package: KL(steered || unsteered) of the next-token distributions, in nats, at every
token of some neutral prompts and of their short greedy continuations by the *unsteered* model. All arms of a comparison and
all strengths are so measured on the same tokens. Its 95th percentile over tokens is what a budget is about. After the
iso-KL calibration of steering vectors; there the continuations are the steered model's, which differ for every arm, so
they are reported beside it (`Receipt.rollouts`) and not calibrated on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import count, number
from ..steering.plan import SteeringPlan, with_total
from ..texts.texts import as_texts, texts_hash
from .rollouts import rollouts
from .rows import Encoded
from .scoring import costs, encoded

if TYPE_CHECKING:
    from ..ndif.host import Remote

ROLLOUT = 16  # new tokens of a prompt's continuation
P = TypeVar("P", SteeringPlan, list[SteeringPlan])
_FEW = 8  # plans that share a forward with several strengths of each


def neutral_tokens(
    model: Any, prompts: Any, rollout: int = ROLLOUT, *, remote: bool | str | Remote = False
) -> list[Encoded]:
    """Prompts with their greedy continuations by the unsteered model: the tokens on which KL and NLL are measured.

    Args:
        model: the target.
        prompts: strings or chat messages that have nothing to do with the concept.
        rollout: new tokens; 0 for the prompts alone.
        remote: True, "http://...", or a `Remote`: run on NDIF.
    """
    found = rollouts(model, prompts, None, rollout, remote=remote)
    # all but the first token count as a completion: a plan that steers completions only is calibrated on every token
    return [text._replace(prompt=text.prefix + 1) for text in found]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Strengths that meet a KL budget, one a plan.

    Attributes:
        strength: total strength of each plan, in residual norms: the root of the summed squares over its layers.
        kl: the KL quantile there, in nats.
        nll: mean negative log-likelihood of the neutral texts there, nats a token.
        unsteered_nll: the same without steering.
        met: whether `kl` is within `tolerance` of the budget.
        curve: for each plan, every (strength, KL) that was tried, ascending.
    """

    strength: Tensor
    kl: Tensor
    nll: Tensor
    unsteered_nll: float
    met: Tensor
    curve: list[list[tuple[float, float]]]


def calibrate_many(
    model: Any,
    plans: Sequence[SteeringPlan],
    texts: Any,
    kl_budget: float | int = 1.0,
    *,
    quantile: float = 0.95,
    tolerance: float = 0.03,
    start: float = 0.3,
    limit: float | int = 8.0,
    rounds: int = 12,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
) -> Calibration:
    """Finds, for every plan by itself, the strength at which the KL quantile over tokens meets the budget.

    Each round is one batch of forwards for all plans that are not there yet. The KL grows about as the square of the
    strength, so the next try interpolates log KL against log strength between the nearest two tries on either side, and
    bisects where that does not close in. With few plans, a round tries four strengths of each: forwards have room for them.

    Args:
        model: the target.
        plans: their signs count, their strengths do not.
        texts: neutral texts, or their tokens (`neutral_tokens`).
        kl_budget: nats.
        quantile: of KL(steered || unsteered) over all tokens.
        tolerance: relative, on the KL.
        start: first strength tried, in residual norms.
        limit: largest strength tried, in residual norms.
        rounds: most rounds.
        rows: plans a forward (`in_rows`).
        remote: True, "http://...", or a `Remote`: run on NDIF.
        progress: show a progress bar.

    Raises:
        ValueError: a number out of its range, strengths a row, plans that steer none of the tokens, or a model without finite
            outputs.
    """
    number("kl_budget", kl_budget, above=0)
    number("quantile", quantile, above=0, most=1)
    for name, value in (("tolerance", tolerance), ("start", start), ("limit", limit)):
        number(name, value, above=0)
    count("rounds", rounds, 1)
    if rows is not None:
        count("rows", rows, 1)
    texts = encoded(model, texts)
    curves: list[list[tuple[float, float]]] = [[] for _ in plans]
    nlls: dict[tuple[int, float], float] = {}
    unsteered = math.nan
    several = len(plans) <= _FEW
    start = min(start, limit / (2.0 if several else 1.0))
    tries = [[start * f for f in ((0.25, 0.5, 1.0, 2.0) if several else (1.0,))] for _ in plans]
    with tqdm(total=len(plans), desc="calibrated", unit="plan", disable=not progress) as bar:
        for _ in range(rounds):
            open_ = [(i, size) for i, sizes in enumerate(tries) for size in sizes]
            if not open_:
                break
            kl, nll = costs(model, [with_total(plans[i], size) for i, size in open_], texts, rows=rows, remote=remote)
            unsteered = float(nll[0].mean())
            levels = torch.quantile(kl[1:], quantile, dim=1).tolist()
            if not all(math.isfinite(x) for x in levels) or max(levels) == 0:
                raise ValueError(
                    f"The KL on the neutral texts is {'zero' if max(levels) == 0 else 'NaN or infinite'} at a strength of "
                    f"{start}: the plans steer none of their tokens (prompt only?), or break the model."
                )
            for (i, size), value, mean in zip(open_, levels, nll[1:].mean(1).tolist(), strict=True):
                nlls[i, size] = mean
                curves[i] = sorted([*curves[i], (size, value)])
            for i in {i for i, _ in open_}:
                tries[i] = _propose(curves[i], kl_budget, tolerance, limit, several)
                bar.update(not tries[i])
    best = [min(curve, key=lambda p: (abs(math.log(max(p[1], 1e-12) / kl_budget)), p[0])) for curve in curves]
    kl_found = torch.tensor([p[1] for p in best])
    met = (kl_found / kl_budget).log().abs() <= math.log1p(tolerance) + 1e-6
    best_nll = torch.tensor([nlls[i, p[0]] for i, p in enumerate(best)])
    return Calibration(
        torch.tensor([p[0] for p in best], dtype=torch.float64), kl_found, best_nll, unsteered, met, curves
    )


def either_sign(
    model: Any, plans: Sequence[SteeringPlan], texts: Any, kl_budget: float | int = 1.0, **settings: Any
) -> tuple[Calibration, list[SteeringPlan]]:
    """Each plan and then its negative, each at the strength that meets the budget by itself.

    Args:
        model: the target.
        plans: their signs count, their strengths do not.
        texts: as in `calibrate_many`, like the rest.
        kl_budget: nats.
        settings: further ones of `calibrate_many`.

    Returns:
        The calibration and the plans at those strengths, two for each of `plans`: steered towards, steered away.
    """
    signed = [sign * plan for plan in plans for sign in (1.0, -1.0)]
    found = calibrate_many(model, signed, texts, kl_budget, **settings)
    return found, [with_total(p, float(s)) for p, s in zip(signed, found.strength, strict=True)]


def _propose(
    curve: list[tuple[float, float]], budget: float | int, tolerance: float, limit: float | int, several: bool
) -> list[float]:
    """The next strengths to try; none where one has met the budget or none can."""
    if any(abs(math.log(max(kl, 1e-12) / budget)) <= math.log1p(tolerance) for _, kl in curve):
        return []
    below = max((p for p in curve if p[1] < budget), default=None)
    above = min((p for p in curve if p[1] >= budget and (below is None or p[0] > below[0])), default=None)
    if below is None:
        first = curve[0][0] * max(0.1, 0.95 * math.sqrt(budget / curve[0][1]))
        return [first, first / 1.5] if several else [first]
    if above is None:
        if below[0] >= limit:
            return []
        # the KL grows as the square of a small strength, and slower where it saturates
        before = max((p for p in curve if p[0] < below[0] and p[1] > 0), default=None)
        slope = 2.0 if before is None else math.log(below[1] / before[1]) / math.log(below[0] / before[0])
        factor = 1.05 * (budget / max(below[1], 1e-6)) ** (1 / min(2.0, max(0.25, slope)))
        last = min(limit, below[0] * min(4.0, max(1.1, factor)))
        return sorted({last, min(limit, 1.5 * last)}) if several else [last]
    (x0, y0), (x1, y1) = [(math.log(x), math.log(max(y, 1e-12) / budget)) for x, y in (below, above)]
    share = min(0.9, max(0.1, -y0 / (y1 - y0)))
    if several:
        near = {share, *(min(0.95, max(0.05, share + step / (x1 - x0))) for step in (-0.04, 0.04)), 0.5}
        return sorted({math.exp(x0 + f * (x1 - x0)) for f in near})
    # interpolation alone can keep one end of the bracket for ever, so every other late try halves it
    share = 0.5 if len(curve) > 3 and len(curve) % 2 else share
    return [math.exp(x0 + share * (x1 - x0))]


def calibrate(
    plan: P,
    model: Any,
    prompts: Any,
    kl_budget: float | int = 1.0,
    *,
    rollout: int = ROLLOUT,
    quantile: float = 0.95,
    tolerance: float = 0.03,
    limit: float | int = 8.0,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
) -> P:
    """The plan at dose 1: the strength at which KL(steered || unsteered) meets a budget.

    The KL is that of this module's head: over the tokens of the prompts and of a short greedy continuation of each. Several
    strengths of a bracket are tried in one forward, so two or three rounds of forwards are the rule. All vectors of a plan
    are scaled together; several plans are calibrated each by itself, in shared forwards. A plan and its negative need not
    have the same strength: calibrate both. After the repository wassname/isokl_steering_calibration.

    Args:
        plan: one or several; the sign of their strength counts, its size does not.
        model: the target.
        prompts: strings or chat messages that have nothing to do with the concept, a few hundred tokens with their
            continuations.
        kl_budget: nats.
        rollout: new tokens of each prompt's continuation; 0 for the prompts alone.
        quantile: of the KL over tokens.
        tolerance: relative, on the KL.
        limit: largest strength tried, in residual norms.
        rows: plans a forward (`scoring.in_rows`).
        remote: True, "http://...", or a `Remote`: run on NDIF.
        progress: show a progress bar.

    Returns:
        The plan with the strength found; `plan.dose` is 1, that of `0.5 * plan` is 0.5. `plan.info["calibration"]` holds the
        budget, the KL that was reached, whether that meets the budget, and the curve of every (strength, KL) tried.

    Raises:
        ValueError: a strength of zero or for each row, a number out of its range, no prompts, a plan that steers none of the
            tokens, or a model without finite outputs.

    Warns:
        UserWarning: the budget cannot be met; the plan then has the strength that comes nearest.
    """
    plans = [plan] if isinstance(plan, SteeringPlan) else list(plan)
    texts = neutral_tokens(model, prompts, rollout, remote=remote)
    found = calibrate_many(
        model, plans, texts, kl_budget, quantile=quantile, tolerance=tolerance, limit=limit, rows=rows, remote=remote,
        progress=progress,
    )  # fmt: skip
    about = {"prompts": len(texts), "tokens": sum(len(t.ids) - t.prefix for t in texts), "rollout": rollout,
             "prompts_hash": texts_hash(as_texts(prompts))}  # fmt: skip
    made = [
        _at_dose(p, found, i, {"kl_budget": float(kl_budget), "quantile": quantile, **about})
        for i, p in enumerate(plans)
    ]
    return cast("P", made[0] if isinstance(plan, SteeringPlan) else made)


def _at_dose(plan: SteeringPlan, found: Calibration, i: int, about: dict[str, Any]) -> SteeringPlan:
    scaled = with_total(plan, float(found.strength[i]))
    budget, kl, met = about["kl_budget"], float(found.kl[i]), bool(found.met[i])
    if not met:
        warnings.warn(
            f"No strength up to {found.curve[i][-1][0]:.2g} residual norms brings the KL near {budget:g} nats; the nearest has "
            f"{kl:.2g}: use another budget, or look at the curve in plan.info['calibration'].",
            stacklevel=3,
        )
    told = {**about, "kl": kl, "met": met, "strength": float(found.strength[i]),
            "strengths": [float(v.strength) for v in scaled.vectors], "curve": [list(p) for p in found.curve[i]]}  # fmt: skip
    return SteeringPlan(scaled.vectors, scaled.target, {**scaled.info, "calibration": told})
