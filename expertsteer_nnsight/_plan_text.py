"""How a plan prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .steering import SteeringPlan


LITTLE = 0.05  # of the variance


def described(plan: SteeringPlan) -> str:
    """Each vector in a line, then what is known of the plan: its dose, its receipt, its making."""
    lines = [f"SteeringPlan for {plan.target or 'any model'}"]
    if len(plan.vectors) > 1 and all(v.rows is None for v in plan.vectors):
        from .calibration import total_strength

        lines[0] += f", total strength {total_strength(plan):.3g}"
    for v in plan.vectors:
        strength = "per row" if isinstance(v.strength, Tensor) else f"{v.strength:.3g}"
        known = "" if v.residual_norm is None else f" residual norms (of {v.residual_norm:.4g})"
        where = v.where + (f" from step {v.from_step}" if v.from_step else "")
        lines.append(f"  layer {v.layer:>3}  {v.op} {strength}{known}, {where} positions")
    calibration, receipt = plan.info.get("calibration"), plan.info.get("receipt")
    if calibration and plan.dose is not None:
        met = "" if calibration["met"] else f", which misses the budget of {calibration['kl_budget']:g}"
        lines.append(
            f"  dose {plan.dose:.3g}; at dose 1 {calibration['quantile']:.0%} of {calibration['tokens']} neutral tokens have a "
            f"KL(steered || unsteered) below {calibration['kl']:.3g} nats{met}"
        )
    else:
        lines.append("  not calibrated: calibrate(plan, model, prompts) gives its strength a unit")
    lines.append(f"  receipt: {receipt['verdict']}" if receipt else "  untested: no receipt")
    pairs = [p for p in plan.info.get("pairs", ()) if isinstance(p, dict)]
    if pairs:
        lines.append(f"  layer pairs, expert>target: {', '.join(map(_pair, pairs))}")
        found = [p["held_out_r2"] for p in pairs if p.get("held_out_r2") is not None]
        aligner = str(plan.info.get("settings", {}).get("aligner", ""))
        if found and max(found) < LITTLE and not aligner.startswith("CovarianceAligner"):
            lines.append(
                f"  the aligner predicts next to nothing of held-out anchors (R² below {LITTLE}): give a thousand or more"
            )
    told_above = ("calibration", "receipt", *(["pairs"] if pairs else []))
    lines += [f"  {k}: {_short(v)}" for k, v in plan.info.items() if k not in told_above]
    return "\n".join(lines)


def _pair(step: dict[str, Any]) -> str:
    """A layer pair, with R² of the aligner on held-out anchors and AUC of the direction on held-out labelled texts."""
    known = {"R²": step.get("held_out_r2"), "AUC": step.get("held_out_auc")}
    told = ", ".join(f"{name} {value:.2f}" for name, value in known.items() if value is not None)
    return f"{step.get('expert_layer')}>{step.get('target_layer')}" + (f" ({told})" if told else "")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 160 else text[:157] + "..."
