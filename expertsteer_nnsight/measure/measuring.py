"""measure(), receipt(): arms at equal KL, scored on held-out items. What comes out is a `Receipt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..steering.plan import SteeringPlan, random_plans, total_strength, with_total
from .calibration import ROLLOUT, Calibration, either_sign, neutral_tokens
from .effects import Effect
from .receipts import NULLS, Receipt, interval
from .rollouts import completions, rollouts, variety
from .rows import Encoded
from .scoring import costs

if TYPE_CHECKING:
    from ..ndif.host import Remote


def measure(
    model: Any,
    arms: Mapping[str, SteeringPlan | Sequence[SteeringPlan]],
    effect: Effect,
    neutral: Any,
    kl_budget: float | int = 1.0,
    *,
    rollout: int = ROLLOUT,
    null_items: int = 32,
    layer_pairs: Mapping[str, Sequence[tuple[int | None, int]]] | None = None,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = True,
) -> Receipt:
    """Compares arms at equal KL; all their draws share forwards.

    Args:
        model: the target.
        arms: a plan or several draws by name; what counts is their direction and sign, not their strength.
        effect: what to measure with.
        neutral: prompts that have nothing to do with the concept, on which KL and NLL are measured (`neutral_tokens`).
        kl_budget: nats, for the 95th percentile over tokens; lowered to what all arms reach, if some cannot.
        rollout: new tokens of each neutral prompt's continuation.
        null_items: the arms in `NULLS` have many draws, and are scored on this many of the items.
        layer_pairs: (expert layer, target layer) by arm, to be told in the receipt.
        rows: plans a forward (`scoring.in_rows`).
        remote: True, "http://...", or a `Remote`: run the target on NDIF.
        progress: show progress bars.

    Raises:
        ValueError: no arms, arms that cannot share a forward, or fewer than two items.
    """
    if len(effect) < 2:
        raise ValueError(f"An effect on {len(effect)} item has no interval: give at least two, better thirty or more.")
    draws = {name: [p] if isinstance(p, SteeringPlan) else list(p) for name, p in arms.items()}
    if not draws or not all(draws.values()):
        raise ValueError("There is no arm to measure, or one without plans.")
    how: dict[str, Any] = {"rows": rows, "remote": remote, "progress": progress}
    texts = neutral_tokens(model, neutral, rollout, remote=remote)
    every = [p for plans in draws.values() for p in plans]
    found, ready = either_sign(model, every, texts, kl_budget, **how)
    short = ~found.met & (found.kl < kl_budget)
    if short.any():
        kl_budget = float(found.kl[short].min())
        found, ready = either_sign(model, every, texts, kl_budget, **how)
    names = [name for name, plans in draws.items() for _ in plans for _ in range(2)]
    scores = _scores(model, ready, [name in NULLS for name in names], effect, null_items, how)
    result = _arms(draws, scores, found, layer_pairs or {})
    unsteered = {"score": float(scores[-1].mean()), "nll": found.unsteered_nll, "agrees": _above(scores[-1])}
    about = {"prompts": len(texts), "tokens": sum(len(t.ids) - t.prefix for t in texts), "rollout": rollout}
    return Receipt(result, unsteered, float(kl_budget), effect.unit, neutral=about)


def _scores(
    model: Any, plans: list[SteeringPlan], null: list[bool], effect: Effect, null_items: int, how: dict[str, Any]
) -> list[Tensor]:
    """Scores `[item]` of each plan, and of the unsteered model at the end; `null` ones on the first items only."""
    few = min(null_items, len(effect))
    places = [[i for i, flag in enumerate(null) if flag == kind] for kind in (False, True)]
    found: list[Tensor] = [torch.empty(0)] * len(plans)
    main, rest = places if few < len(effect) else ([*places[0], *places[1]], [])
    first = effect.score(model, [plans[i] for i in main], **how)
    for i, score in zip(main, first[1:], strict=True):
        found[i] = score
    if rest:
        for i, score in zip(rest, effect[:few].score(model, [plans[i] for i in rest], **how)[1:], strict=True):
            found[i] = score
    return [*found, first[0]]


def _arms(
    draws: dict[str, list[SteeringPlan]], scores: list[Tensor], found: Calibration, layer_pairs: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    p95, mean_nll, strength = (
        rearrange(t, "(draw sign) -> draw sign", sign=2) for t in (found.kl, found.nll, found.strength)
    )
    met = rearrange(found.met, "(draw sign) -> draw sign", sign=2)
    result, at = {}, 0
    for name, plans in draws.items():
        mine = slice(at, at + len(plans))
        score = torch.stack(scores[2 * at : 2 * (at + len(plans))]).double()
        at += len(plans)
        score = rearrange(score, "(draw sign) item -> draw sign item", sign=2)
        per_item = score[:, 0] - score[:, 1]
        effects = per_item.mean(1)
        items = per_item.mean(0).numpy()
        null = name in NULLS
        result[name] = {
            "layers": [list(p) for p in layer_pairs.get(name, [(None, layer) for layer in plans[0].layers])],
            "draws": len(plans),
            "n": per_item.shape[1],
            "effect": float(torch.quantile(effects.abs(), 0.95)) if null else float(items.mean()),
            "interval": None if null else list(interval(items, None, *spread_of_draws(effects.tolist()))[1:]),
            "effects": effects.tolist(),
            "items": [] if null else items.tolist(),
            "score_plus": float(score[:, 0].mean()),
            "score_minus": float(score[:, 1].mean()),
            "agrees": [_above(score[:, sign]) for sign in (0, 1)],
            "wrong_way": float((per_item < 0).double().mean(1).median()),
            "strength_plus": float(strength[mine][:, 0].median()),
            "strength_minus": float(strength[mine][:, 1].median()),
            "kl_p95": float(p95[mine].amax(1).median()),
            "nll": float(mean_nll[mine].mean(1).median()),
            "budget_met": bool(met[mine].all()),
        }
    return result


def _above(score: Tensor) -> float:
    """Share above zero; of several draws `[draw, item]` the median."""
    return float((score > 0).double().mean(-1).median())


def receipt(
    plan: SteeringPlan,
    model: Any,
    effect: Effect,
    neutral: Any,
    controls: Mapping[str, SteeringPlan | Sequence[SteeringPlan]] | None = None,
    *,
    instruction: tuple[str, str] | None = None,
    kl_budget: float | int | None = None,
    doses: Sequence[float | int] = (0.25, 0.5, 1.5),
    draws: int = 20,
    null_items: int = 32,
    rollout: int = ROLLOUT,
    rollout_tokens: int = 24,
    layer_pairs: Mapping[str, Sequence[tuple[int | None, int]]] | None = None,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = True,
) -> Receipt:
    """Effect, cost and controls of a plan, and what the expert contributed to it.

    Args:
        plan: what to test, the arm `expert`.
        model: the target.
        effect: `Words`, `Choices`, `Judged` or your own, with held-out items.
        neutral: prompts that have nothing to do with the concept, for KL, NLL and rollouts.
        controls: other arms at equal KL, from `ExpertSteer.controls`: native, untrained, text_features, permuted, random.
            Without an untrained expert the receipt cannot tell what the expert contributed.
        instruction: what one would write before a prompt to the same end, and to the opposite one: the arm `prompted`, whose
            KL is not measured.
        kl_budget: nats; that of the plan's calibration, else 1.
        doses: of the calibrated strength, for the dose-response of the expert, native and first untrained arm.
        draws: of random directions, where `controls` has none.
        null_items: items on which the arms of random and permuted draws are scored.
        rollout: new tokens of each neutral prompt's continuation.
        rollout_tokens: new tokens of the steered continuations whose repetition and KL are told; 0 for none.
        layer_pairs: (expert layer, target layer) by arm, to be told in the receipt.
        rows: plans a forward (`scoring.in_rows`).
        remote: True, "http://...", or a `Remote`: run the target on NDIF.
        progress: show progress bars.

    Returns:
        The receipt; its `plan` is the plan with the receipt in it, so that printing and saving it tell what was measured.

    Raises:
        ValueError: a control is called expert or prompted, arms cannot share a forward, or there are fewer than two items.
    """
    arms: dict[str, Any] = {"expert": plan, **(controls or {})}
    if controls and {"expert", "prompted"} & set(controls):
        raise ValueError("Controls cannot be called expert or prompted: these are the plan and the instruction.")
    if "random" not in arms and draws:
        arms["random"] = random_plans(plan, draws)
    calibration = plan.info.get("calibration", {})
    budget = kl_budget if kl_budget is not None else calibration.get("kl_budget", 1.0)
    how: dict[str, Any] = {"rows": rows, "remote": remote, "progress": progress}
    known = {"expert": [(p["expert_layer"], p["target_layer"]) for p in plan.info.get("pairs", ())]}
    pairs = {**{k: v for k, v in known.items() if v}, **(layer_pairs or {})}
    base = measure(
        model, arms, effect, neutral, budget, rollout=rollout, null_items=null_items, layer_pairs=pairs, **how
    )
    made = dict(base.arms)
    at_dose = {
        name: [
            with_total(s * _first(arms[name]), base.arms[name][f"strength_{side}"])
            for s, side in ((1, "plus"), (-1, "minus"))
        ]
        for name in ("expert", "native", "untrained")
        if name in arms
    }
    if instruction is not None:
        made["prompted"] = _prompted(model, effect, instruction, how)
    notes = []
    if labelled := plan.info.get("data", {}).get("anchors_labelled"):
        notes.append(f"{labelled} of the anchors are labelled texts, which carry the labels over for any expert")
    shares = shares_of_native(made)
    notes += notes_on(plan, made, shares, effect)
    found = Receipt(
        made, base.unsteered, base.kl_budget, base.unit, shares, _doses(model, at_dose, made, effect, doses, how),
        _rollouts(model, at_dose, neutral, rollout_tokens, remote), notes, base.neutral,
    )  # fmt: skip
    return replace(found, tested=SteeringPlan(plan.vectors, plan.target, {**plan.info, "receipt": found.to_dict()}))


def _first(arm: Any) -> SteeringPlan:
    return arm if isinstance(arm, SteeringPlan) else arm[0]


def _doses(
    model: Any, at_dose: Mapping[str, Sequence[SteeringPlan]], arms: Mapping[str, Any], effect: Effect,
    doses: Sequence[float | int], how: dict[str, Any],
) -> dict[str, list[list[float]]]:  # fmt: skip
    if not doses:
        return {}
    plans = [float(dose) * plan for signs in at_dose.values() for dose in doses for plan in signs]
    scores = rearrange(
        effect.score(model, plans, **how)[1:], "(arm dose sign) item -> arm dose sign item", dose=len(doses), sign=2
    )
    found = {}
    for name, score in zip(at_dose, scores.double().numpy(), strict=True):
        # of several draws the first alone was scored at other doses
        at_one = [(1.0, arms[name]["effect"], *arms[name]["interval"])] if arms[name]["draws"] == 1 else []
        rows = [(float(dose), *interval(both[0] - both[1])) for dose, both in zip(doses, score, strict=True)]
        found[name] = [list(row) for row in sorted([*rows, *at_one])]
    return found


def _rollouts(
    model: Any, at_dose: Mapping[str, Sequence[SteeringPlan]], prompts: Any, tokens: int, remote: bool | str | Remote
) -> dict[str, dict[str, Any]]:
    if tokens < 1:
        return {}
    plans: dict[str, SteeringPlan | None] = {"unsteered": None}
    for name in ("expert", "native"):
        if name in at_dose:
            plans |= {f"{name} {sign}": plan for sign, plan in zip("+-", at_dose[name], strict=True)}
    found = {}
    for name, plan in plans.items():
        made = rollouts(model, prompts, plan, tokens, remote=remote)
        found[name] = {**variety(made), "texts": completions(model, made), "kl_p95": None}
        new = [len(text.ids) > text.prompt for text in made]
        if plan is not None and any(new):
            found[name]["kl_p95"] = _kl_of(model, plan, [t for t, keep in zip(made, new, strict=True) if keep], remote)
    return found


def _kl_of(model: Any, plan: SteeringPlan, texts: list[Encoded], remote: bool | str | Remote) -> float:
    """95th percentile of the KL over the positions that predicted the new tokens of `texts`."""
    kl, _ = costs(model, [plan], texts, remote=remote)
    lengths = [len(t.ids) - t.prefix for t in texts]
    parts = kl[1].split(lengths)
    new = [part[t.prompt - t.prefix - 1 : -1] for part, t in zip(parts, texts, strict=True)]
    return float(torch.quantile(torch.cat(new), 0.95))


def _prompted(model: Any, effect: Any, instruction: tuple[str, str], how: dict[str, Any]) -> dict[str, Any]:
    """The arm of an instruction in place of a plan; it has no strength, and its cost on neutral text is not measured."""
    if not hasattr(effect, "instructed"):
        raise ValueError(f"{type(effect).__name__} has no instructed(text), which an instruction arm needs.")
    plus, minus = (effect.instructed(text).score(model, [], **how)[0].double() for text in instruction)
    items = (plus - minus).numpy()
    value, low, high = interval(items)
    return {
        "layers": [], "draws": 1, "n": len(items), "effect": value, "interval": [low, high], "effects": [value],
        "items": items.tolist(), "score_plus": float(plus.mean()), "score_minus": float(minus.mean()),
        "agrees": [_above(plus), _above(minus)],
        "wrong_way": float((items < 0).mean()), "strength_plus": None, "strength_minus": None, "kl_p95": None, "nll": None,
        "budget_met": None, "instruction": list(instruction),
    }  # fmt: skip


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
