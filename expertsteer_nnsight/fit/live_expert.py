"""An expert that reads along: its activations of each prompt, mapped into the target, in place of a fixed vector.

A fixed vector carries a concept and no knowledge: it is the same for every prompt. Here the expert reads the prompt that the target
answers. Its activation at the last prompt token goes into the target there, through a ridge that was fitted on unlabelled anchors.
No precedent in this form was found. Near are model stitching (Bansal et al., 2021, arXiv 2106.07682) and patching of activations
between models (Ghandeharioun et al., 2024, arXiv 2401.06102).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveFloat, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..align.aligner import Aligner, massive_coordinates, ordinary_rows
from ..align.closed_form import CovarianceAligner, IdentityAligner, ProcrustesAligner, RidgeAligner
from ..files import library_versions, reason, whole_file
from ..measure.answers import AnswersReceipt
from ..measure.effects import Effect, MultipleChoice
from ..measure.rollouts import completions, rollouts
from ..measure.rows import entropies
from ..measure.scoring import encoded, in_rows
from ..models.identity import ModelIdentity
from ..models.positions import affixes, prefix_ids
from ..models.prompts import Prompts
from ..ndif.argument import host_of
from ..states.activations import Activations
from ..states.collecting import collect
from ..states.continued import continued_states
from ..steering.plan import SteeringPlan
from ..steering.vectors import SteeringVector, stack
from ..texts.texts import Text, as_texts, encode, once, texts_hash, tokenizer_of
from ..texts.word_ends import continued_ends, shared_ends
from .reading import check_layer_pairs, held_out_r2

if TYPE_CHECKING:
    from ..ndif.host import Remote

FORMAT, VERSION = "expertsteer_nnsight.live_expert", 1
DEPTH = (0.88, 0.76)  # of expert and target, where no validation items choose: those of Gemma-3-270M and SmolLM2-135M
DEPTHS = ((0.59, 0.76, 0.88, 1.0), (0.41, 0.62, 0.76, 0.9))  # from which they choose
AMOUNTS = (0.5, 1.0, 1.5)
GATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the validation items that a gate lets through
ALIGNERS = (RidgeAligner, ProcrustesAligner, CovarianceAligner, IdentityAligner)  # whose settings a file keeps
TENSORS = ("weight", "bias", "mean", "predictor")  # of a map, in a file
EVERY = 10**6  # shared ends of an anchor


@dataclass(frozen=True, eq=False)
class LiveMap:
    """From the expert's activations at one layer to the target's at another.

    Attributes:
        expert, target: the layers.
        weight: `[d_expert, d_target]`.
        bias: `[d_target]`.
        mean: of the mapped anchors, `[d_target]`.
        norm: median norm of the target's residual stream there.
        predictor: `[d_target + 1, d_target]`: what the target's own activation tells of the mapped one (`SteeringVector`).
        r2: of the map on held-out anchors; None for too few to tell.
    """

    expert: int
    target: int
    weight: Tensor
    bias: Tensor
    mean: Tensor
    norm: float
    predictor: Tensor
    r2: float | None = None

    @cached_property
    def known_mean(self) -> Tensor:
        """A predictor that tells the mean of the mapped anchors, whatever the target's activation is."""
        return self.mean[None]

    def __call__(self, states: Float[Tensor, "text d_expert"]) -> Float[Tensor, "text d_target"]:
        """Mapped activations, in float32, on the device of `states`."""
        weight, bias = (t.to(states.device, torch.float64) for t in (self.weight, self.bias))
        return (states.double() @ weight + bias).float()


class LiveExpert(BaseEstimator):
    """An expert that reads the target's prompts: its mapped activations steer each prompt in its own way.

    `fit` learns the maps from unlabelled anchors at shared token ends, and chooses layers and amount by what they do to validation
    items, if there are any. `plan(prompts)` then gives a `SteeringPlan` with a row for each prompt; `generate` continues them.
    An effect takes it in place of a plan: `MultipleChoice(items).score(target, [live])`.

    Args:
        aligner: an affine one; a clone is fitted for each layer pair. Ridge if None.
        layers: (expert layer, target layer) pairs, all used at once, one after the other where the target layer is the same, so
            that the last of these counts most. None: one pair, chosen on the validation items or by depth.
        op: "blend": h + a (z - h), with z the mapped activation; "innovation": h + a (z - what h itself predicts of z); "add":
            h + a (z - mean of the mapped anchors).
        amount: a; None: chosen on the validation items, 1 without them.
        where: "last_prompt": at the last prompt token; "shared_ends": at every token of the prompt that ends where a token of
            the expert ends.
        follow: the expert reads on: what a scored option says, or what the target writes, at shared ends too.
        follow_op: what is done there.
        follow_amount: and how much of it.
        gate: steer only prompts after which the expert's next-token entropy less the target's is at most so many nats; at 0 the
            expert is the surer one. "validation": the validation items choose the number, or none. None steers every prompt.
        anchor_ends: at how many shared token ends an anchor is read; all of them if None.
        random_state: seed of the choice of these.

    Attributes:
        maps_: of a fitted one: a `LiveMap` for each layer pair that was read.
        layers_: the pairs that are used.
        amount_: the amount that is used.
        gate_: the gate that is used; None if every prompt is steered.
        validation_: (layers, amount, mean score) of each setting that was tried, the best first; empty without validation items.
        expert_, target_: the wrapped models; `remote_` where the expert is read.
        info_: what is known of the making: identities, texts, settings, versions. Plain JSON values.
    """

    def __init__(
        self,
        aligner: Aligner | None = None,
        layers: Sequence[tuple[int, int]] | None = None,
        op: str = "blend",
        amount: float | None = None,
        where: str = "last_prompt",
        follow: bool = False,
        follow_op: str = "innovation",
        follow_amount: float = 0.5,
        gate: float | int | str | None = None,
        anchor_ends: int | None = None,
        random_state: int = 0,
    ) -> None:
        self.aligner = aligner
        self.layers = layers
        self.op = op
        self.amount = amount
        self.where = where
        self.follow = follow
        self.follow_op = follow_op
        self.follow_amount = follow_amount
        self.gate = gate
        self.anchor_ends = anchor_ends
        self.random_state = random_state

    aligner_known_ = True  # False of one from a file that could not keep its aligner

    # -- fitting -----------------------------------------------------------------------------------------------------

    def fit(
        self,
        expert: Any,
        target: Any,
        anchors: Any,
        validation: Effect | None = None,
        *,
        cache: str | Path | None = None,
        batch_size: int | None = None,
        remote_expert: bool | str | Remote = False,
        remote_target: bool | str | Remote = False,
        progress: bool = True,
    ) -> LiveExpert:
        """Learns the maps, and chooses layers and amount where they are not given.

        Args:
            expert: the model that reads along, wrapped by nnsight.
            target: the model that is steered, wrapped by nnsight.
            anchors: unlabelled texts that both models read, such as general texts and questions of the task without answers.
            validation: held-out items of the task, such as `MultipleChoice`; the setting with the highest mean score is taken.
                Without them a pair of layers is taken by its depth, and the amount is 1.
            cache: folder for the anchors' activations.
            batch_size: texts a forward (`collect`).
            remote_expert: True, "http://...", or a `Remote`: read the expert on NDIF, here and in `plan`.
            remote_target: the same for the target.
            progress: show progress bars.

        Raises:
            ValueError: settings that do not fit the models, or too few shared token ends to fit a map on.
            RemoteFailure: a host, a key or a model cannot be used, or a job failed.

        Warns:
            UserWarning: anchors that repeat one another, each of which is read once.
        """
        self._check()
        texts = once(as_texts(anchors), "anchors")
        folders = (None, None) if cache is None else (Path(cache) / "expert", Path(cache) / "target")
        if self.gate == "validation" and _prompts_of(validation) is None:
            raise ValueError(
                'gate="validation" needs validation items with prompts, such as MultipleChoice: give them to fit.'
            )
        self.target_ = target
        ends = self._ends(expert, texts)
        how = {
            "batch_size": batch_size,
            "remote_expert": remote_expert,
            "remote_target": remote_target,
            "progress": progress,
        }
        return self._fit(expert, target, texts, ends, folders, validation, **how)

    def _ends(self, expert: Any, texts: list[Any]) -> list[list[int]]:
        """The shared token ends that the anchors are read at."""
        known = [(t, len(prefix_ids(t))) for t in map(tokenizer_of, (expert, self.target_))]
        return shared_ends(texts, known, EVERY if self.anchor_ends is None else self.anchor_ends, self.random_state)

    def _fit(
        self,
        expert: Any,
        target: Any,
        texts: list[Any],
        ends: list[list[int]],
        folders: tuple[Path | None, Path | None],
        validation: Effect | None = None,
        *,
        batch_size: int | None = None,
        remote_expert: Any = False,
        remote_target: Any = False,
        progress: bool = True,
    ) -> LiveExpert:
        """`fit` at given shared ends, with a folder for the activations of either model."""
        self.expert_, self.target_, self.remote_, self._batch_size = expert, target, remote_expert, batch_size
        self.remote_target_ = remote_target
        identities = ModelIdentity.of(expert), ModelIdentity.of(target)
        candidates = self._candidates(*identities, choose=validation is not None)
        how: dict[str, Any] = {"ends": ends, "batch_size": batch_size, "progress": progress}
        read = [
            collect(
                model, texts, sorted({pair[side] for pair in candidates}), cache=folders[side], remote=remote, **how
            )
            for side, (model, remote) in enumerate(((expert, remote_expert), (target, remote_target)))
        ]
        self.maps_ = {pair: self._fitted(pair, *read) for pair in candidates}
        self.info_ = {
            "expert": identities[0].to_dict(),
            "target": identities[1].to_dict(),
            "settings": {k: v if isinstance(v, (int, float, str, type(None))) else str(v)
                         for k, v in self.get_params(deep=False).items()},
            "data": {"anchors": len(texts), "anchors_hash": texts_hash(texts), "pairs": read[0].n_texts},
            "versions": library_versions(),
        }  # fmt: skip
        self._choose(candidates, validation, progress)
        return self

    def _check(self) -> None:
        """Raises ValueError for settings that do not go together."""
        for name, value in (("op", self.op), ("follow_op", self.follow_op)):
            if value not in ("blend", "innovation", "add"):
                raise ValueError(f'{name} is {value!r}: it must be "blend", "innovation" or "add".')
        if self.where not in ("last_prompt", "shared_ends"):
            raise ValueError(f'where is {self.where!r}: it must be "last_prompt" or "shared_ends".')
        if isinstance(self.gate, bool) or (isinstance(self.gate, str) and self.gate != "validation"):
            raise ValueError(f'gate is {self.gate!r}: it must be a number of nats, "validation" or None.')
        gate = None if isinstance(self.gate, str) else self.gate
        for name, value in (("amount", self.amount), ("follow_amount", self.follow_amount), ("gate", gate)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}: it must be a finite number.")
        if self.anchor_ends is not None and self.anchor_ends < 0:
            raise ValueError(f"anchor_ends is {self.anchor_ends}: it must be 0 or more, or None for all.")
        if (
            self.layers is not None and len({tuple(pair) for pair in self.layers}) != len(self.layers)
        ) or self.layers == []:
            raise ValueError(f"layers is {self.layers}: give pairs of an expert and a target layer, each once.")

    def _candidates(self, expert: ModelIdentity, target: ModelIdentity, choose: bool) -> list[tuple[int, int]]:
        def at(depth: float, model: ModelIdentity) -> int:
            return round(depth * (model.n_layers - 1))

        if self.layers is not None:
            check_layer_pairs(self.layers, expert, target)
            return [(int(e), int(t)) for e, t in self.layers]
        if not choose:
            return [(at(DEPTH[0], expert), at(DEPTH[1], target))]
        return sorted({(at(e, expert), at(t, target)) for e, t in product(*DEPTHS)})

    def _fitted(self, pair: tuple[int, int], expert: Activations, target: Activations) -> LiveMap:
        x, y = expert[pair[0]], target[pair[1]]
        massive = massive_coordinates(x)  # a prompt may end where they are, so the map has no weight for them
        x = x.masked_fill(massive, 0.0)
        rows = ordinary_rows(x, y)
        x, y = x[rows], y[rows]
        if len(x) < 2:
            raise ValueError(f"The anchors have {len(x)} ordinary token ends that both models share: give more texts.")
        aligner: Any = clone(self.aligner if self.aligner is not None else RidgeAligner())
        text = torch.tensor(expert.text_of or range(len(rows)))[rows]
        r2 = held_out_r2(aligner, x, y, text, self.random_state)
        aligner.fit(x, y)
        if not isinstance(getattr(aligner, "intercept_", None), Tensor):
            raise ValueError(
                f"{type(aligner).__name__} is no affine map: a live expert needs one, such as RidgeAligner()."
            )
        mapped = torch.as_tensor(aligner.transform(x))
        weight = aligner.coef_.masked_fill(massive[:, None].to(aligner.coef_.device), 0.0)  # not every aligner's is
        own = RidgeAligner().fit(y, mapped)
        predictor = torch.cat([own.coef_, own.intercept_[None]])
        return LiveMap(
            *pair, weight.float().cpu(), aligner.intercept_.float().cpu(), mapped.double().mean(0).float().cpu(),
            target.norm(pair[1]), predictor.float().cpu(), r2,
        )  # fmt: skip

    def _choose(self, candidates: list[tuple[int, int]], validation: Effect | None, progress: bool) -> None:
        """Sets `layers_`, `amount_`, `gate_` and `validation_`: the layers first, then the amount there, then the gate."""
        together = [list(candidates)] if self.layers is not None else [[pair] for pair in candidates]
        self.layers_, self.amount_ = together[0], 1.0 if self.amount is None else float(self.amount)
        self.gate_ = None if self.gate is None or isinstance(self.gate, str) else float(self.gate)
        self.validation_: list[tuple[list[tuple[int, int]], float, float]] = []
        if validation is None:
            return
        reading, unsteered, by_item = _Read(self), 0.0, {}

        def tried(settings: list[tuple[list[tuple[int, int]], float]]) -> None:
            nonlocal unsteered
            steering = [_Setting(reading, *setting, self.gate_) for setting in settings]
            every = validation.score(self.target_, steering, remote=self.remote_target_, progress=progress).double()
            scores, unsteered = every.mean(1), float(every[0].mean())
            by_item.update({str(setting): (every[0], mine) for setting, mine in zip(settings, every[1:], strict=True)})
            found = [(*setting, float(score)) for setting, score in zip(settings, scores[1:], strict=True)]
            self.validation_ = sorted([*self.validation_, *found], key=lambda each: -each[2])
            self.layers_, self.amount_, _ = self.validation_[0]

        tried([(layers, self.amount_) for layers in together])
        if self.amount is None:
            tried([(self.layers_, amount) for amount in AMOUNTS if amount != self.amount_])
        asked = _prompts_of(validation) or []
        if self.gate == "validation":
            self.gate_ = _best_gate(reading.gaps(asked, asked), *by_item[str((self.layers_, self.amount_))])
        self.info_["validation"] = {
            "prompts": sorted({texts_hash([prompt]) for prompt in asked}),
            "items": len(validation), "unit": validation.unit, "unsteered": unsteered,
            "settings": [[[list(p) for p in layers], amount, score] for layers, amount, score in self.validation_],
        }  # fmt: skip

    # -- use ---------------------------------------------------------------------------------------------------------

    def plan(self, prompts: Any, reads: Any = None) -> SteeringPlan:
        """The expert reads prompts; a plan with a row for each of them, which is refused for any other.

        Args:
            prompts: strings or chat messages, as the target will read them. A chat is read with each model's own template.
            reads: what the expert reads in their place, one text a prompt; the prompts themselves if None.

        Raises:
            NotFittedError: before `fit`.
            ValueError: not one text a prompt, or chat messages where `where="shared_ends"` needs strings.
            RemoteFailure: the expert is remote and could not be read.
        """
        return self._setting().plan(as_texts(prompts), None if reads is None else as_texts(reads))

    def for_texts(
        self, prompts: Sequence[Text], continuations: Sequence[str] | None = None, reads: Sequence[Text] | None = None
    ) -> list[SteeringPlan]:
        """A plan for each prompt, whose continuation the expert reads too where it follows; how effects take a live expert.

        Args:
            prompts: as the target reads them.
            continuations: as the target reads them.
            reads: what the expert reads in the prompts' place, before the same continuations.

        Raises:
            NotFittedError: before `fit`.
            ValueError: chat messages, where `follow` or `where="shared_ends"` needs strings.
        """
        return self._setting().for_texts(prompts, continuations, reads)

    def follow_ids(
        self, prompts: Sequence[Text], max_new_tokens: int, reads: Sequence[Text] | None = None
    ) -> list[list[int]]:
        """Token ids of continuations that the expert reads as they are written, in one batch; `reads` as in `plan`.

        Raises:
            NotFittedError: before `fit`.
            RemoteFailure: a model is remote and could not be run.
        """
        from .live_generation import follow

        return follow(self._setting(), prompts, max_new_tokens, reads)

    def receipt(self, questions: MultipleChoice, anchors: Any, **settings: Any) -> AnswersReceipt:
        """Compares it with its controls on held-out questions; `fit.live_controls.live_receipt` has the arguments."""
        from .live_controls import live_receipt

        return live_receipt(self, questions, anchors, **settings)

    def _setting(self) -> _Setting:
        check_is_fitted(self, "layers_")
        if getattr(self, "expert_", None) is None or getattr(self, "target_", None) is None:
            raise ValueError(
                "The live expert was read from a file without its models: LiveExpert.load(path, expert, target)."
            )
        return _Setting(_Read(self), self.layers_, self.amount_, self.gate_)

    def generate(
        self, prompts: Any, max_new_tokens: int = 40, *, batch_size: int = 32, do_sample: bool = False
    ) -> list[str]:
        """What the target says after each prompt, which the expert has read; with `follow` it reads on what the target writes.

        Followed text takes the likeliest token at each step, whatever else the model's generation settings say (such as a
        penalty of repetition). Without `follow` it is the model's own `generate`.

        Args:
            prompts: strings or chat messages.
            max_new_tokens: of each.
            batch_size: prompts a forward.
            do_sample: draw tokens, as the model's generation settings say, instead of taking the most likely; not with `follow`.

        Raises:
            ValueError: as `plan`, or `do_sample` with `follow`, or the target is a TransformerBridge.
            RemoteFailure: as `plan`.
        """
        return self._setting().generate(as_texts(prompts), max_new_tokens, batch_size=batch_size, do_sample=do_sample)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Writes one `.safetensors` file: the maps that are used, and a JSON header with everything else but the models.

        Raises:
            NotFittedError: before `fit`.
        """
        check_is_fitted(self, "layers_")
        used = [self.maps_[pair] for pair in self.layers_]
        tensors = {f"{i}.{name}": getattr(one, name) for i, one in enumerate(used) for name in TENSORS}
        kept = {
            k: v for k, v in self.get_params(deep=False).items() if k not in ("aligner", "layers", "amount", "gate")
        }
        aligner = self.aligner if self.aligner is not None else RidgeAligner()
        plain = all(isinstance(v, (int, float, str, bool, tuple, type(None))) for v in aligner.get_params().values())
        known = {"name": type(aligner).__name__, "parameters": aligner.get_params()}
        header = {
            "format_version": VERSION, "settings": kept, "amount": self.amount_, "gate": self.gate_,
            "info": self.info_,
            "aligner": known if plain and type(aligner) in ALIGNERS else None,
            "maps": [{"expert": m.expert, "target": m.target, "norm": m.norm, "r2": m.r2} for m in used],
        }  # fmt: skip
        about = {"format": FORMAT, "live_expert": json.dumps(header)}
        return whole_file(path, lambda to: save_file(tensors, to, metadata=about))

    @classmethod
    def load(
        cls,
        path: str | Path,
        expert: Any = None,
        target: Any = None,
        *,
        remote_expert: bool | str | Remote = False,
        remote_target: bool | str | Remote = False,
        any_id: bool = False,
    ) -> LiveExpert:
        """Reads what `save` wrote; never unpickles.

        Args:
            path: of the file.
            expert: the wrapped model; without it the live expert can be printed, and not used.
            target: the same.
            remote_expert: where the expert is read (`fit`).
            remote_target: where the target runs.
            any_id: take models of other ids (width and depth must fit).

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no live expert's, or damaged, or of a newer format, or a model is another one.
        """
        header, tensors = _read_file(path)
        layers = [(m.expert, m.target) for m in header.maps]
        made: dict[str, Any] = {kind.__name__: kind for kind in ALIGNERS}
        known = header.aligner
        try:
            aligner = None
            if known is not None:
                told = {k: tuple(v) if isinstance(v, list) else v for k, v in known.parameters.items()}
                aligner = made[known.name](**told)
        except TypeError as error:
            raise ValueError(f"The header of {path} is damaged: the aligner's parameters ({error}).") from None
        live = cls(aligner, **header.settings.model_dump(), layers=layers, amount=header.amount, gate=header.gate)
        live.aligner_known_ = known is not None
        live._check()
        live.maps_ = {}
        for i, m in enumerate(header.maps):
            mine: dict[str, Any] = {**m.model_dump(), **{name: tensors[f"{i}.{name}"] for name in TENSORS}}
            live.maps_[m.expert, m.target] = LiveMap(**mine)
        live.layers_, live.amount_, live.gate_, live.validation_ = layers, header.amount, header.gate, []
        live.info_, live._batch_size = header.info, None
        live.expert_, live.target_, live.remote_, live.remote_target_ = expert, target, remote_expert, remote_target
        for model, name in ((expert, "expert"), (target, "target")):
            if model is not None:
                what = f"This live expert cannot have that model as its {name}"
                ModelIdentity(**live.info_[name]).check(ModelIdentity.of(model), what, any_id)
        return live


def _prompts_of(effect: Any) -> list[Text] | None:
    """The prompts of an effect's items; None where it has none."""
    items = getattr(effect, "items", None)
    found: list[Text] = list(getattr(effect, "prompts", ())) if items is None else [item[0] for item in items]
    return found or None


def _best_gate(gaps: Tensor, unsteered: Tensor, steered: Tensor) -> float | None:
    """The gate that raises the mean score most, from scores `[item]` without and with.

    None unless it does so by two standard errors: of nine gates that do nothing the best one looks good.
    """
    best, found = 0.0, None
    for gate in sorted({float(torch.quantile(gaps.double(), q)) for q in GATES}):
        gain = torch.where(gaps <= gate, 0.0, unsteered - steered).double()
        mean, error = float(gain.mean()), float(gain.std()) / math.sqrt(len(gain))
        if mean > max(best, 2 * error):
            best, found = mean, gate
    return found


class _Read:
    """Reads the expert, each text once."""

    def __init__(self, live: LiveExpert) -> None:
        self.live = live
        self.known: dict[str, dict[int, Tensor]] = {}
        self.entropy: dict[str, float] = {}

    def gaps(self, prompts: Sequence[Text], reads: Sequence[Text]) -> Tensor:
        """Entropy of the expert's next token less that of the target's, `[prompt]`, nats."""
        target = self._entropies("target", self.live.target_, prompts, self.live.remote_target_)
        return self.expert_entropies(reads) - target

    def expert_entropies(self, reads: Sequence[Text]) -> Tensor:
        """Entropy of the expert's next token after each text, `[text]`, nats."""
        return self._entropies("expert", self.live.expert_, reads, self.live.remote_)

    def _entropies(self, who: str, model: Any, texts: Sequence[Text], remote: Any) -> Tensor:
        if type(model._module).__name__ == "TransformerBridge":
            raise ValueError(
                "A gate reads next-token entropies, which a TransformerBridge does not give here: take gate=None."
            )
        keys = [f"{who} {texts_hash([text])}" for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.entropy}
        if new:
            read = encoded(model, list(new.values()))
            found = in_rows(model, [], read, [1] * len(read), entropies, remote=remote)
            self.entropy.update({key: float(value[0]) for key, (value,) in zip(new, found, strict=True)})
        return torch.tensor([self.entropy[key] for key in keys])

    def __call__(self, texts: Sequence[Text], ends: Sequence[Sequence[int]] | None = None) -> dict[int, Tensor]:
        """Activations by layer, `[row, hidden]`, at the end of each text and at its `ends` before."""
        key = texts_hash([*texts, json.dumps(None if ends is None else [list(e) for e in ends])])
        if key not in self.known:
            layers, how = sorted({pair[0] for pair in self.live.maps_}), {"batch_size": self.live._batch_size}
            if ends is not None and host_of(self.live.remote_) is None:  # options, of which many have the same prompt
                self.known[key] = continued_states(self.live.expert_, texts, layers, ends, **how)
            else:
                told: dict[str, Any] = {"ends": ends, "remote": self.live.remote_, "progress": False, **how}
                found = collect(self.live.expert_, list(texts), layers, **told)
                self.known[key] = {layer: found[layer] for layer in layers}
        return self.known[key]


class _Setting:
    """A live expert at given layers, amount and gate."""

    def __init__(
        self, read: _Read, layers: Sequence[tuple[int, int]], amount: float, gate: float | None = None
    ) -> None:
        self.live, self.read, self.amount, self.gate = read.live, read, amount, gate
        self.maps = [self.live.maps_[pair] for pair in layers]

    def plan(
        self, prompts: Sequence[Text], reads: Sequence[Text] | None = None, heard: Sequence[bool] | None = None
    ) -> SteeringPlan:
        """As `LiveExpert.plan`, with `heard` in the gate's place."""
        reads = prompts if reads is None else reads
        tokenizer = tokenizer_of(self.live.target_)
        known = affixes(tokenizer)
        ids = [encode(tokenizer, prompt, known)[0] for prompt in prompts]
        heard = self.heard(prompts, reads) if heard is None else heard
        rows = self._vectors(prompts, None, reads, heard)
        layers = [{"expert_layer": m.expert, "target_layer": m.target, "held_out_r2": m.r2} for m in self.maps]
        info = {**self.live.info_, "pairs": layers, "amount": self.amount}
        if self.gate is not None:
            info["gate"] = {"nats": self.gate, "steered": sum(heard) / len(heard)}
        return SteeringPlan([stack(mine) for mine in zip(*rows, strict=True)], self.live.target_, info, Prompts.of(ids))

    def heard(self, prompts: Sequence[Text], reads: Sequence[Text]) -> list[bool]:
        """Which prompts the gate lets the expert steer."""
        if self.gate is None:
            return [True] * len(prompts)
        return (self.read.gaps(prompts, reads) <= self.gate).tolist()

    def for_texts(
        self,
        prompts: Sequence[Text],
        continuations: Sequence[str] | None = None,
        reads: Sequence[Text] | None = None,
        heard: Sequence[bool] | None = None,
    ) -> list[SteeringPlan]:
        """As `LiveExpert.for_texts`; `reads` as in `LiveExpert.plan`, and `heard` in the gate's place."""
        target, reads = ModelIdentity.of(self.live.target_), prompts if reads is None else reads
        heard = self.heard(prompts, reads) if heard is None else heard
        return [SteeringPlan(mine, target) for mine in self._vectors(prompts, continuations, reads, heard)]

    def generate(
        self,
        prompts: Sequence[Text],
        max_new_tokens: int,
        reads: Sequence[Text] | None = None,
        heard: Sequence[bool] | None = None,
        *,
        batch_size: int = 32,
        do_sample: bool = False,
    ) -> list[str]:
        """As `LiveExpert.generate`; `reads` as in `LiveExpert.plan`, and `heard` in the gate's place."""
        from .live_generation import follow

        live, prompts = self.live, list(prompts)
        read = prompts if reads is None else list(reads)
        if type(live.target_._module).__name__ == "TransformerBridge":
            raise ValueError(
                "A TransformerBridge generates outside of nnsight: run its own generate in "
                "bridge.hooks(fwd_hooks=live.plan([prompt]).to_transformer_lens(bridge)), prompt by prompt."
            )
        heard = self.heard(prompts, read) if heard is None else heard
        if not live.follow:
            plan = self.plan(prompts, read, heard)
            how: dict[str, Any] = {"batch_size": batch_size, "do_sample": do_sample, "remote": live.remote_target_}
            return completions(live.target_, rollouts(live.target_, prompts, plan, max_new_tokens, **how))
        if do_sample:
            raise ValueError("A live expert that follows takes the likeliest token at each step: leave do_sample out.")
        made = []
        for i in range(0, len(prompts), batch_size):
            some = slice(i, i + batch_size)
            made += follow(self, prompts[some], max_new_tokens, read[some], heard[some])
        return [tokenizer_of(live.target_).decode(row, skip_special_tokens=True) for row in made]

    def _vectors(
        self,
        prompts: Sequence[Text],
        continuations: Sequence[str] | None,
        reads: Sequence[Text],
        heard: Sequence[bool],
    ) -> list[list[SteeringVector]]:
        """The vectors of each text, for one row; without strength where the expert is not `heard`."""
        if len(reads) != len(prompts):
            raise ValueError(
                f"The expert needs one text for each of {len(prompts)} prompts, but {len(reads)} were given."
            )
        found: list[list[SteeringVector]] = [[] for _ in prompts]
        if self.live.where == "last_prompt":
            distinct: dict[str, int] = {}
            number = [distinct.setdefault(json.dumps(read), len(distinct)) for read in reads]
            states = self.read([json.loads(read) for read in distinct])
            for m in self.maps:
                z = m(states[m.expert])
                for mine, i in zip(found, number, strict=True):
                    mine.append(self._vector(m, z[i], self.live.op, self.amount, "last_prompt"))
        if self.live.where == "shared_ends" or (self.live.follow and continuations is not None):
            more = continuations if self.live.follow and continuations is not None else [""] * len(prompts)
            for mine, others in zip(found, self._at_shared(prompts, more, reads), strict=True):
                mine += others
        return [mine if on else [replace(v, strength=0.0) for v in mine] for mine, on in zip(found, heard, strict=True)]

    def _at_shared(
        self, prompts: Sequence[Text], continuations: Sequence[str], reads: Sequence[Text]
    ) -> list[list[SteeringVector]]:
        """For each text, vectors at its shared ends: those of the prompt, if wanted, and those of the continuation."""
        tokenizers = tokenizer_of(self.live.expert_), tokenizer_of(self.live.target_)
        texts = [
            continued_ends(*tokenizers, prompt, more, read)
            for prompt, more, read in zip(prompts, continuations, reads, strict=True)
        ]
        # the end of each text is read as well, and may be a place
        wholes = [f"{read}{more}" for read, more in zip(reads, continuations, strict=True)]
        ends = [[end for _, end in text.places if end < len(whole)] for text, whole in zip(texts, wholes, strict=True)]
        states = self.read(wholes, ends)
        row, found = 0, []
        for text, mine in zip(texts, ends, strict=True):
            kinds = []
            if self.live.where == "shared_ends":
                kinds.append((True, self.live.op, self.amount))
            if self.live.follow:
                kinds.append((False, self.live.follow_op, self.live.follow_amount))
            made = []
            for m in self.maps:
                z = m(states[m.expert][row : row + len(text.places)])
                for inside, op, amount in kinds:
                    kept = [i for i, (token, _) in enumerate(text.places) if (token < text.prompt) == inside]
                    made.append(self._vector(m, z[kept], op, amount, "given", [[text.places[i][0] for i in kept]]))
            found.append(made)
            row += len(mine) + 1
        return found

    def onwards(self, m: LiveMap, states: Tensor, on: Tensor) -> SteeringVector:
        """What is done at the token that was written last, a row for each text: `on` `[row]` is 1 where the expert is heard."""
        one = self._vector(m, m(states), self.live.follow_op, self.live.follow_amount, "all")
        return replace(one, strength=self.live.follow_amount * on, skip_special=False)

    @staticmethod
    def _vector(m: LiveMap, z: Tensor, op: str, amount: float, where: str, at: Any = None) -> SteeringVector:
        predictor = m.predictor if op == "innovation" else None
        if op == "add":  # what is known of z beforehand is its mean, whatever h is
            op, predictor = "innovation", m.known_mean
        return SteeringVector(m.target, z, amount, None, op, where, at=at, predictor=predictor)


class _MapHeader(BaseModel, extra="forbid"):
    expert: NonNegativeInt
    target: NonNegativeInt
    norm: PositiveFloat
    r2: FiniteFloat | None


class _Aligner(BaseModel, extra="forbid"):
    name: Literal["RidgeAligner", "ProcrustesAligner", "CovarianceAligner", "IdentityAligner"]
    parameters: dict[str, float | int | str | bool | list[float] | None]


class _Settings(BaseModel, extra="forbid"):
    op: str
    where: str
    follow: bool
    follow_op: str
    follow_amount: FiniteFloat
    anchor_ends: NonNegativeInt | None
    random_state: int


class _Header(BaseModel, extra="forbid"):
    format_version: int
    settings: _Settings
    amount: FiniteFloat
    gate: FiniteFloat | None = None
    aligner: _Aligner | None
    info: dict[str, Any]
    maps: list[_MapHeader] = Field(min_length=1)


def _read_file(path: str | Path) -> tuple[_Header, dict[str, Tensor]]:
    """Header and tensors of a file, checked."""
    if not Path(path).exists():
        raise FileNotFoundError(f"No live expert at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or a damaged one ({error}).") from None
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no live expert (its header says format={meta.get('format')!r}, not {FORMAT!r})."
        )
    try:
        known = json.loads(meta.get("live_expert", ""))
        version = known.get("format_version") if isinstance(known, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise ValueError(f"{path} has format {version}, newer than {VERSION}: upgrade expertsteer_nnsight.")
        header = _Header.model_validate(known, strict=True)
        for name in ("expert", "target"):
            ModelIdentity(**header.info[name])
    except ValidationError as error:
        raise ValueError(f"The header of {path} is damaged: {reason(error)}.") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"The header of {path} is damaged ({error}).") from None
    for i in range(len(header.maps)):
        mine = [tensors.get(f"{i}.{name}") for name in TENSORS]
        weight = mine[0]
        wide = weight.shape[1] if weight is not None and weight.ndim == 2 else -1
        shapes = [tuple(t.shape) if t is not None and t.isfinite().all() else None for t in mine]
        if shapes[1:] != [(wide,), (wide,), (wide + 1, wide)] or shapes[0] is None:
            raise ValueError(
                f"Map {i} of {path} is damaged: its tensors are missing, not finite, or do not fit together."
            )
    return header, tensors
