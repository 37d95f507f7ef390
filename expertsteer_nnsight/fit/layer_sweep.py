"""The choice of layers by what steering there does: a small sweep on validation items.

A layer where a concept can be read need not be one where it can be steered, so each candidate is tried: one vector at one
target layer, calibrated to the same KL, scored on validation items (never on those that are reported).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..match.layer_matching import LayerPair
from ..measure.calibration import either_sign, neutral_tokens
from ..measure.effects import Effect
from ..steering.plan import SteeringPlan

if TYPE_CHECKING:
    from ..ndif.host import Remote


@dataclass(frozen=True)
class Validation:
    """What a sweep is made with.

    Attributes:
        effect: with items that serve for nothing else.
        neutral: prompts for the KL (`measure.calibration.neutral_tokens`).
        kl_budget: nats.
        rollout: new tokens of each neutral prompt's continuation.
        rows: plans a forward.
        remote: where the target runs.
    """

    effect: Effect
    neutral: Any
    kl_budget: float | int = 1.0
    rollout: int = 8
    rows: int | None = None
    remote: bool | str | Remote = False


def sweep(
    model: Any, plan: SteeringPlan, pairs: Sequence[LayerPair], validation: Validation
) -> list[tuple[LayerPair, float]]:
    """Every candidate with its effect on the validation items, the best first.

    Args:
        model: the target.
        plan: a vector for each candidate, in the order of target layers.
        pairs: the candidates, at most one a target layer; the order is free.
        validation: what to measure with.

    Raises:
        ValueError: the plan has other layers than the candidates.
    """
    if sorted(p.target for p in pairs) != [v.layer for v in plan.vectors]:
        raise ValueError("A sweep needs one vector for each candidate layer.")
    single = [SteeringPlan([v], plan.target) for v in plan.vectors]
    how: dict[str, Any] = {"rows": validation.rows, "remote": validation.remote}
    texts = neutral_tokens(model, validation.neutral, validation.rollout, remote=validation.remote)
    _, ready = either_sign(model, single, texts, validation.kl_budget, tolerance=0.1, **how)
    scores = validation.effect.score(model, ready, **how)[1:].mean(1)
    effects = (scores[0::2] - scores[1::2]).tolist()
    ordered = sorted(pairs, key=lambda p: p.target)
    return sorted(zip(ordered, effects, strict=True), key=lambda found: -found[1])
