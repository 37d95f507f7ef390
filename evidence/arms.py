"""The arms of the study: the recommended setting with all of its controls, and one factor at a time from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import expertsteer_nnsight as es
from evidence.cell import Arm, Cell
from evidence.models import model
from expertsteer_nnsight.alignment import IdentityAligner, ProcrustesAligner
from expertsteer_nnsight.control_arms import control_arms
from expertsteer_nnsight.layer_sweep import Validation, sweep
from expertsteer_nnsight.steering import SteeringPlan

Layers = list[tuple[int, int]]
NULL_ITEMS = 32
FACTOR_ITEMS = 32
ALIGNERS = {
    "autoencoder": es.AutoencoderAligner(),
    "procrustes": ProcrustesAligner(),
    "ridge_rank_64": es.RidgeAligner(max_rank=64),
}
LAYERS = {
    "one_pair": {"n_pairs": 1},
    "five_pairs": {"n_pairs": 5},
    "lowest_mi": {"score": "gaussian_mi", "select": "lowest", "band": (0.1, 0.9)},
    "highest_cka": {"score": "cka"},
}
DIRECTIONS = ("rfm", "pca", "logistic", "lda")
recommended = es.ExpertSteer.recommended


def base(cell: Cell, draws: int = 10) -> tuple[list[Arm], Layers]:
    """The recommended setting with all of its controls, and its layer pairs."""
    steer = recommended()
    plan = cell.fit(steer, cell.expert)
    controls = control_arms(
        steer, cell.labelled(cell.expert), cell.labels, cell.read(cell.expert), cell.read(cell.target),
        groups=cell.groups, labelled_target=cell.labelled(cell.target), draws=draws,
        untrained=[(cell.labelled(name), cell.read(name)) for name in cell.others], texts=(cell.texts, cell.anchors),
    )  # fmt: skip
    found = [Arm("base", "recommended", "expert", 0, plan)]
    for who, made in controls.items():
        plans = [made] if isinstance(made, SteeringPlan) else made
        few = NULL_ITEMS if who in ("permuted", "random") else None
        found += [Arm("base", "recommended", who, i, p, few) for i, p in enumerate(plans)]
    return found, [(p.expert, p.target) for p in steer.pairs_]


def native(layers: Layers, **changes: Any) -> es.ExpertSteer:
    """The recommended setting within the target itself, at the target layers of `layers`."""
    return recommended(**{"aligner": IdentityAligner(), "layers": [(t, t) for _, t in layers], **changes})


def factors(cell: Cell, layers: Layers, neutral: Any, has: Callable[..., bool]) -> Iterator[Arm]:
    """One factor at a time, at the base's layers unless the factor is the layers.

    Every level has the expert; native too, where the level changes it; two untrained experts, where it changes the map.

    Args:
        cell: models and concept.
        layers: of the base.
        neutral: what the sweep of layers is calibrated on.
        has: (factor, level, who, draw) to whether it was measured; such an arm is not fitted again.
    """

    def arm(factor: str, level: str, who: str, draw: int, make: Callable[[], SteeringPlan]) -> Iterator[Arm]:
        if not has(factor, level, who, draw):
            yield Arm(factor, level, who, draw, make(), FACTOR_ITEMS)

    def arms(factor: str, level: Any, make: Callable[[], es.ExpertSteer], own: Any = None, seeds: int = 0,
             **how: Any) -> Iterator[Arm]:  # fmt: skip
        level = str(level)
        yield from arm(factor, level, "expert", 0, lambda: cell.fit(make(), cell.expert, **how))
        for seed, name in list(zip(cell.untrained, cell.others, strict=True))[:seeds]:
            yield from arm(factor, level, "untrained", seed, partial(cell.fit, make(), name, **how))
        if own is not None:
            yield from arm(factor, level, "native", 0, lambda: cell.fit(own(), cell.target, **how))

    def at(**changes: Any) -> Callable[[], es.ExpertSteer]:
        return lambda: recommended(**{"layers": layers, **changes})

    def itself(layers: Layers = layers, **changes: Any) -> Callable[[], es.ExpertSteer]:
        return lambda: native(layers, **changes)

    def reads(layers: Layers) -> Callable[[], es.ExpertSteer]:
        return lambda: es.ExpertSteer.in_domain(layers=layers)

    yield from arms("preset", "paper", es.ExpertSteer.paper, seeds=2)
    own = reads([(t, t) for _, t in layers])
    yield from arms("preset", "in_domain", reads(layers), own, seeds=2, kind="in_domain")
    for name, aligner in ALIGNERS.items():
        yield from arms("aligner", name, at(aligner=aligner), seeds=2)
    ways: dict[str, Callable[[], Layers]] = {k: partial(_picked, cell, **change) for k, change in LAYERS.items()}
    ways["sweep"] = partial(_swept, cell, neutral)
    for name, pick in ways.items():
        if not has("layers", name, "native", 0):  # the last one of the level
            picked = pick()
            yield from arms("layers", name, at(layers=picked), itself(picked))
    for name in DIRECTIONS:
        yield from arms("direction", name, at(direction=name), itself(direction=name))
    for n in (50, 200, 1000):
        yield from arms("anchors", n, at(), seeds=2, texts=n)
    for kind in ("in_domain", "generic+in_domain"):
        yield from arms("anchors", kind, at(), seeds=2, kind=kind)
    yield from arms("anchors", "further ends", at(), kind="ends")
    yield from arms("states", "mean of all tokens", at(), itself(), position="mean")
    for n in (8, 32):
        yield from arms("labelled pairs", n, at(), itself(), pairs=n)
    for share in (0.2, 0.4):
        yield from arms("flipped labels", share, at(), itself(), labels=cell.noisy(share))
    for judge, who in (("expert", cell.expert), ("target", cell.target)):
        level = f"the {judge}'s own view"
        yield from arm("labels", level, "expert", 0, partial(cell.judged, at()(), cell.expert, who))
        yield from arm("labels", level, "native", 0, partial(cell.judged, itself()(), cell.target, who))


def _picked(cell: Cell, **change: Any) -> Layers:
    steer = recommended(**change)
    cell.fit(steer, cell.expert)
    return [(p.expert, p.target) for p in steer.pairs_]


def _swept(cell: Cell, neutral: Any) -> Layers:
    """Layers by what steering there does to the validation items."""
    steer = recommended(select="sweep")
    validation = Validation(es.Choices(cell.concept.validation), neutral)
    steer.fit_activations(
        cell.labelled(cell.expert), cell.labels, cell.read(cell.expert), cell.read(cell.target), cell.groups,
        lambda plan, pairs: sweep(model(cell.target), plan, pairs, validation),
    )  # fmt: skip
    return [(p.expert, p.target) for p in steer.pairs_]
