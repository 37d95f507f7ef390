"""The four steps as one estimator: align, pair layers, find a direction, and make the plan that adds it.

After ExpertSteer (arXiv 2505.12313), of which the abstract and secondary descriptions could be read: `paper()` holds what
they attest, with our choice where they are silent; `recommended()` holds what we measured to work.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..align.aligner import Aligner, ordinary_rows, without_massive
from ..align.autoencoder import AutoencoderAligner
from ..align.closed_form import CovarianceAligner, RidgeAligner
from ..directions.find import Direction, find_direction
from ..directions.rfm import RecursiveFeatureMachine
from ..files import library_versions
from ..match.layer_matching import LayerPair, LayerScores, match_layers
from ..models.identity import ModelIdentity
from ..states.activations import Activations
from ..steering.plan import SteeringPlan
from ..steering.vectors import SteeringVector
from ..texts.overlap import overlap_message
from ..texts.texts import Position
from .control_arms import Arms, control_arms, native_aligner
from .layer_sweep import Validation, sweep
from .reading import Reading, check_layer_pairs, held_out_r2

if TYPE_CHECKING:
    from ..ndif.host import Remote

NO_VALIDATION = (
    'select="sweep" needs fit(validation=Validation(effect, neutral)), of expertsteer_nnsight.fit.layer_sweep.'
)

Labelled = Mapping[int, Float[Tensor, "text hidden"]]
OwnLabelled = Mapping[int, Float[Tensor, "text d_target"]]
Anchors = Mapping[int, Float[Tensor, "anchor hidden"]]


class ExpertSteer(BaseEstimator):
    """Makes a steering plan for a target model from an expert model's states (after arXiv 2505.12313).

    Args:
        aligner: from the expert's states to the target's; a clone is fitted for each layer pair.
        score: how layer pairs are scored (`match_layers`); "gaussian_mi" for the paper's mutual information.
        select: "highest" or "lowest" scores; the paper is said to take the lowest. "sweep": of every target layer's
            best-scored pair, those that steer best on validation items (`fit(validation=...)`).
        band: depths, as fractions, that layers of both models must lie in.
        n_pairs: how many layer pairs, at most one a target layer; fewer where the band holds fewer target layers.
        layers: (expert layer, target layer) pairs instead of the search.
        direction: a method of `find_direction`, or an estimator such as a `RecursiveFeatureMachine`.
        kind: "gradient" or "pattern" for methods that find a covector; None for their own.
        space: "expert": find the direction in the expert's states, then map it; "target": map the states, then find it.
        position: which token's state stands for a text.
        anchor_ends: at how many further places of each anchor both models are read, for the map (`texts.word_ends`); with
            `position="last"` only. They cost no forward. Layers are matched on whole texts.
        strength: total strength in residual norms; each of k layers gets strength / sqrt(k).
        op: what the vectors do (`SteeringVector`).
        where: which positions they steer.
        skip_special: leave special tokens that the target's tokenizer prepends as they are.
        permutations: shuffles for the null of the layer scores; 0 saves their time.
        random_state: seed of every random choice.

    Attributes:
        scores_: of a fitted one, as all of these: `LayerScores`, or None where `layers` were given.
        pairs_: the layer pairs.
        sweep_: (layer pair, effect on the validation items), the best first; None without a sweep.
        aligners_: a fitted aligner for each pair.
        directions_: a `Direction` for each pair, in the expert's space or the target's (`space`).
        plan_: the `SteeringPlan`.
        states_: what `fit` read, so that `controls` need not read it again.
    """

    def __init__(
        self,
        aligner: Aligner | None = None,
        score: Any = "mutual_knn",
        select: str = "highest",
        band: tuple[float, float] = (0.3, 0.7),
        n_pairs: int = 1,
        layers: Sequence[tuple[int, int]] | None = None,
        direction: Any = "mean_difference",
        kind: Literal["gradient", "pattern"] | None = None,
        space: str = "expert",
        position: Position = "last",
        anchor_ends: int = 0,
        strength: float = 0.3,
        op: str = "add",
        where: str = "all",
        skip_special: bool = True,
        permutations: int = 0,
        random_state: int = 0,
    ) -> None:
        self.aligner = aligner
        self.score = score
        self.select = select
        self.band = band
        self.n_pairs = n_pairs
        self.layers = layers
        self.direction = direction
        self.kind: Any = kind
        self.space = space
        self.position = position
        self.anchor_ends = anchor_ends
        self.strength = strength
        self.op = op
        self.where = where
        self.skip_special = skip_special
        self.permutations = permutations
        self.random_state = random_state

    @classmethod
    def recommended(cls, **changes: Any) -> ExpertSteer:
        """What we measured to work: ridge on anchors read at seven places each, the five most similar layer pairs, mean difference.

        Chosen on the tuning concepts of `docs/evidence.md`, where it has 0.98 of the target's own effect (median of the reported
        concepts), and 0.86 with 300 anchors. Give it some hundred generic anchors, none of them a labelled text.
        """
        preset = {"aligner": RidgeAligner(), "anchor_ends": 6, "score": "mutual_knn", "n_pairs": 5}
        return cls(**{**preset, **changes})

    @classmethod
    def in_domain(cls, **changes: Any) -> ExpertSteer:
        """No map at all: the target displacement that co-occurs with the expert's readout; for in-domain anchors.

        The pattern of Haufe et al. (NeuroImage 87, 2014) across models (`CovarianceAligner`).
        """
        preset = {"aligner": CovarianceAligner(), "score": "mutual_knn", "n_pairs": 3, "direction": "lda"}
        return cls(**{**preset, **changes})

    @classmethod
    def paper(cls, **changes: Any) -> ExpertSteer:
        """The steps of arXiv 2505.12313 as far as they are known.

        Theirs (secondary sources): a reconstruction-only affine auto-encoder a layer, the layer pairs of lowest mutual
        information, RFM on the encoded states, addition at inference. Ours: the estimator (Gaussian MI on principal
        components), five pairs, the band, last token, every position with special ones, and the strength.
        """
        preset = {
            "aligner": AutoencoderAligner(),
            "score": "gaussian_mi",
            "select": "lowest",
            "band": (0.1, 0.9),
            "n_pairs": 5,
            "direction": RecursiveFeatureMachine.paper(),
            "space": "target",
            "skip_special": False,
        }
        return cls(**{**preset, **changes})

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters as plain values, as a plan keeps them."""
        return {k: _plain(v) for k, v in self.get_params(deep=False).items()}

    # -- fitting -----------------------------------------------------------------------------------------------------

    def fit(
        self,
        expert: Any,
        target: Any,
        pairs: Any,
        anchors: Any,
        *,
        base: Any = None,
        validation: Validation | None = None,
        cache: str | Path | None = None,
        batch_size: int | None = None,
        remote_expert: bool | str | Remote = False,
        remote_target: bool | str | Remote = False,
        remote_base: bool | str | Remote = False,
        progress: bool = True,
    ) -> SteeringPlan:
        """Reads the models and returns the plan (the parts stay on this estimator).

        With `base` no text has a label: the expert's states of `pairs` (plain texts then) are the positive class, and the
        base model's states of the same texts the negative one, as in UNLOCK (arXiv 2604.06377).

        Args:
            expert: the model that the direction comes from, wrapped by nnsight.
            target: the model to steer, wrapped by nnsight.
            pairs: `LabelledTexts`, or contrast pairs in any form that `ContrastPairs.of` takes.
            anchors: unlabelled texts that both models read. It warns of labelled ones among them, or near copies
                (`overlap`), and counts them in `plan.info["data"]["anchors_labelled"]`.
            base: what the expert was made from, of its width and depth.
            validation: what the layers are chosen with, for `select="sweep"`.
            cache: folder for the states, so that nothing is read twice and a crash loses nothing. If a model is remote and
                none is given, they are kept in the user's cache folder until the call succeeds.
            batch_size: texts a forward (`collect`).
            remote_expert: True, "http://...", or a `Remote`: read the expert on NDIF.
            remote_target: the same for the target; each may be on a host of its own. Aligners, layer scores and directions
                are fitted here: they need only the states, and a fitter needs libraries that a server lacks.
            remote_base: the same for the base model.
            progress: show progress bars.

        Raises:
            ValueError: a setting does not fit the models, or the base model does not fit the expert.
            RemoteFailure: a host, a key or a model cannot be used, or a job failed.

        Warns:
            UserWarning: anchors that are labelled texts, or nearly, or that repeat one another.
        """
        if self.select == "sweep" and self.layers is None and validation is None:
            raise ValueError(NO_VALIDATION)
        kept: dict[Any, Activations] = {}
        models = {"expert": (expert, remote_expert), "target": (target, remote_target), "base": (base, remote_base)}
        with self._reading(models, pairs, anchors, kept, cache, batch_size=batch_size, progress=progress) as read:
            shared = read.shared()
            if shared:
                warnings.warn(f"{overlap_message(read.anchors, shared)}: take them out.", UserWarning, stacklevel=2)
            validate = None if validation is None else partial(sweep, target, validation=validation)
            own = read.target_labelled()
            texts = read.labelled
            self.fit_activations(
                *read.fit_states(), groups=texts.groups, validate=validate, labelled_target=own, same=texts.same
            )
        self.states_ = kept
        info = {**self.plan_.info, **read.record(len(shared))}
        self.plan_ = SteeringPlan(self.plan_.vectors, self.plan_.target, info)
        return self.plan_

    def controls(
        self,
        expert: Any,
        target: Any,
        pairs: Any,
        anchors: Any,
        *,
        untrained: int = 3,
        draws: int = 20,
        base: Any = None,
        cache: str | Path | None = None,
        batch_size: int | None = None,
        remote_expert: bool | str | Remote = False,
        remote_target: bool | str | Remote = False,
        remote_base: bool | str | Remote = False,
        progress: bool = True,
    ) -> Arms:
        """What the fitted plan must be compared with (`control_arms` tells the arms), at its layers and with its settings.

        What `fit` read in this process is not read again. The target reads the labelled texts, for `native`, and each
        untrained expert all texts. With `base` the texts have no labels, which leaves no `native` and no `text_features`.

        Args:
            expert: as in `fit`, like all that is not explained here.
            target: the model to steer.
            pairs: the labelled texts.
            anchors: the unlabelled texts.
            untrained: how many untrained experts (`untrained_like` with seeds 1 to n), made and read here even if the
                expert is remote; 0 leaves the arm out.
            draws: how many plans of shuffled anchors, and of random directions; 0 leaves both arms out.
            base: what the expert was made from.
            cache: folder for the states, the same as in `fit`.
            batch_size: texts a forward.
            remote_expert: where the expert is read, if it must be.
            remote_target: where the target is read.
            remote_base: where the base model is read, if it must be.
            progress: show progress bars.

        Raises:
            NotFittedError: there is no fitted plan.
            ValueError: a layer is missing, or the base model does not fit the expert.
            RemoteFailure: as in `fit`.
        """
        check_is_fitted(self, "plan_")
        kept = getattr(self, "states_", {})
        models = {"expert": (expert, remote_expert), "target": (target, remote_target), "base": (base, remote_base)}
        with self._reading(models, pairs, anchors, kept, cache, batch_size=batch_size, progress=progress) as read:
            return control_arms(self, *read.fit_states(), **read.control_states(untrained), draws=draws)

    def wanted_layers(self, expert: ModelIdentity, target: ModelIdentity) -> tuple[list[int], list[int]]:
        """The layers of either model that the fit will read.

        Raises:
            ValueError: a layer pair was asked for that a model does not have.
        """
        if self.layers is not None:
            check_layer_pairs(self.layers, expert, target)
            return sorted({e for e, _ in self.layers}), sorted({t for _, t in self.layers})
        low, high = self.band

        def inside(n: int) -> list[int]:
            return [i for i in range(n) if low <= (i / (n - 1) if n > 1 else 0.0) <= high]

        return inside(expert.n_layers), inside(target.n_layers)

    def fit_activations(
        self,
        labelled: Labelled,
        labels: Any,
        expert_anchors: Anchors,
        target_anchors: Activations,
        groups: Any = None,
        validate: Callable[[SteeringPlan, list[LayerPair]], list[tuple[LayerPair, float]]] | None = None,
        labelled_target: OwnLabelled | None = None,
        same: Any = None,
    ) -> SteeringPlan:
        """The same from states that are there already: how controls and ablations share one reading of the models.

        Args:
            labelled: expert states of the labelled texts, layer -> `[text, d_expert]`.
            labels: 1 and 0 (or real values), one a labelled text.
            expert_anchors: expert states of the anchors, layer -> `[anchor, d_expert]`.
            target_anchors: target states of the same anchors.
            groups: the pair each labelled text belongs to.
            validate: for `select="sweep"`: from a plan with a vector for each candidate pair to the pairs with their effects,
                the best first.
            labelled_target: target states of the labelled texts, layer -> `[text, d_target]`. With them the plan tells the
                cosine of each vector with the target's own direction, which predicts whether it steers (`native_cosine` of
                a pair in `plan.info["pairs"]`). The vectors do not depend on it.
            same: names of the labelled texts of which equal ones share one (`find_direction`).

        Raises:
            ValueError: a layer is missing, or settings contradict each other.
        """
        states = (labelled, labels, expert_anchors, target_anchors, groups)
        self.scores_, self.sweep_, self.pairs_ = self._chosen_pairs(*states, validate)
        self.aligners_, self.directions_, self.plan_ = self._fitted_pairs(self.pairs_, *states, labelled_target, same)
        return self.plan_

    def _reading(
        self,
        models: dict[str, tuple[Any, Any]],
        pairs: Any,
        anchors: Any,
        kept: dict[Any, Activations],
        cache: str | Path | None,
        **settings: Any,
    ) -> Reading:
        """Reads what this estimator needs of `models`."""
        return Reading(
            models,
            pairs,
            anchors,
            kept,
            cache,
            layers=self.wanted_layers,
            position=self.position,
            anchor_ends=self.anchor_ends if self.position == "last" else 0,
            random_state=self.random_state,
            **settings,
        )

    def _chosen_pairs(
        self,
        labelled: Labelled,
        labels: Any,
        expert_anchors: Anchors,
        target_anchors: Activations,
        groups: Any,
        validate: Callable[[SteeringPlan, list[LayerPair]], list[tuple[LayerPair, float]]] | None,
    ) -> tuple[LayerScores | None, list[tuple[LayerPair, float]] | None, list[LayerPair]]:
        """The scores of all layer pairs, what a sweep found of the candidates, and the pairs that are taken."""
        if self.space not in ("expert", "target"):
            raise ValueError(f'space must be "expert" or "target", got {self.space!r}.')
        if self.n_pairs < 1:
            raise ValueError(f"n_pairs is {self.n_pairs}: at least one layer pair is needed.")
        if self.layers is not None:
            pairs = [LayerPair(int(e), int(t), math.nan) for e, t in self.layers]
            missing = [p for p in pairs if p.expert not in expert_anchors or p.target not in target_anchors]
            if missing:
                e, t, _ = missing[0]
                raise ValueError(f"The layer pair ({e}, {t}) was asked for, but there are no states of one of them.")
            return None, None, pairs
        whole = [getattr(anchors, "whole", anchors) for anchors in (expert_anchors, target_anchors)]
        scores = match_layers(whole[0], whole[1], self.score, self.permutations, self.random_state)
        if self.select != "sweep":
            return scores, None, scores._ranked(self.select, "target", self.band)[: self.n_pairs]
        if validate is None:
            raise ValueError(NO_VALIDATION)
        candidates = scores._ranked("highest", "target", self.band)
        other: Any = clone(self)
        other.set_params(layers=[(p.expert, p.target) for p in candidates])
        every = other.fit_activations(labelled, labels, expert_anchors, target_anchors, groups)
        swept = validate(every, candidates)
        return scores, swept, [pair for pair, _ in swept[: self.n_pairs]]

    def _fitted_pairs(
        self,
        pairs: list[LayerPair],
        labelled: Labelled,
        labels: Any,
        expert_anchors: Anchors,
        target_anchors: Activations,
        groups: Any,
        labelled_target: OwnLabelled | None,
        same: Any,
    ) -> tuple[list[Any], list[Direction], SteeringPlan]:
        """An aligner and a direction for each pair, and the plan of their vectors."""
        text_of = torch.tensor(getattr(target_anchors, "text_of", None) or range(len(target_anchors[pairs[0].target])))
        aligners, directions, vectors, steps = [], [], [], []
        for pair in pairs:
            anchors, x = without_massive(expert_anchors[pair.expert], torch.as_tensor(labelled[pair.expert]))
            y = target_anchors[pair.target]
            aligner: Any = clone(self.aligner if self.aligner is not None else RidgeAligner())
            if "random_state" in aligner.get_params():
                aligner.set_params(random_state=self.random_state)
            rows = ordinary_rows(anchors, y)
            r2 = held_out_r2(aligner, anchors[rows], y[rows], text_of[rows], self.random_state)
            aligner.fit(anchors[rows], y[rows])
            x = aligner.transform(x) if self.space == "target" else x
            found = find_direction(x, labels, self.direction, self.kind, groups, self.random_state, same=same)
            v = found.vector if self.space == "target" else aligner.map_direction(found.vector, found.space)
            v = v if v.ndim == 1 else v[0]
            aligners.append(aligner)
            directions.append(found)
            vectors.append(
                SteeringVector(
                    pair.target, v, self.strength / math.sqrt(len(pairs)), target_anchors.norm(pair.target),
                    self.op, self.where, skip_special=self.skip_special,
                )
            )  # fmt: skip
            score = None if math.isnan(pair.score) else pair.score
            own = None if labelled_target is None else labelled_target[pair.target]
            steps.append({"expert_layer": pair.expert, "target_layer": pair.target, "score": score, "held_out_r2": r2,
                          "native_cosine": self._native_cosine(v, own, labels, groups, y, rows),
                          "method": found.method, "space": found.space, **found.details})  # fmt: skip
        expert = getattr(labelled, "model", getattr(expert_anchors, "model", None))
        info = {
            "expert": expert.to_dict() if isinstance(expert, ModelIdentity) else None,
            "settings": self.settings,
            "pairs": steps,
            "versions": library_versions(),
        }
        return aligners, directions, SteeringPlan(tuple(vectors), target_anchors.model, info)

    def _native_cosine(
        self, v: Tensor, own: Tensor | None, labels: Any, groups: Any, target_anchors: Tensor, ordinary: Tensor
    ) -> float | None:
        """Cosine of a vector with the direction that the same method finds in the target's `own` states; None without one."""
        if own is None:
            return None
        # a user's own function may know the expert's width alone; the plan does not need the target's direction
        unusable = Exception if callable(self.direction) else ValueError
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                _, own = without_massive(target_anchors, torch.as_tensor(own))
                found = find_direction(own, labels, self.direction, self.kind, groups, self.random_state, folds=0)
        except unusable:
            return None
        usual = target_anchors[ordinary]
        unmapped = native_aligner(self.aligner).fit(usual, usual)
        native = torch.as_tensor(unmapped.map_direction(found.vector, found.space))
        return float(torch.cosine_similarity(v.double().cpu(), native.double().cpu().reshape(-1, len(v))[0], dim=0))


def _plain(value: Any) -> Any:
    """A parameter as a plan keeps it: a number, a text, None, or its name."""
    if isinstance(value, (int, float, str, type(None))):
        return value
    # a function's own text holds its address in memory
    return getattr(value, "__name__", "function") if callable(value) else str(value)
