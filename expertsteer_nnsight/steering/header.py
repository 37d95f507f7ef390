"""What is known of a plan without its tensors: each vector in plain values, the model, and how the plan was made.

It is the JSON header of a plan's file, and what a plan prints. It needs neither torch nor nnsight, so that a plan can be
looked at without them; it travels with a plan, so it needs nothing else either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLENDS = ("blend", "innovation")  # which put in an activation where the others have a direction
OPERATIONS = ("add", "add_keep_norm", "project_out", "clamp", *BLENDS)
WHERE = ("all", "prompt", "completion", "last_prompt", "given")
WEAK_R2 = 0.05  # of the variance: below it an aligner tells next to nothing
WEAK_COSINE = (
    0.2  # of a mapped direction with the target's own: below it plans mostly have less than half of its effect
)


@dataclass(frozen=True)
class VectorHeader:
    """A `SteeringVector` without its direction.

    Attributes:
        strength: a number, or one for each row.
        rows: how many rows a batch must have, or None where every row gets the same.
        layer, residual_norm, op, where, from_step, skip_special, at: as in `SteeringVector`.

    Raises:
        ValueError: a strength that is not finite, a norm that is not positive, unknown op or where, a negative layer, or places
            without `where="given"` or the reverse.
    """

    layer: int
    strength: float | tuple[float, ...]
    residual_norm: float | None
    op: str
    where: str
    from_step: int
    skip_special: bool
    rows: int | None = None
    at: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        if not all(map(math.isfinite, strengths)):
            raise ValueError(f"The strength of layer {self.layer} is {self.strength}: it must be finite.")
        if self.residual_norm is not None and not 0 < self.residual_norm < math.inf:
            raise ValueError(f"residual_norm must be a positive number, got {self.residual_norm}.")
        if self.layer < 0:
            raise ValueError(f"Layers count from 0, got {self.layer}: use Residual(model).index({self.layer}).")
        if self.op not in OPERATIONS:
            raise ValueError(f"Unknown op {self.op!r}: choose one of {', '.join(OPERATIONS)}.")
        if self.where not in WHERE:
            raise ValueError(f"Unknown where {self.where!r}: choose one of {', '.join(WHERE)}.")
        if self.from_step and (self.where != "completion" or self.from_step < 0):
            raise ValueError(
                f'from_step={self.from_step} counts new tokens: it needs where="completion" and must be >= 0.'
            )
        if (self.at is None) == (self.where == "given"):
            raise ValueError(f'where={self.where!r} with at={self.at!r:.40}: where="given" and at= need each other.')
        if any(len(set(row)) < len(row) or min(row, default=0) < 0 for row in self.at or ()):
            raise ValueError("The places in at= are token numbers from 0, each once a row.")


@dataclass(frozen=True)
class PlanHeader:
    """A `SteeringPlan` without its directions; print it for what the plan is.

    Attributes:
        target: the identity of the model that the plan is for, as plain values; None fits any model of its width.
        vectors: in the order of their layers.
        info: what is known of the plan's making.
        prompts: `lengths` and `checksums` of the prompts that it was made for, one a row; None fits any.
    """

    target: Mapping[str, Any] | None
    vectors: tuple[VectorHeader, ...]
    info: Mapping[str, Any]
    prompts: Mapping[str, Any] | None = None

    @property
    def total_strength(self) -> float:
        """Root of the summed squares of the strengths: k layers of s / sqrt(k) count as s.

        Raises:
            ValueError: strengths or vectors a row.
        """
        if any(v.rows is not None for v in self.vectors):
            raise ValueError(
                "A plan with a strength or vector for each row has no one strength: take a plan for each row."
            )
        return math.sqrt(sum(v.strength**2 for v in self.vectors if not isinstance(v.strength, tuple)))

    @property
    def dose(self) -> float | None:
        """Strength in units of the calibrated one (`calibrate`); None where the plan is not calibrated."""
        unit_strengths = self.info.get("calibration", {}).get("strengths")
        if not unit_strengths or self.vectors[0].rows is not None:
            return None
        first = next(i for i, s in enumerate(unit_strengths) if s)  # a plan without any strength cannot be calibrated
        strength = self.vectors[first].strength
        return None if isinstance(strength, tuple) else strength / unit_strengths[first]

    def __str__(self) -> str:
        """Each vector in a line, then what is known of the plan: its dose, its receipt, its making."""
        lines = [f"SteeringPlan for {_model(self.target)}"]
        if len(self.vectors) > 1 and all(v.rows is None for v in self.vectors):
            lines[0] += f", total strength {self.total_strength:.3g}"
        for v in self.vectors:
            strength = "per row" if isinstance(v.strength, tuple) else f"{v.strength:.3g}"
            known = "" if v.residual_norm is None else f" residual norms (of {v.residual_norm:.4g})"
            where = v.where + (f" from step {v.from_step}" if v.from_step else "")
            places = "the last prompt token" if v.where == "last_prompt" else f"{where} positions"
            lines.append(f"  layer {v.layer:>3}  {v.op} {strength}{known}, {places}")
        if self.prompts is not None:
            lines.append(f"  for {len(self.prompts['lengths'])} prompts, a row each; refuses others")
        calibration, receipt = self.info.get("calibration"), self.info.get("receipt")
        if calibration and self.dose is not None:
            met = "" if calibration["met"] else f", which misses the budget of {calibration['kl_budget']:g}"
            lines.append(
                f"  dose {self.dose:.3g}; at dose 1 {calibration['quantile']:.0%} of {calibration['tokens']} neutral tokens "
                f"have a KL(steered || unsteered) below {calibration['kl']:.3g} nats{met}"
            )
        elif self.prompts is None:
            lines.append("  not calibrated: calibrate(plan, model, prompts) gives its strength a unit")
        if receipt or self.prompts is None:
            lines.append(f"  receipt: {receipt['verdict']}" if receipt else "  untested: no receipt")
        pairs = [p for p in self.info.get("pairs", ()) if isinstance(p, dict)]
        if pairs:
            lines.append(f"  layer pairs, expert>target: {', '.join(map(_pair, pairs))}")
            found = [p["held_out_r2"] for p in pairs if p.get("held_out_r2") is not None]
            aligner = str(self.info.get("settings", {}).get("aligner", ""))
            if found and max(found) < WEAK_R2 and not aligner.startswith("CovarianceAligner"):
                lines.append(
                    f"  the aligner predicts next to nothing of held-out anchors (R² below {WEAK_R2}): give some hundred of them"
                )
            cosines = [p["native_cosine"] for p in pairs if p.get("native_cosine") is not None]
            if cosines and sum(cosines) < WEAK_COSINE * len(cosines):
                lines.append(
                    f"  unlikely to steer: its cosine with the target's own direction is {sum(cosines) / len(cosines):.2f} "
                    f"(mean of the layers, below {WEAK_COSINE}): give more anchors, or other layers"
                )
        told_above = ("calibration", "receipt", *(["pairs"] if pairs else []))
        lines += [f"  {k}: {_short(v)}" for k, v in self.info.items() if k not in told_above]
        return "\n".join(lines)


def _model(target: Mapping[str, Any] | None) -> str:
    """The model, as its `ModelIdentity` prints."""
    if target is None:
        return "any model"
    name = target["kind"] if target["id"] is None else target["id"].rsplit("/", 1)[-1]
    return f"{name or target['kind']} ({target['n_layers']} layers, width {target['hidden_size']})"


def _pair(step: dict[str, Any]) -> str:
    """A layer pair, with R² of the aligner on held-out anchors, AUC of the direction on held-out labelled texts, and its cosine."""
    known = {"R²": step.get("held_out_r2"), "AUC": step.get("held_out_auc"), "cosine": step.get("native_cosine")}
    told = ", ".join(f"{name} {value:.2f}" for name, value in known.items() if value is not None)
    return f"{step.get('expert_layer')}>{step.get('target_layer')}" + (f" ({told})" if told else "")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 160 else text[:157] + "..."
