"""What `ExpertSteer` does with states: which layers it reads, which it pairs, and the fit of each layer pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from sklearn.base import clone
from torch import Tensor

from .activations import Activations
from .alignment import RidgeAligner
from .directions import Direction, find_direction
from .identity import ModelIdentity
from .layer_matching import LayerPair, LayerScores, match_layers
from .plan_file import library_versions
from .steering import SteeringPlan
from .vectors import SteeringVector

NO_VALIDATION = 'select="sweep" needs fit(validation=Validation(effect, neutral)), of expertsteer_nnsight.layer_sweep.'

Labelled = Mapping[int, Float[Tensor, "text hidden"]]
Anchors = Mapping[int, Float[Tensor, "anchor hidden"]]


def wanted_layers(steer: Any, expert: ModelIdentity, target: ModelIdentity) -> tuple[list[int], list[int]]:
    """`ExpertSteer.wanted_layers` of `steer`."""
    if steer.layers is not None:
        for pair in steer.layers:
            for layer, model, side in zip(pair, (expert, target), ("expert", "target"), strict=True):
                if not 0 <= layer < model.n_layers:
                    raise ValueError(
                        f"The layer pair {tuple(pair)} was asked for, but the {side} {model.name or model.kind} has layers "
                        f"0 to {model.n_layers - 1}."
                    )
        return sorted({e for e, _ in steer.layers}), sorted({t for _, t in steer.layers})
    low, high = steer.band

    def inside(n: int) -> list[int]:
        return [i for i in range(n) if low <= (i / (n - 1) if n > 1 else 0.0) <= high]

    return inside(expert.n_layers), inside(target.n_layers)


def chosen_pairs(
    steer: Any,
    labelled: Labelled,
    labels: Any,
    expert_anchors: Anchors,
    target_anchors: Activations,
    groups: Any,
    validate: Callable[[SteeringPlan, list[LayerPair]], list[tuple[LayerPair, float]]] | None,
) -> tuple[LayerScores | None, list[tuple[LayerPair, float]] | None, list[LayerPair]]:
    """The scores of all layer pairs, what a sweep found of the candidates, and the pairs that are taken."""
    if steer.space not in ("expert", "target"):
        raise ValueError(f'space must be "expert" or "target", got {steer.space!r}.')
    if steer.n_pairs < 1:
        raise ValueError(f"n_pairs is {steer.n_pairs}: at least one layer pair is needed.")
    if steer.layers is not None:
        pairs = [LayerPair(int(e), int(t), math.nan) for e, t in steer.layers]
        missing = [p for p in pairs if p.expert not in expert_anchors or p.target not in target_anchors]
        if missing:
            e, t, _ = missing[0]
            raise ValueError(f"The layer pair ({e}, {t}) was asked for, but there are no states of one of them.")
        return None, None, pairs
    whole = [getattr(anchors, "whole", anchors) for anchors in (expert_anchors, target_anchors)]
    scores = match_layers(whole[0], whole[1], steer.score, steer.permutations, steer.random_state)
    if steer.select != "sweep":
        return scores, None, scores._ranked(steer.select, "target", steer.band)[: steer.n_pairs]
    if validate is None:
        raise ValueError(NO_VALIDATION)
    candidates = scores._ranked("highest", "target", steer.band)
    other: Any = clone(steer)
    other.set_params(layers=[(p.expert, p.target) for p in candidates])
    every = other.fit_activations(labelled, labels, expert_anchors, target_anchors, groups)
    swept = validate(every, candidates)
    return scores, swept, [pair for pair, _ in swept[: steer.n_pairs]]


def fitted_pairs(
    steer: Any,
    pairs: list[LayerPair],
    labelled: Labelled,
    labels: Any,
    expert_anchors: Anchors,
    target_anchors: Activations,
    groups: Any,
) -> tuple[list[Any], list[Direction], SteeringPlan]:
    """An aligner and a direction for each pair, and the plan of their vectors."""
    aligners, directions, vectors, steps = [], [], [], []
    for pair in pairs:
        anchors, y = expert_anchors[pair.expert], target_anchors[pair.target]
        aligner: Any = clone(steer.aligner if steer.aligner is not None else RidgeAligner())
        if "random_state" in aligner.get_params():
            aligner.set_params(random_state=steer.random_state)
        r2 = _held_out_r2(aligner, anchors, y, getattr(target_anchors, "text_of", None), steer.random_state)
        aligner.fit(anchors, y)
        x = labelled[pair.expert]
        x = aligner.transform(x) if steer.space == "target" else x
        found = find_direction(x, labels, steer.direction, steer.kind, groups, steer.random_state)
        v = found.vector if steer.space == "target" else aligner.map_direction(found.vector, found.space)
        v = v if v.ndim == 1 else v[0]
        aligners.append(aligner)
        directions.append(found)
        vectors.append(
            SteeringVector(
                pair.target, v, steer.strength / math.sqrt(len(pairs)), target_anchors.norm(pair.target),
                steer.op, steer.where, skip_special=steer.skip_special,
            )
        )  # fmt: skip
        score = None if math.isnan(pair.score) else pair.score
        steps.append({"expert_layer": pair.expert, "target_layer": pair.target, "score": score, "held_out_r2": r2,
                      "method": found.method, "space": found.space, **found.details})  # fmt: skip
    expert = getattr(labelled, "model", getattr(expert_anchors, "model", None))
    info = {
        "expert": expert.to_dict() if isinstance(expert, ModelIdentity) else None,
        "settings": steer.settings,
        "pairs": steps,
        "versions": library_versions(),
    }
    return aligners, directions, SteeringPlan(tuple(vectors), target_anchors.model, info)


def plain_value(value: Any) -> Any:
    """A parameter as a plan keeps it: a number, a text, None, or its name."""
    if isinstance(value, (int, float, str, type(None))):
        return value
    # a function's own text holds its address in memory
    return getattr(value, "__name__", "function") if callable(value) else str(value)


def _held_out_r2(aligner: Any, x: Tensor, y: Tensor, text_of: Any, random_state: int) -> float | None:
    """R² on the rows of a tenth of the anchors of a map fitted on the others; None for too few to tell."""
    text = torch.arange(len(x)) if text_of is None else torch.tensor(text_of)
    n = int(text.max()) + 1
    if n < 20:
        return None
    order = torch.randperm(n, generator=torch.Generator().manual_seed(random_state))
    test = torch.isin(text, order[: n // 10])
    probe: Any = clone(aligner)
    return probe.fit(x[~test], y[~test]).score(x[test], y[test])
