"""The arms of the study: the recommended setting with all of its controls, and one factor at a time from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import expertsteer_nnsight as es
from evidence.cell import Arm, Cell
from evidence.models import model
from evidence.shares import FEW, WIDENED
from expertsteer_nnsight.align.closed_form import IdentityAligner, ProcrustesAligner
from expertsteer_nnsight.fit.control_arms import control_arms
from expertsteer_nnsight.fit.layer_sweep import Validation, sweep
from expertsteer_nnsight.steering.plan import SteeringPlan

Layers = list[tuple[int, int]]
NULL_ITEMS = 32
DRAWS = 2  # of few or wrong labels
FEW_ANCHORS = 300
MANY = 200  # labelled pairs, where there are so many
FACTOR_ITEMS = 32
SWEPT = 12  # validation items of the sweep of layers
ALIGNERS = {
    "autoencoder": es.AutoencoderAligner(),
    "procrustes": ProcrustesAligner(whiten=True),
    "ridge_rank_64": es.RidgeAligner(max_rank=64),
    "procrustes_100": ProcrustesAligner(100),
}
LAYERS = {
    "one_pair": {"n_pairs": 1},
    "three_pairs": {"n_pairs": 3},
    "lowest_mi": {"score": "gaussian_mi", "select": "lowest", "band": (0.1, 0.9)},
    "highest_cka": {"score": "cka"},
}
DIRECTIONS = ("rfm", "pca", "logistic")
recommended = es.ExpertSteer.recommended


def base(cell: Cell, draws: int = 10) -> tuple[list[Arm], Layers]:
    """The recommended setting with all of its controls, and its layer pairs."""
    steer = recommended()
    plan = cell.fit(steer, cell.expert)
    controls = control_arms(
        steer, cell.labelled(cell.expert), cell.labels, cell.read(cell.expert), cell.read(cell.target),
        groups=cell.groups, labelled_target=cell.labelled(cell.target), draws=draws,
        untrained=[(cell.labelled(name), cell.read(name)) for name in cell.others], texts=(cell.texts, cell.anchor_texts()),
    )  # fmt: skip
    found = [Arm("base", "recommended", "expert", 0, plan)]
    for who, made in controls.items():
        plans = [made] if isinstance(made, SteeringPlan) else made
        few = NULL_ITEMS if who in ("permuted", "random") else None
        seeds = cell.untrained if who == "untrained" else range(len(plans))
        found += [Arm("base", "recommended", who, i, p, few) for i, p in zip(seeds, plans, strict=True)]
    return found, [(p.expert, p.target) for p in steer.pairs_]


def widened(cell: Cell, has: Callable[..., bool]) -> Iterator[Arm]:
    """The recommended setting with the concept's unlabelled texts among the anchors, and its controls; native is the base's."""
    if cell.concept.in_domain:
        yield from _other_anchors(cell, has, WIDENED, kind="generic+in_domain")


def few(cell: Cell, has: Callable[..., bool]) -> Iterator[Arm]:
    """The recommended setting with few anchors, and its controls; native is the base's."""
    if len(cell.anchors) > FEW_ANCHORS:
        yield from _other_anchors(cell, has, FEW, texts=cell.some(FEW_ANCHORS, len(cell.anchors), 0))


def _other_anchors(cell: Cell, has: Callable[..., bool], name: str, **anchors: Any) -> Iterator[Arm]:
    level = ("base", name)
    if has(*level, "text_features", 0):  # the last one
        return
    steer = recommended()
    yield Arm(*level, "expert", 0, cell.fit(steer, cell.expert, **anchors))
    layers = [(p.expert, p.target) for p in steer.pairs_]
    for seed, other in zip(cell.untrained, cell.others, strict=True):
        yield Arm(*level, "untrained", seed, cell.fit(recommended(layers=layers), other, **anchors))
    words = recommended(layers=[(0, t) for _, t in layers])
    yield Arm(*level, "text_features", 0, cell.fit_text(words, **anchors))


def native(layers: Layers, **changes: Any) -> es.ExpertSteer:
    """The recommended setting within the target itself, at the target layers of `layers`."""
    return recommended(**{"aligner": IdentityAligner(), "layers": [(t, t) for _, t in layers], **changes})


def factors(cell: Cell, layers: Layers, neutral: Any, has: Callable[..., bool]) -> Iterator[Arm]:
    """One factor at a time, at the base's layers unless the factor is the layers.

    Every level has the expert; native too, where the level changes it; two untrained experts at the levels that could carry the
    labels over by themselves (presets, the auto-encoder, few or in-domain anchors, few or wrong labels).

    Args:
        cell: models and concept.
        layers: of the base.
        neutral: what the sweep of layers is calibrated on.
        has: (factor, level, who, draw) to whether it was measured; such an arm is not fitted again.
    """
    nets = list(zip(cell.untrained, cell.others, strict=True))

    def arm(factor: str, level: str, who: str, draw: int, make: Callable[[], SteeringPlan]) -> Iterator[Arm]:
        if not has(factor, level, who, draw):
            yield Arm(factor, level, who, draw, make(), FACTOR_ITEMS)

    def arms(factor: str, level: Any, make: Callable[[], es.ExpertSteer], own: Any = None, seeds: int = 0,
             **how: Any) -> Iterator[Arm]:  # fmt: skip
        level = str(level)
        yield from arm(factor, level, "expert", 0, lambda: cell.fit(make(), cell.expert, **how))
        for seed, name in nets[:seeds]:
            yield from arm(factor, level, "untrained", seed, partial(cell.fit, make(), name, **how))
        if own is not None:
            yield from arm(factor, level, "native", 0, lambda: cell.fit(own(), cell.target, **how))

    def at(**changes: Any) -> Callable[[], es.ExpertSteer]:
        return lambda: recommended(**{"layers": layers, **changes})

    def itself(layers: Layers = layers, **changes: Any) -> Callable[[], es.ExpertSteer]:
        return lambda: native(layers, **changes)

    def reads(layers: Layers) -> Callable[[], es.ExpertSteer]:
        return lambda: es.ExpertSteer.in_domain(layers=layers)

    if not has("preset", "paper", "native", 0):  # the last one of the level
        paper = _picked(cell, es.ExpertSteer.paper())
        own = partial(es.ExpertSteer.paper, aligner=IdentityAligner(), layers=[(t, t) for _, t in paper])
        yield from arms("preset", "paper", partial(es.ExpertSteer.paper, layers=paper), own, seeds=2)
    own = reads([(t, t) for _, t in layers])
    yield from arms("preset", "in_domain", reads(layers), own, seeds=2, kind="in_domain")
    for name, aligner in ALIGNERS.items():
        yield from arms("aligner", name, at(aligner=aligner), seeds=2 * (name in ("autoencoder", "procrustes")))
    ways: dict[str, Callable[[], Layers]] = {
        k: partial(_picked, cell, recommended(**change)) for k, change in LAYERS.items()
    }
    ways["sweep"] = partial(_swept, cell, neutral)
    for name, pick in ways.items():
        if not has("layers", name, "native", 0):  # the last one of the level
            picked = pick()
            yield from arms("layers", name, at(layers=picked), itself(picked))
    yield from arm(
        "layers", "native's sweep", "native", 0, lambda: cell.fit(itself(_swept(cell, neutral, True))(), cell.target)
    )
    for name in DIRECTIONS:
        yield from arms("direction", name, at(direction=name), itself(direction=name))
    words = [(0, t) for _, t in layers]  # text features have one layer
    for n, draws in ((50, 2), (200, 2), (600, 1)):
        for draw in range(draws):
            some = {"texts": cell.some(n, len(cell.anchors), draw)}
            for who, of in [("expert", cell.expert)] + [("untrained", cell.others[draw])] * (n == 200):
                yield from arm("anchors", str(n), who, draw, lambda w=of, h=some: cell.fit(at()(), w, **h))
    for kind in ("in_domain", "generic+in_domain"):
        yield from arms("anchors", kind, at(), seeds=2, kind=kind)
    text = at(layers=words)
    yield from arm("anchors", "in_domain", "text_features", 0, lambda: cell.fit_text(text(), kind="in_domain"))
    yield from arms("anchors", "no further places", at(), kind="ends alone")
    yield from arms("states", "mean of all tokens", at(), itself(), position="mean")
    # which pairs, and which labels are wrong, is drawn; each draw has an untrained expert of its own
    for draw in range(DRAWS):
        few: dict[str, dict[str, Any]] = {f"{n} pairs": {"pairs": cell.some(n, len(cell.pairs), draw)} for n in (8, 32)}
        for level, how in {**few, "30 % flipped": {"labels": cell.noisy(0.3, draw)}}.items():
            makes: list[tuple[str, Any, str]] = [("expert", at(), cell.expert), ("untrained", at(), cell.others[draw])]
            for who, make, of in [*makes, ("native", itself(), cell.target)]:
                yield from arm("labels", level, who, draw, lambda m=make, w=of, h=how: cell.fit(m(), w, **h))
            yield from arm("labels", level, "text_features", draw, lambda h=how: cell.fit_text(text(), **h))
    if len(cell.concept.pairs) >= MANY:
        yield from arms("labels", f"{MANY} pairs", at(), itself(), pairs=range(MANY))
    # no labels: the expert's view of unlabelled texts, which an untrained net reads for it, against the target's own
    views = [("expert", 0, at(), cell.expert, cell.expert), ("native", 0, itself(), cell.target, cell.target)]
    views += [("untrained", seed, at(), name, cell.expert) for seed, name in nets[:2]]
    for who, draw, make, of, judge in views:
        yield from arm("labels", "own view", who, draw, lambda m=make, w=of, j=judge: cell.judged(m(), w, j))


def _picked(cell: Cell, steer: es.ExpertSteer) -> Layers:
    steer.set_params(aligner=es.RidgeAligner(), direction="mean_difference")  # the pairs depend on neither
    cell.fit(steer, cell.expert)
    return [(p.expert, p.target) for p in steer.pairs_]


def _swept(cell: Cell, neutral: Any, own: bool = False) -> Layers:
    """Layers by what steering there does to the validation items, of the expert's or of the target's `own` directions."""
    steer = recommended(select="sweep")
    validation = Validation(es.Choices(cell.concept.validation[:SWEPT]), neutral)
    if own:  # every layer by itself
        _, layers = steer.wanted_layers(*(cell.read(cell.target).model,) * 2)
        steer.set_params(aligner=IdentityAligner(), layers=[(t, t) for t in layers])
        plan = cell.fit(steer, cell.target)
        found = sweep(model(cell.target), plan, steer.pairs_, validation)[: recommended().n_pairs]
        return [(p.expert, p.target) for p, _ in found]
    steer.fit_activations(
        cell.labelled(cell.expert), cell.labels, cell.read(cell.expert), cell.read(cell.target), cell.groups,
        lambda plan, pairs: sweep(model(cell.target), plan, pairs, validation),
    )  # fmt: skip
    return [(p.expert, p.target) for p in steer.pairs_]
