"""What a fit and its control arms read of the models, each text once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from sklearn.base import clone
from torch import Tensor

from ..models.identity import ModelIdentity
from ..models.positions import prefix_ids
from ..models.untrained import untrained_like
from ..states.activations import Activations
from ..states.collecting import collect
from ..states.fingerprint import files_of, fingerprint, untold
from ..texts.labelled import ContrastPairs, LabelledTexts
from ..texts.overlap import overlap
from ..texts.texts import Position, as_texts, once, texts_hash, tokenizer_of
from ..texts.word_ends import prefixes, shared_ends


class Reading:
    """Reads the states that a fit and its control arms need, each once.

    What came back from a remote model is kept until the `with` block that it is used in has succeeded.

    Args:
        models: `expert`, `target` and `base` (may be None), each with its `remote=`.
        pairs: the labelled texts; with a base model plain texts.
        anchors: the unlabelled texts.
        kept: what is in it is not read again; it is added to.
        cache: folder with a folder for each model and set of texts.
        layers: from the identities of expert and target to the layers that are read of either.
        position: which token's state stands for a text.
        anchor_ends: at how many further shared token ends an anchor is read.
        random_state: seed of the choice of these.
        settings: further ones of `collect`.

    Raises:
        ValueError: texts that are none, or a base model that does not fit the expert.
    """

    def __init__(
        self,
        models: dict[str, tuple[Any, Any]],
        pairs: Any,
        anchors: Any,
        kept: dict[Any, Activations],
        cache: str | Path | None,
        *,
        layers: Callable[[ModelIdentity, ModelIdentity], tuple[list[int], list[int]]],
        position: Position,
        anchor_ends: int,
        random_state: int,
        **settings: Any,
    ) -> None:
        self.models, self.kept, self.cache, self.settings = models, kept, cache, settings
        self._until, self._known = ExitStack(), {}
        expert, base = ModelIdentity.of(models["expert"][0]), models["base"][0]
        if base is None:
            self.labelled = LabelledTexts.of(pairs)
            self.texts = list(self.labelled.texts)
        else:
            other = ModelIdentity.of(base)
            if (other.n_layers, other.hidden_size) != (expert.n_layers, expert.hidden_size):
                raise ValueError(
                    f"The base model {other} and the expert {expert} differ in shape: give the model that the expert was "
                    f"made from."
                )
            self.texts = as_texts(_unlabelled(pairs))
            n = len(self.texts)
            labels, groups = [1] * n + [0] * n, [*range(n)] * 2
            self.labelled = LabelledTexts(self.texts * 2, labels, groups, "expert_minus_base")
        self.anchors, self.position, self.anchor_ends = once(as_texts(anchors), "anchors"), position, anchor_ends
        self.layers = layers(expert, ModelIdentity.of(models["target"][0]))
        known = [(t, len(prefix_ids(t))) for t in (tokenizer_of(models[name][0]) for name in ("expert", "target"))]
        self.ends = shared_ends(self.anchors, known, anchor_ends, random_state) if anchor_ends else None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._until.__exit__(*raised)

    @property
    def anchor_texts(self) -> list[Any]:
        """What was read at each row of the anchors' states."""
        return prefixes(self.anchors, self.ends)

    def fit_states(self) -> tuple[Any, ...]:
        """What `fit_activations` takes: labelled states, labels, the expert's anchors and the target's."""
        x, expert_anchors = self._as_expert("expert")
        return x, self.labelled.labels, expert_anchors, self._read("target", "anchors")

    def target_labelled(self) -> Activations | None:
        """The target's states of the labelled texts; None with a base model, where the texts have no labels of their own."""
        return self._read("target", "pairs") if self.models["base"][0] is None else None

    def shared(self) -> list[int]:
        """Numbers of the anchors that `overlap` with the labelled texts."""
        # with a base model no text tells the classes apart, so that no anchor can carry a label over
        return overlap(self.anchors, self.labelled.texts) if self.models["base"][0] is None else []

    def record(self, shared: int) -> dict[str, Any]:
        """What a plan's info tells of the base model and the texts, `shared` of whose anchors are labelled."""
        data = {
            "labels": self.labelled.source,
            "labelled": len(self.texts),
            "labelled_hash": texts_hash(self.texts),
            "anchors": len(self.anchors),
            "anchors_hash": texts_hash(self.anchors),
            "anchors_labelled": shared,
        }
        base = self.models["base"][0]
        of = {} if base is None else {"base": ModelIdentity.of(base).to_dict()}
        return {**of, "data": data}

    def control_states(self, untrained: int) -> dict[str, Any]:
        """What `control_arms` takes besides. Where a base model is the other class, texts have no labels of their own."""
        own = {"groups": self.labelled.groups, "same": self.labelled.same}
        target = self.target_labelled()
        if target is not None:
            own |= {"labelled_target": target, "texts": (self.texts, self.anchor_texts)}
        return own | {"untrained": [self._untrained(n) for n in range(1, untrained + 1)]}

    def _untrained(self, seed: int) -> tuple[Any, Activations]:
        name = f"untrained-{seed}"
        self.models[name] = untrained_like(self.models["expert"][0], seed), False
        try:
            return self._as_expert(name)
        finally:
            del self.models[name]  # one at a time in memory

    def _as_expert(self, name: str) -> tuple[Any, Activations]:
        x: Any = self._read(name, "pairs")
        if self.models["base"][0] is not None:
            other = self._read("base", "pairs")
            x = {layer: torch.cat([x[layer], other[layer]]) for layer in x}
        return x, self._read(name, "anchors")

    def _who(self, name: str) -> Any:
        """What a model is known by, besides where it lies: another one may lie where one that is gone has lain.

        One that is not loaded stays so if there is a cache, which may know its files.
        """
        if name not in self._known:
            model, remote = self.models[name]
            loaded = remote or self.cache is None or getattr(model, "dispatched", True)
            files = None if loaded else files_of(model)
            told = remote or untold(model) is None
            self._known[name] = files or (fingerprint(model, bool(remote)) if told else object())
        return self._known[name]

    def _read(self, name: str, kind: str) -> Activations:
        model, remote = self.models[name]
        texts = self.anchors if kind == "anchors" else self.texts
        layers = self.layers[name == "target"]
        ends = self.ends if kind == "anchors" else None
        key = (id(model), self._who(name), texts_hash(texts), tuple(layers), self.position, str(ends))
        if key in self.kept:
            return self.kept[key]
        # apart from states of whole texts, so that presets with and without further places share a cache
        places = "" if ends is None else f"-{self.anchor_ends}-ends"
        where = None if self.cache is None else Path(self.cache) / f"{name}-{kind}{places}"
        own = {"cache": where, "ends": ends, "remote": remote, "_until": self._until}
        found = collect(model, texts, layers, self.position, **own, **self.settings)
        if name in ("expert", "target", "base"):
            self.kept[key] = found
        return found


def _unlabelled(texts: Any) -> Any:
    if isinstance(texts, (ContrastPairs, LabelledTexts)):
        raise ValueError("With base= the models are the labels: pass plain texts, such as pairs.texts.")
    return texts


def check_layer_pairs(pairs: Sequence[tuple[int, int]], expert: ModelIdentity, target: ModelIdentity) -> None:
    """Raises ValueError for a layer pair, (expert layer, target layer), that a model does not have."""
    for pair in pairs:
        for layer, model, side in zip(pair, (expert, target), ("expert", "target"), strict=True):
            if not 0 <= layer < model.n_layers:
                raise ValueError(
                    f"The layer pair {tuple(pair)} was asked for, but the {side} {model.name or model.kind} has layers "
                    f"0 to {model.n_layers - 1}."
                )


def held_out_r2(aligner: Any, x: Tensor, y: Tensor, text: Tensor, random_state: int) -> float | None:
    """R² on the rows of a tenth of the anchors of a map fitted on the others; None for too few to tell."""
    n = int(text.max()) + 1
    if n < 20:
        return None
    order = torch.randperm(n, generator=torch.Generator().manual_seed(random_state))
    test = torch.isin(text, order[: n // 10])
    probe: Any = clone(aligner)
    return probe.fit(x[~test], y[~test]).score(x[test], y[test])
