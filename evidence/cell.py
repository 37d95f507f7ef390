"""One pair of models and one concept: the states that all arms share, and what is fitted on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import expertsteer_nnsight as es
from evidence.concepts import Concept
from evidence.models import PAIRS, States, model
from expertsteer_nnsight.fit.control_arms import text_features
from expertsteer_nnsight.models.positions import prefix_ids
from expertsteer_nnsight.states.activations import Activations
from expertsteer_nnsight.steering.plan import SteeringPlan
from expertsteer_nnsight.texts.texts import Position
from expertsteer_nnsight.texts.word_ends import prefixes, shared_ends

UNTRAINED = (1, 2, 3)
JUDGED = 100  # in-domain texts that a model judges by itself
PAIRS_USED = 100  # labelled pairs of a fit, unless their number is what is varied


@dataclass(frozen=True)
class Arm:
    """A plan and where it stands in the study.

    Attributes:
        factor: what is varied; "base" for the recommended setting and its controls.
        level: the value of the factor.
        who: expert, native, untrained, text_features, permuted or random.
        draw: seed or number of the draw.
        plan: the plan.
        items: how many items it is scored on; all if None.
    """

    factor: str
    level: str
    who: str
    draw: int
    plan: SteeringPlan
    items: int | None = None


@dataclass
class Cell:
    """States of one pair of models and one concept.

    Attributes:
        pair: name in `PAIRS`.
        concept: the concept.
        anchors: generic texts.
        states: reads states.
        untrained: seeds of the untrained experts.
    """

    pair: str
    concept: Concept
    anchors: list[str]
    states: States
    untrained: tuple[int, ...] = UNTRAINED
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.expert, self.target = PAIRS[self.pair]
        self.others = [f"{self.expert}~{seed}" for seed in self.untrained]
        self.pairs = list(range(len(self.concept.pairs)))[:PAIRS_USED]
        self.texts = [text for i in self.pairs for text in self.concept.pairs[i]]
        self.labels = [1, 0] * len(self.pairs)
        self.groups = [i for i in self.pairs for _ in range(2)]
        known = [(t, len(prefix_ids(t))) for t in (model(name).tokenizer for name in (self.expert, self.target))]
        ends = es.ExpertSteer.recommended().anchor_ends
        self.kinds: dict[str, Callable[[], tuple[list[str], Any]]] = {
            "generic": lambda: (self.anchors, shared_ends(self.anchors, known, ends)),
            "ends alone": lambda: (self.anchors, None),
            "in_domain": lambda: (self.concept.in_domain, None),
        }

    def labelled(self, who: str, position: Position = "last", pairs: Sequence[int] | None = None) -> Activations:
        """States of the texts of labelled pairs, by their numbers; those that a fit uses if None."""
        texts = [text for both in self.concept.pairs for text in both]
        read = partial(self.states, who, texts, None, position)
        every = self._kept(("labelled", who, position), lambda: read().take(slice(None)))
        return every.take(self._rows(pairs))

    def _rows(self, pairs: Sequence[int] | None) -> list[int]:
        return [2 * i + k for i in (self.pairs if pairs is None else pairs) for k in range(2)]

    def read(
        self, who: str, kind: str = "generic", texts: Sequence[int] | None = None, position: Position = "last"
    ) -> Activations:
        """States of anchors.

        Args:
            who: a model.
            kind: a key of `kinds`, or several with a plus between.
            texts: numbers of those that are taken; all of them if None.
            position: which token's state stands for a text.
        """
        parts = [partial(self.states, who, *self._read_at(k, position), position) for k in kind.split("+")]
        if len(parts) == 1:  # stays on disk: several of these at once would fill the memory
            found = self._kept((kind, who, position), parts[0])
        else:
            found = self._kept((kind, who, position), lambda: Activations.joined([read() for read in parts]))
        return found if texts is None else found.take(self._rows_of(found, texts))

    def _read_at(self, kind: str, position: Position) -> tuple[list[str], Any]:
        """The texts of a kind of anchors, and the further places that they are read at."""
        texts, ends = self.kinds[kind]()
        return texts, ends if position == "last" else None

    @staticmethod
    def _rows_of(states: Activations, texts: Sequence[int]) -> list[int]:
        """The rows of some texts by their numbers."""
        wanted = set(texts)
        return [row for row, text in enumerate(states.text_of or range(states.n_texts)) if text in wanted]

    def _kept(self, key: tuple[Any, ...], read: Callable[[], Any]) -> Any:
        if key not in self.memory:
            self.memory[key] = read()
        return self.memory[key]

    def fit(
        self, steer: es.ExpertSteer, who: str, pairs: Sequence[int] | None = None, labels: Any = None, **anchors: Any
    ) -> SteeringPlan:
        """A plan from the states of `who`, with other labelled pairs, or with other labels; `anchors` as in `read`."""
        x = self.labelled(who, anchors.get("position", "last"), pairs)
        return self._fitted(steer, x, x.n_texts, labels, *(self.read(name, **anchors) for name in (who, self.target)))

    @staticmethod
    def _fitted(steer: es.ExpertSteer, x: Any, n: int, labels: Any, theirs: Any, own: Activations) -> SteeringPlan:
        """From states of `n` texts that come in pairs."""
        groups = [i for i in range(n // 2) for _ in range(2)]
        return steer.fit_activations(x, [1, 0] * (n // 2) if labels is None else labels, theirs, own, groups)

    def fit_text(
        self,
        steer: es.ExpertSteer,
        pairs: Sequence[int] | None = None,
        labels: Any = None,
        kind: str = "generic",
        texts: Sequence[int] | None = None,
    ) -> SteeringPlan:
        """The same with hashed n-grams in the expert's place; `steer` has the layer 0 for all pairs."""
        own = self.read(self.target, kind)
        width = self.read(self.expert, kind)[0].shape[1]
        x, theirs = self._kept(("text", kind), lambda: text_features(self.texts, self.anchor_texts(kind), width))
        some = list(range(len(theirs))) if texts is None else self._rows_of(own, texts)
        rows = self._rows(pairs)
        target = own if texts is None else own.take(some)
        return self._fitted(steer, {0: x[rows]}, len(rows), labels, {0: theirs[some]}, target)

    def anchor_texts(self, kind: str = "generic") -> list[Any]:
        """What is read at each row of the anchors' states."""
        return [text for k in kind.split("+") for text in prefixes(*self.kinds[k]())]

    @staticmethod
    def some(count: int, of: int, draw: int) -> list[int]:
        """Numbers of a random part."""
        return np.random.default_rng(draw).permutation(of)[:count].tolist()

    def judged(self, steer: es.ExpertSteer, who: str, judge: str, **anchors: Any) -> SteeringPlan:
        """A plan from the states of `who` of unlabelled in-domain texts, with `judge`'s own view of them as real labels."""
        texts = self.concept.in_domain[-JUDGED:]
        x = self._kept(("judged", who), lambda: self.states(who, texts).take(slice(None)))
        y = self._kept(("margin", judge), lambda: self._margins(judge, texts))
        return steer.fit_activations(x, y, self.read(who, **anchors), self.read(self.target, **anchors))

    def _margins(self, who: str, texts: list[str]) -> list[float]:
        """Log-probability of the one answer over the other to the concept's question about each text, nats."""
        question, yes, no = self.concept.question
        return es.Choices([(text + question, yes, no) for text in texts]).score(model(who), [])[0].tolist()

    def noisy(self, share: float, draw: int) -> list[int]:
        """Labels of which a random share is flipped, pair by pair, so that the classes stay equally large."""
        flip = np.random.default_rng(draw).permutation(len(self.pairs)) < share * len(self.pairs)
        return [label ^ int(flip[i // 2]) for i, label in enumerate(self.labels)]
