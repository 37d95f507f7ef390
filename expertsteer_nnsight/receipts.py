"""What a plan does, what it costs, and what its controls do at the same cost.

Every arm is one plan, or many draws of one. Each draw is calibrated for either sign by itself to one KL budget on neutral
text, then scored on prompts: the score is the log-odds of positive over negative next words, and the effect is the score
steered towards minus the score steered away. The mean effect over random draws is zero by symmetry, so an arm of many
draws is told by the 95th percentile of |effect|.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from .calibration import Calibration, calibrate_many, with_total, word_scores
from .plan_file import library_versions
from .steering import SteeringPlan

if TYPE_CHECKING:
    from .remote import Remote


@dataclass(frozen=True)
class Probe:
    """What effect and cost are measured with.

    Attributes:
        prompts: unfinished texts, held out from every fit.
        positive: words whose probability the plan should raise; of each, the first token after a space counts.
        negative: words whose probability it should lower.
        neutral: texts that have nothing to do with the concept.
    """

    prompts: Sequence[str]
    positive: Sequence[str]
    negative: Sequence[str]
    neutral: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("prompts", "positive", "negative", "neutral"):
            value = tuple(text.strip() if name in ("positive", "negative") else text for text in getattr(self, name))
            if not value:
                raise ValueError(f"A probe needs {name}, but there are none.")
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class Receipt:
    """Measured arms; print it for the table.

    Attributes:
        arms: by name: `layers`, `draws`, `strength` (total over layers, mean of both signs, in residual norms), `strength_plus`,
            `strength_minus`, `score_plus`, `score_minus`, `effect`, `kl_p95` (nats, the larger of both signs), `nll`
            (nats a token, mean of both signs), `budget_met`, `wrong_way` (share of prompts whose score falls when steered towards).
            Arms of many draws hold medians over draws; their `effect` is the 95th percentile of |effect|, `effects` has
            all of them, and both scores are those of the draw of median |effect|.
        unsteered: `score` and `nll` without steering.
        kl_budget: the cost at which the arms were compared; less than asked where some arm could not reach that.
        probe: prompts, words and neutral texts.
    """

    arms: Mapping[str, Mapping[str, Any]]
    unsteered: Mapping[str, float]
    kl_budget: float
    probe: Probe

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        probe = {k: list(getattr(self.probe, k)) for k in ("prompts", "positive", "negative", "neutral")}
        return {"kl_budget": self.kl_budget, "unsteered": dict(self.unsteered), "arms": {k: dict(v) for k, v in self.arms.items()},
                "probe": probe, "versions": library_versions()}  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Writes JSON; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps(self.to_dict(), indent=1))
        os.replace(temporary, path)
        return path

    def __repr__(self) -> str:
        head = (
            f"{'arm':<20}{'layers':<16}{'strength':>9}{'score +':>9}{'score -':>9}{'effect':>9}{'KL p95':>8}{'NLL':>7}"
        )
        lines = [
            head,
            f"{'unsteered':<20}{'':<16}{'':>9}{self.unsteered['score']:>9.2f}{'':>9}{'':>9}{'':>8}{self.unsteered['nll']:>7.2f}",
        ]
        for name, a in self.arms.items():
            layers = " ".join(f"{e}>{t}" if e is not None else str(t) for e, t in a["layers"][:3]) + (
                " .." if len(a["layers"]) > 3 else ""
            )
            note = f"  95th percentile of {a['draws']} draws" if a["draws"] > 1 else ""
            lines.append(f"{name:<20}{layers:<16}{a['strength']:>9.2f}{a['score_plus']:>9.2f}{a['score_minus']:>9.2f}"
                         f"{a['effect']:>9.2f}{a['kl_p95']:>8.2f}{a['nll']:>7.2f}{note}")  # fmt: skip
        return "\n".join(lines)

    def plot(self) -> Any:
        """Effect against cost, a point an arm; a matplotlib figure."""
        from .plotting import plot_receipt

        return plot_receipt(self)


def measure(
    model: Any,
    arms: Mapping[str, SteeringPlan | Sequence[SteeringPlan]],
    probe: Probe,
    kl_budget: float | int = 1.0,
    *,
    layer_pairs: Mapping[str, Sequence[tuple[int | None, int]]] | None = None,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = True,
) -> Receipt:
    """Compares arms at equal KL; all their draws share forwards.

    Args:
        model: the target.
        arms: a plan or several draws by name; what counts is their direction, not their strength.
        probe: what to measure with.
        kl_budget: nats, for the 95th percentile over tokens; lowered to what all arms reach, if some cannot.
        layer_pairs: (expert layer, target layer) by arm, to be told in the receipt.
        rows: plans a forward (`costs`).
        remote: True, "http://...", or a `Remote`: run the target on NDIF.
        progress: show progress bars.

    Raises:
        ValueError: no arms, or arms that cannot share a forward.
    """
    draws = {name: [p] if isinstance(p, SteeringPlan) else list(p) for name, p in arms.items()}
    if not draws or not all(draws.values()):
        raise ValueError("There is no arm to measure, or one without plans.")
    signed = [sign * p for plans in draws.values() for p in plans for sign in (1.0, -1.0)]
    found = calibrate_many(model, signed, probe.neutral, kl_budget, rows=rows, remote=remote, progress=progress)
    short = ~found.met & (found.kl < kl_budget)
    if short.any():
        kl_budget = float(found.kl[short].min())
        found = calibrate_many(model, signed, probe.neutral, kl_budget, rows=rows, remote=remote, progress=progress)
    return _receipt(model, draws, signed, found, probe, kl_budget, layer_pairs or {}, rows, remote, progress)


def _receipt(
    model: Any, draws: dict[str, list[SteeringPlan]], signed: list[SteeringPlan], found: Calibration, probe: Probe,
    kl_budget: float, layer_pairs: Mapping[str, Any], rows: int | None, remote: bool | str | Remote,
    progress: bool,
) -> Receipt:  # fmt: skip
    ready = [with_total(p, float(s)) for p, s in zip(signed, found.strength, strict=True)]
    words = probe.positive, probe.negative
    scores = word_scores(model, ready, probe.prompts, *words, rows=rows, remote=remote, progress=progress)
    base, scores = scores[0], rearrange(scores[1:], "(draw sign) prompt -> draw sign prompt", sign=2)
    p95, mean_nll, strength = (
        rearrange(t, "(draw sign) -> draw sign", sign=2) for t in (found.kl, found.nll, found.strength)
    )
    result, at = {}, 0
    for name, plans in draws.items():
        mine = slice(at, at := at + len(plans))
        score = scores[mine].mean(-1)
        effects = score[:, 0] - score[:, 1]
        many = len(plans) > 1
        middle = effects.abs().argsort()[len(plans) // 2]
        result[name] = {
            "layers": [list(p) for p in layer_pairs.get(name, [(None, layer) for layer in plans[0].layers])],
            "draws": len(plans),
            "strength": float(strength[mine].mean(1).median()),
            "strength_plus": float(strength[mine][:, 0].median()),
            "strength_minus": float(strength[mine][:, 1].median()),
            "score_plus": float(score[middle, 0]),
            "score_minus": float(score[middle, 1]),
            "effect": float(torch.quantile(effects.abs(), 0.95)) if many else float(effects[0]),
            "kl_p95": float(p95[mine].amax(1).median()),
            "nll": float(mean_nll[mine].mean(1).median()),
            "budget_met": bool(rearrange(found.met, "(draw sign) -> draw sign", sign=2)[mine].all()),
            "wrong_way": float((scores[mine][:, 0] < base).float().mean(1).median()),
        }
        if many:
            result[name]["effects"] = effects.tolist()
    unsteered = {"score": float(base.mean()), "nll": found.unsteered_nll}
    return Receipt(result, unsteered, kl_budget, probe)
