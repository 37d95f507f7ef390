"""The four steps as one estimator: align, pair layers, find a direction, and make the plan that adds it.

After ExpertSteer (arXiv 2505.12313), of which the abstract and secondary descriptions could be read: `paper()` holds what
they attest, with our choice where they are silent; `recommended()` holds what we measured to work.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, clone
from torch import Tensor

from .activations import Activations, collect
from .alignment import Aligner, CovarianceAligner, RidgeAligner
from .autoencoder import AutoencoderAligner
from .directions import find_direction
from .identity import ModelIdentity
from .layer_matching import LayerPair, match_layers
from .plan_file import library_versions
from .rfm import RecursiveFeatureMachine
from .steering import SteeringPlan, SteeringVector
from .texts import ContrastPairs, Position, as_texts, check_disjoint, texts_hash

if TYPE_CHECKING:
    from .remote import Remote

Labelled = Mapping[int, Float[Tensor, "text hidden"]]
Anchors = Mapping[int, Float[Tensor, "anchor hidden"]]


class ExpertSteer(BaseEstimator):
    """Makes a steering plan for a target model from an expert model's states.

    Args:
        aligner: from the expert's states to the target's; a clone is fitted for each layer pair.
        score: how layer pairs are scored (`match_layers`); "gaussian_mi" for the paper's mutual information.
        select: "highest" or "lowest" scores; the paper is said to take the lowest.
        band: depths, as fractions, that layers of both models must lie in.
        n_pairs: how many layer pairs, at most one a target layer.
        layers: (expert layer, target layer) pairs instead of the search.
        direction: a method of `find_direction`, or an estimator such as a `RecursiveFeatureMachine`.
        kind: "gradient" or "pattern" for methods that find a covector; None for their own.
        space: "expert": find the direction in the expert's states, then map it; "target": map the states, then find it.
        position: which token's state stands for a text.
        strength: total strength in residual norms; each of k layers gets strength / sqrt(k).
        op: what the vectors do (`SteeringVector`).
        where: which positions they steer.
        skip_special: leave special tokens that the target's tokenizer prepends as they are.
        permutations: shuffles for the null of the layer scores; 0 saves their time.
        random_state: seed of every random choice.

    Attributes (of a fitted one):
        scores_: `LayerScores`, or None where `layers` were given.
        pairs_: the layer pairs.
        aligners_: a fitted aligner for each pair.
        directions_: a `Direction` for each pair, in the expert's space or the target's (`space`).
        plan_: the `SteeringPlan`.
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
        self.strength = strength
        self.op = op
        self.where = where
        self.skip_special = skip_special
        self.permutations = permutations
        self.random_state = random_state

    @classmethod
    def recommended(cls, **changes: Any) -> ExpertSteer:
        """What we measured to work: ridge on paired anchors, the three most similar layer pairs, mean difference."""
        return cls(**{"aligner": RidgeAligner(), "score": "mutual_knn", "n_pairs": 3, **changes})

    @classmethod
    def in_domain(cls, **changes: Any) -> ExpertSteer:
        """No map at all: the target displacement that co-occurs with the expert's readout; for in-domain anchors."""
        preset = {"aligner": CovarianceAligner(), "score": "mutual_knn", "n_pairs": 3, "direction": "lda"}
        return cls(**{**preset, **changes})

    @classmethod
    def paper(cls, **changes: Any) -> ExpertSteer:
        """The paper's steps as far as they are known.

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

    # -- fitting -----------------------------------------------------------------------------------------------------

    def fit(
        self,
        expert: Any,
        target: Any,
        pairs: Any,
        anchors: Any,
        *,
        cache: str | Path | None = None,
        batch_size: int | None = None,
        remote_expert: bool | str | Remote = False,
        remote_target: bool | str | Remote = False,
        progress: bool = True,
    ) -> SteeringPlan:
        """Reads both models and returns the plan (the parts stay on this estimator).

        Args:
            expert: the model that the direction comes from, wrapped by nnsight.
            target: the model to steer, wrapped by nnsight.
            pairs: contrast pairs, in any form that `ContrastPairs.of` takes.
            anchors: unlabelled texts that both models read, none of them a labelled one.
            cache: folder for the states, so that nothing is read twice and a crash loses nothing. If a model is remote and
                none is given, they are kept in the user's cache folder until the call succeeds.
            batch_size: texts a forward (`collect`).
            remote_expert: True, "http://...", or a `Remote`: read the expert on NDIF.
            remote_target: the same for the target; the two may be on different hosts. Aligners, layer scores and directions
                are fitted here: they need only the states, and a fitter needs libraries that a server lacks.
            progress: show progress bars.

        Raises:
            ValueError: an anchor is a labelled text, or a setting does not fit the models.
            RemoteFailure: a host, a key or a model cannot be used, or a job failed.
        """
        pairs, anchors = ContrastPairs.of(pairs), as_texts(anchors)
        check_disjoint(anchors, pairs.texts)
        want_e, want_t = self.wanted_layers(ModelIdentity.of(expert), ModelIdentity.of(target))

        with ExitStack() as until:

            def read(model: Any, texts: Any, layers: Any, name: str, remote: Any) -> Activations:
                where = None if cache is None else Path(cache) / name
                return collect(
                    model, texts, layers, self.position, batch_size=batch_size, cache=where,
                    remote=remote, progress=progress, _until=until,
                )  # fmt: skip

            self.fit_activations(
                read(expert, pairs.texts, want_e, "expert-pairs", remote_expert),
                pairs.labels,
                read(expert, anchors, want_e, "expert-anchors", remote_expert),
                read(target, anchors, want_t, "target-anchors", remote_target),
                groups=pairs.groups,
            )
        data = {"pairs": len(pairs), "pairs_hash": texts_hash(pairs.texts), "anchors": len(anchors)}
        info = {**self.plan_.info, "data": {**data, "anchors_hash": texts_hash(anchors)}}
        self.plan_ = SteeringPlan(self.plan_.vectors, self.plan_.target, info)
        return self.plan_

    def wanted_layers(self, expert: ModelIdentity, target: ModelIdentity) -> tuple[list[int], list[int]]:
        """The layers of either model that the fit will read."""
        if self.layers is not None:
            for pair in self.layers:
                for layer, model, side in zip(pair, (expert, target), ("expert", "target"), strict=True):
                    if not 0 <= layer < model.n_layers:
                        raise ValueError(
                            f"The layer pair {tuple(pair)} was asked for, but the {side} {model.name or model.kind} has layers "
                            f"0 to {model.n_layers - 1}."
                        )
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
    ) -> SteeringPlan:
        """The same from states that are there already: how controls and ablations share one reading of the models.

        Args:
            labelled: expert states of the labelled texts, layer -> `[text, d_expert]`.
            labels: 1 and 0 (or real values), one a labelled text.
            expert_anchors: expert states of the anchors, layer -> `[anchor, d_expert]`.
            target_anchors: target states of the same anchors.
            groups: the pair each labelled text belongs to.

        Raises:
            ValueError: a layer is missing, or settings contradict each other.
        """
        if self.space not in ("expert", "target"):
            raise ValueError(f'space must be "expert" or "target", got {self.space!r}.')
        self.scores_ = None
        if self.layers is not None:
            self.pairs_ = [LayerPair(int(e), int(t), math.nan) for e, t in self.layers]
            missing = [p for p in self.pairs_ if p.expert not in expert_anchors or p.target not in target_anchors]
            if missing:
                e, t, _ = missing[0]
                raise ValueError(f"The layer pair ({e}, {t}) was asked for, but there are no states of one of them.")
        else:
            self.scores_ = match_layers(
                expert_anchors, target_anchors, self.score, self.permutations, self.random_state
            )
            choose: Any = self.scores_.pairs
            self.pairs_ = choose(k=self.n_pairs, select=self.select, per="target", band=self.band)
        self.aligners_, self.directions_, vectors, steps = [], [], [], []
        for pair in self.pairs_:
            anchors, y = expert_anchors[pair.expert], target_anchors[pair.target]
            aligner: Any = clone(self.aligner if self.aligner is not None else RidgeAligner())
            if "random_state" in aligner.get_params():
                aligner.set_params(random_state=self.random_state)
            r2 = _held_out_r2(aligner, anchors, y, self.random_state)
            aligner.fit(anchors, y)
            x = labelled[pair.expert]
            x = aligner.transform(x) if self.space == "target" else x
            found = find_direction(x, labels, self.direction, self.kind, groups, self.random_state)
            v = found.vector if self.space == "target" else aligner.map_direction(found.vector, found.space)
            v = v if v.ndim == 1 else v[0]
            self.aligners_.append(aligner)
            self.directions_.append(found)
            vectors.append(
                SteeringVector(
                    pair.target, v, self.strength / math.sqrt(len(self.pairs_)), target_anchors.norm(pair.target),
                    self.op, self.where, skip_special=self.skip_special,
                )
            )  # fmt: skip
            score = None if math.isnan(pair.score) else pair.score
            steps.append({"expert_layer": pair.expert, "target_layer": pair.target, "score": score, "held_out_r2": r2,
                          "method": found.method, "space": found.space, **found.details})  # fmt: skip
        expert = getattr(labelled, "model", None)
        info = {
            "expert": expert.to_dict() if isinstance(expert, ModelIdentity) else None,
            "settings": {k: _plain(v) for k, v in self.get_params(deep=False).items()},
            "pairs": steps,
            "versions": library_versions(),
        }
        self.plan_ = SteeringPlan(tuple(vectors), target_anchors.model, info)
        return self.plan_


def _plain(value: Any) -> Any:
    if isinstance(value, (int, float, str, type(None))):
        return value
    # a function's own text holds its address in memory
    return getattr(value, "__name__", "function") if callable(value) else str(value)


def _held_out_r2(aligner: Any, x: Tensor, y: Tensor, random_state: int) -> float | None:
    """R² on a tenth of the anchors of a map fitted on the others; None for too few to tell."""
    if len(x) < 20:
        return None
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(random_state))
    test, train = order[: len(x) // 10], order[len(x) // 10 :]
    probe: Any = clone(aligner)
    return probe.fit(x[train], y[train]).score(x[test], y[test])


def random_plans(plan: SteeringPlan, draws: int, random_state: int = 0) -> list[SteeringPlan]:
    """`plan` with its directions replaced by random ones (uniform on the sphere), `draws` times."""
    generator = torch.Generator().manual_seed(random_state)
    return [
        plan.with_directions([torch.randn(v.direction.shape, generator=generator) for v in plan.vectors])
        for _ in range(draws)
    ]


def untrained_like(model: Any, random_state: int = 0) -> Any:
    """A model of the same class, configuration and tokenizer with random weights, wrapped like `model`.

    The control that matters: what a fit gets out of it comes from the labels and the anchors, not from the expert.

    Args:
        model: a `TransformersModel` of a causal LM; of a remote one, the copy is made here.
        random_state: seed of the weights; torch's global generator is left as it was.
    """
    from nnsight.modeling.transformers import TransformersModel
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_state)
        parameter = next(model._module.parameters())
        module = AutoModelForCausalLM.from_config(copy.deepcopy(model._module.config), dtype=parameter.dtype)
    if not parameter.is_meta:
        module = module.to(parameter.device)  # and not to its dtype: some buffers are wider
    module.config._name_or_path = f"untrained-{random_state}"
    return TransformersModel(module.eval(), tokenizer=model.tokenizer, task="text-generation")
