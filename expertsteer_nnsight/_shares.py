"""What is told of measured arms: their shares of native's effect, and what a reader has to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .calibration import total_strength
from .receipts import interval
from .steering import SteeringPlan


def shares_of_native(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Ratios to native with intervals over the items that all arms share."""
    if "native" not in arms:
        return {}
    native, expert = (np.array(arms[name]["items"]) for name in ("native", "expert"))
    by_chance = arms["random"]["effect"] if "random" in arms else 0.0
    if arms["native"]["interval"][0] <= 0 or arms["native"]["effect"] <= by_chance:
        return {}

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return a.mean(axis) / b.mean(axis)

    found = {"expert": list(interval(np.stack([expert, native]), ratio))}
    if "untrained" in arms:
        rows = np.stack([expert - np.array(arms["untrained"]["items"]), native])
        error, freedom = spread_of_draws(arms["untrained"]["effects"])
        found["beyond_untrained"] = list(interval(rows, ratio, error / float(native.mean()), freedom))
    return found


def spread_of_draws(effects: Sequence[float]) -> tuple[float, int]:
    """Standard error of the mean of several draws, and its degrees of freedom."""
    if len(effects) < 2:
        return 0.0, 0
    return float(np.std(effects, ddof=1)) / len(effects) ** 0.5, len(effects) - 1


def notes_on(plan: SteeringPlan, arms: Mapping[str, Any], shares: Mapping[str, Any], effect: Any) -> list[str]:
    """What a reader has to know of the measurement."""
    notes = []
    if "native" in arms and not shares:
        notes.append("native does no more than random directions, so shares of it say nothing")
    measured, own = arms["expert"]["strength_plus"], total_strength(plan)
    if abs(own / measured - 1) > 0.05:
        notes.append(f"measured at a total strength of {measured:.2g} residual norms, the plan has {own:.2g}")
    if missed := [name for name, arm in arms.items() if arm["budget_met"] is False]:
        notes.append(f"no strength brings these to the KL budget: {', '.join(missed)}")
    accuracy = getattr(getattr(effect, "judge", None), "accuracy_", None)
    if accuracy is not None:
        notes.append(f"the judge's own held-out accuracy is {float(accuracy):.2f}")
    return notes
