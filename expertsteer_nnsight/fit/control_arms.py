"""What a fitted plan must be compared with: the same fit with something else in the place of the expert.

Every arm steers the plan's target layers with the plan's settings, so that one thing differs at a time:

- `native`: the direction in the target's own states of the same labelled texts, unmapped. What exceeds it is more than labels.
- `untrained`: the expert's weights random. What does not exceed it comes from the labels and the anchors.
- `text_features`: word and character n-grams in place of states. What does not exceed it is in the texts' surface.
- `permuted`: the expert's direction, mapped by aligners fitted on shuffled anchor pairs.
- `random`: random directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..align.aligner import Aligner, ordinary_rows, without_massive
from ..align.closed_form import CovarianceAligner, IdentityAligner
from ..align.controls import PermutedAligner, permuted_directions
from ..directions.find import find_direction
from ..states.activations import Activations
from ..steering.plan import SteeringPlan, random_plans
from ..texts.texts import Text, plain

if TYPE_CHECKING:
    from .expert_steer import ExpertSteer

_MOST = 4096  # texts that the principal coordinates of text features are found on: the time is cubic in them
Arms = dict[str, SteeringPlan | list[SteeringPlan]]
ExpertStates = Mapping[int, Float[Tensor, "_ d_expert"]]
TargetStates = Mapping[int, Float[Tensor, "_ d_target"]]


def control_arms(
    steer: ExpertSteer,
    labelled_expert: ExpertStates,
    labels: Any,
    expert_anchors: ExpertStates,
    target_anchors: Activations,
    *,
    groups: Any = None,
    same: Any = None,
    labelled_target: TargetStates | None = None,
    untrained: Sequence[tuple[ExpertStates, ExpertStates]] = (),
    texts: tuple[Sequence[Text], Sequence[Text]] | None = None,
    draws: int = 20,
) -> Arms:
    """The control arms of a fitted `ExpertSteer`, from states that are there already. It is neither fitted nor changed.

    Args:
        steer: fitted on the four that follow, by `fit` or `fit_activations`.
        labelled_expert: expert states of the labelled texts, layer -> `[text, d_expert]`.
        labels: one number a labelled text.
        expert_anchors: expert states of the anchors, layer -> `[anchor, d_expert]`.
        target_anchors: target states of the same anchors.
        groups: the pair each labelled text belongs to.
        same: names of the labelled texts of which equal ones share one (`find_direction`).
        labelled_target: target states of the labelled texts, layer -> `[text, d_target]`, for `native`.
        untrained: states of the labelled texts and of the anchors in each untrained expert, for `untrained`.
        texts: the labelled texts and the anchors, for `text_features`.
        draws: how many `permuted` and how many `random` plans.

    Returns:
        `native` and `text_features`, a plan each, and `untrained`, `permuted` and `random`, lists of plans; without an arm
        whose states or draws were not given. An `IdentityAligner` learns nothing from anchors, which leaves no
        `text_features` and no `permuted`.

    Raises:
        NotFittedError: `steer` is not fitted.
        ValueError: a layer is missing.
    """
    check_is_fitted(steer, "plan_")
    pairs = [(p.expert, p.target) for p in steer.pairs_]
    learnt = not isinstance(steer.aligner, IdentityAligner)
    arms: Arms = {}

    def fit(name: str, layers: list[tuple[int, int]], x: Any, anchors: Any, **changes: Any) -> SteeringPlan:
        other: Any = clone(steer)
        other.set_params(layers=layers, **changes)
        with warnings.catch_warnings():
            if name != "native":  # that a control's direction hardly goes with the labels is as it should be
                warnings.simplefilter("ignore", UserWarning)
            return _named(other.fit_activations(x, labels, anchors, target_anchors, groups, same=same), name)

    if labelled_target is not None:
        own = [(t, t) for _, t in pairs]
        arms["native"] = fit("native", own, labelled_target, target_anchors, aligner=native_aligner(steer.aligner))
    if untrained:
        arms["untrained"] = [fit("untrained", pairs, x, anchors) for x, anchors in untrained]
    if texts is not None and learnt:
        x, anchors = text_features(*texts, width=expert_anchors[pairs[0][0]].shape[1])
        arms["text_features"] = fit("text_features", [(0, t) for _, t in pairs], {0: x}, {0: anchors})
    if draws > 0:
        if learnt:
            arms["permuted"] = _permuted(steer, labelled_expert, labels, groups, expert_anchors, target_anchors, draws)
        plans = random_plans(steer.plan_, draws, steer.random_state)
        arms["random"] = [_named(plan, "random") for plan in plans]
    return arms


def native_aligner(aligner: Aligner | None) -> Aligner:
    """What takes the target's own direction to the target: nothing, or the covariance that the expert's would go through."""
    # where the expert's covector becomes a displacement by covariance with anchors, the target's own does too
    return aligner._copy() if isinstance(aligner, CovarianceAligner) else IdentityAligner()


def _named(plan: SteeringPlan, name: str) -> SteeringPlan:
    return SteeringPlan(plan.vectors, plan.target, {"control": name, **plan.info})


def _permuted(
    steer: ExpertSteer, x: Any, labels: Any, groups: Any, expert_anchors: Any, target_anchors: Activations, draws: int
) -> list[SteeringPlan]:
    """`steer.plan_` with the directions that come of shuffled anchor pairs; each draw shuffles all layers alike."""
    by_pair: list[Any] = []  # [draw, d_target] for each layer pair
    for pair, aligner, found in zip(steer.pairs_, steer.aligners_, steer.directions_, strict=True):
        anchors, mine = without_massive(expert_anchors[pair.expert], torch.as_tensor(x[pair.expert]))
        y = target_anchors[pair.target]
        ordinary = ordinary_rows(anchors, y)
        anchors, y = anchors[ordinary], y[ordinary]
        v = found.vector if found.vector.ndim == 1 else found.vector[0]
        if steer.space == "expert":
            by_pair.append(permuted_directions(aligner, anchors, y, v, found.space, draws, steer.random_state))
            continue
        rows = []
        for n in range(draws):
            shuffled = PermutedAligner(aligner, steer.random_state + n).fit(anchors, y)
            mapped, own = shuffled.transform(mine), aligner.transform(mine)
            gap, spread = ((m - m.mean(0)).norm() for m in (mapped - own, own))
            if n == 0 and gap < 1e-3 * spread:
                rows = [v] * draws  # an auto-encoder does not use the pairing: every search would end alike
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                # folds only score a direction
                other = find_direction(mapped, labels, steer.direction, steer.kind, groups, steer.random_state, folds=0)
            rows.append(other.vector if other.vector.ndim == 1 else other.vector[0])
        by_pair.append(rows)
    # a plan keeps its vectors in the order of layers, the pairs are in that of their scores
    order = sorted(range(len(by_pair)), key=lambda i: steer.pairs_[i].target)
    made = [steer.plan_.with_directions([by_pair[i][n] for i in order]) for n in range(draws)]
    return [_named(plan, "permuted") for plan in made]


def text_features(
    labelled: Sequence[Text], anchors: Sequence[Text], width: int
) -> tuple[Float[Tensor, "text width"], Float[Tensor, "anchor width"]]:
    """Texts as bags of words, word pairs and runs of 3 to 5 characters: principal coordinates of their hashed counts.

    Hashed into `width` columns at once, most of it would be lost to collisions, and the control would be too weak.

    Args:
        labelled: texts or chat messages.
        anchors: the same.
        width: number of columns, the expert's width, so that a map has as many parameters; fewer for few texts.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    content = [plain(t) for t in (*labelled, *anchors)]
    words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", n_features=2**18).transform(content)
    runs = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=2**18).transform(content)
    counts: Any = hstack([words, runs]).tocsr()
    some = counts[np.unique(np.linspace(0, len(content) - 1, min(len(content), _MOST)).round().astype(int))]
    values, vectors = torch.linalg.eigh(torch.as_tensor((some @ some.T).toarray()))
    keep = values.argsort(descending=True)[: min(width, int((values > 1e-9 * values[-1]).sum()))]
    found = torch.as_tensor((counts @ some.T).toarray()) @ (vectors[:, keep] / values[keep].sqrt())
    return found[: len(labelled)], found[len(labelled) :]
