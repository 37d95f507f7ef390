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
FACTOR_ITEMS = 48
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
    steer, whole = recommended(), recommended().anchor_ends == 0
    theirs, own = cell.read(cell.expert, whole=whole), cell.read(cell.target, whole=whole)
    plan = cell.fit(steer, cell.expert, whole=whole)
    controls = control_arms(
        steer, cell.labelled(cell.expert), cell.labels, theirs, own,
        groups=cell.groups, labelled_target=cell.labelled(cell.target), draws=draws,
        untrained=[(cell.labelled(name), cell.read(name, whole=whole)) for name in cell.others],
        texts=(cell.texts, cell.prefixes(whole)),
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

    Every level has the expert and two untrained experts, or native where the level changes native too.

    Args:
        cell: models and concept.
        layers: of the base.
        neutral: what the sweep of layers is calibrated on.
        has: (factor, level, who, draw) to whether it was measured; such an arm is not fitted again.
    """
    whole = recommended().anchor_ends == 0

    def arm(factor: str, level: str, who: str, draw: int, make: Callable[[], SteeringPlan]) -> Iterator[Arm]:
        if not has(factor, level, who, draw):
            yield Arm(factor, level, who, draw, make(), FACTOR_ITEMS)

    def arms(factor: str, level: Any, make: Callable[[], es.ExpertSteer], own: Any = None, **how: Any) -> Iterator[Arm]:
        how, level = {"whole": whole, **how}, str(level)
        yield from arm(factor, level, "expert", 0, lambda: cell.fit(make(), cell.expert, **how))
        for seed, name in list(zip(cell.untrained, cell.others, strict=True))[:2]:
            yield from arm(factor, level, "untrained", seed, partial(cell.fit, make(), name, **how))
        if own is not None:
            yield from arm(factor, level, "native", 0, lambda: cell.fit(own(), cell.target, **how))

    def at(**changes: Any) -> Callable[[], es.ExpertSteer]:
        return lambda: recommended(**{"layers": layers, **changes})

    def itself(layers: Layers = layers, **changes: Any) -> Callable[[], es.ExpertSteer]:
        return lambda: native(layers, **changes)

    def reads() -> es.ExpertSteer:
        return es.ExpertSteer.in_domain(layers=layers)

    def reads_itself() -> es.ExpertSteer:
        return es.ExpertSteer.in_domain(layers=[(t, t) for _, t in layers])

    yield from arms("preset", "paper", es.ExpertSteer.paper, whole=True)
    yield from arms("preset", "in_domain", reads, reads_itself, kind="in_domain", whole=True)
    for name, aligner in ALIGNERS.items():
        yield from arms("aligner", name, at(aligner=aligner))
    ways: dict[str, Callable[[], Layers]] = {k: partial(_picked, cell, whole, **change) for k, change in LAYERS.items()}
    ways["sweep"] = partial(_swept, cell, whole, neutral)
    for name, pick in ways.items():
        if not has("layers", name, "native", 0):  # the last one of the level
            picked = pick()
            yield from arms("layers", name, at(layers=picked), itself(picked))
    for name in DIRECTIONS:
        yield from arms("direction", name, at(direction=name), itself(direction=name))
    for n in (50, 200, 500, 1000):
        yield from arms("anchors", n, at(), texts=n)
    if cell.ends:
        yield from arms("anchors", "texts' ends alone" if not whole else "further ends", at(), whole=not whole)
    for kind in ("in_domain", "generic+in_domain"):
        yield from arms("anchors", kind, at(), kind=kind)
    for n in (8, 16, 32):
        yield from arms("labelled pairs", n, at(), itself(), pairs=n)
    for share in (0.2, 0.4):
        yield from arms("flipped labels", share, at(), itself(), labels=cell.noisy(share))
    how = {"whole": whole, "kind": "generic"}
    for judge, who in (("expert", cell.expert), ("target", cell.target)):
        level = f"the {judge}'s own view"
        yield from arm("labels", level, "expert", 0, partial(cell.judged, at()(), cell.expert, who, **how))
        yield from arm("labels", level, "native", 0, partial(cell.judged, itself()(), cell.target, who, **how))


def _picked(cell: Cell, whole: bool, **change: Any) -> Layers:
    steer = recommended(**change)
    cell.fit(steer, cell.expert, whole=whole)
    return [(p.expert, p.target) for p in steer.pairs_]


def _swept(cell: Cell, whole: bool, neutral: Any) -> Layers:
    """Layers by what steering there does to the validation items."""
    steer = recommended(select="sweep")
    x, theirs, own = (
        cell.labelled(cell.expert),
        cell.read(cell.expert, whole=whole),
        cell.read(cell.target, whole=whole),
    )
    validation = Validation(es.Choices(cell.concept.validation), neutral)
    steer.fit_activations(
        x, cell.labels, theirs, own, cell.groups,
        lambda plan, pairs: sweep(model(cell.target), plan, pairs, validation),
    )  # fmt: skip
    return [(p.expert, p.target) for p in steer.pairs_]
