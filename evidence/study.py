"""The study: one factor at a time from a base setting, every arm at equal KL on held-out items.

    python -m evidence --data FOLDER          # everything; interrupted, the same command goes on
    python -m evidence --slice                # the project's own concept alone, without a data set

Each arm is one line of runs/evidence/results.jsonl, with the effect on every item, so that tables and figures can be drawn
again without a model. No text of a data set is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from evidence.concepts import Concept, Data, concept, generic
from evidence.models import PAIRS, States, model
from expertsteer_nnsight.activations import Activations
from expertsteer_nnsight.alignment import IdentityAligner, ProcrustesAligner
from expertsteer_nnsight.calibration import either_sign, neutral_tokens
from expertsteer_nnsight.control_arms import control_arms
from expertsteer_nnsight.positions import prefix_ids
from expertsteer_nnsight.steering import SteeringPlan
from expertsteer_nnsight.word_ends import shared_ends

ENDS = 4  # further places of each generic text
CHUNK = 16  # plans whose results are written at once
NULL_ITEMS = 32
UNTRAINED = (1, 2, 3)
ALIGNERS = {
    "autoencoder": es.AutoencoderAligner(),
    "procrustes": ProcrustesAligner(),
    "ridge_rank_64": es.RidgeAligner(max_rank=64),
    "covariance": es.CovarianceAligner(),
}
LAYERS = {
    "one_pair": {"n_pairs": 1},
    "lowest_mi": {"score": "gaussian_mi", "select": "lowest", "band": (0.1, 0.9)},
    "highest_mi": {"score": "gaussian_mi"},
    "highest_cka": {"score": "cka"},
}


@dataclass(frozen=True)
class Arm:
    """A plan and where it stands in the study.

    Attributes:
        factor: what is varied; "base" for the recommended setting and its controls.
        level: the value of the factor.
        who: expert, native, untrained, text_features, permuted or random.
        draw: seed or number of the draw.
        plan: the plan.
        items: how many items it is scored on.
    """

    factor: str
    level: str
    who: str
    draw: int
    plan: SteeringPlan
    items: int | None = None


@dataclass
class Cell:
    """One pair of models and one concept: the states that all arms share.

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
    neutral: Any = field(default=None, repr=False)
    memory: dict[Any, Activations] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.expert, self.target = PAIRS[self.pair]
        self.texts = [text for both in self.concept.pairs for text in both]
        self.labels = [1, 0] * len(self.concept.pairs)
        self.groups = [i for i in range(len(self.concept.pairs)) for _ in range(2)]
        known = [(t, len(prefix_ids(t))) for t in (model(name).tokenizer for name in (self.expert, self.target))]
        ends = shared_ends(self.anchors, known, ENDS)
        self.prefixes = [
            t if e is None else t[:e] for t, mine in zip(self.anchors, ends, strict=True) for e in (*mine, None)
        ]
        self.kinds = {"generic": (self.anchors, ends), "in_domain": (self.concept.in_domain[:1000], None)}

    def labelled(self, who: str) -> Activations:
        """States of the labelled texts."""
        return self._kept(("labelled", who), lambda: self.states(who, self.texts).take(slice(None)))

    def read(self, who: str, kind: str = "generic", texts: int | None = None, whole: bool = False) -> Activations:
        """States of anchors; `kind` is a key of `kinds` or several with a plus between.

        Args:
            who: a model.
            kind: which anchors.
            texts: the first so many.
            whole: at the texts' ends only.
        """

        def joined() -> Activations:
            return Activations.joined([self.states(who, *self.kinds[k]) for k in kind.split("+")])

        found = self._kept((kind, who), joined)
        found = found.whole if whole else found
        if texts is None:
            return found
        of = found.text_of or range(found.n_texts)
        return found.take([i for i, text in enumerate(of) if text < texts])

    def _kept(self, key: tuple[str, str], read: Callable[[], Activations]) -> Activations:
        if key not in self.memory:
            self.memory[key] = read()
        return self.memory[key]

    def fit(
        self, steer: es.ExpertSteer, who: str, pairs: int | None = None, labels: Any = None, **anchors: Any
    ) -> SteeringPlan:
        """A plan from the states of `who`, with the first of the labelled pairs or other labels; `anchors` as in `read`."""
        keep = slice(None) if pairs is None else slice(2 * pairs)
        given = self.labels if labels is None else labels
        x, theirs, own = self.labelled(who).take(keep), self.read(who, **anchors), self.read(self.target, **anchors)
        return steer.fit_activations(x, given[keep], theirs, own, self.groups[keep])

    # -- arms --------------------------------------------------------------------------------------------------------

    def base(self, draws: int = 20) -> tuple[list[Arm], list[tuple[int, int]]]:
        """The recommended setting with all of its controls, and its layer pairs."""
        steer = es.ExpertSteer.recommended()
        plan = self.fit(steer, self.expert)
        others = [f"{self.expert}~{seed}" for seed in self.untrained]
        controls = control_arms(
            steer, self.labelled(self.expert), self.labels, self.read(self.expert), self.read(self.target),
            groups=self.groups, labelled_target=self.labelled(self.target), draws=draws,
            untrained=[(self.labelled(name), self.read(name)) for name in others], texts=(self.texts, self.prefixes),
        )  # fmt: skip
        found = [Arm("base", "recommended", "expert", 0, plan)]
        for who, made in controls.items():
            plans = [made] if isinstance(made, SteeringPlan) else made
            few = NULL_ITEMS if who in ("permuted", "random") else None
            found += [Arm("base", "recommended", who, i, p, few) for i, p in enumerate(plans)]
        return found, [(p.expert, p.target) for p in steer.pairs_]

    def factors(self, layers: list[tuple[int, int]]) -> Iterator[Arm]:
        """One factor at a time, at the base's layers unless the factor is the layers; two untrained experts each."""
        recommended = es.ExpertSteer.recommended
        own = [(t, t) for _, t in layers]

        def both(
            factor: str, level: Any, make: Callable[[], es.ExpertSteer], native: Any = None, **how: Any
        ) -> Iterator[Arm]:
            yield Arm(factor, str(level), "expert", 0, self.fit(make(), self.expert, **how))
            for seed in self.untrained[:2]:
                yield Arm(factor, str(level), "untrained", seed, self.fit(make(), f"{self.expert}~{seed}", **how))
            if native is not None:
                yield Arm(factor, str(level), "native", 0, self.fit(native(), self.target, **how))

        def itself() -> es.ExpertSteer:
            return recommended(aligner=IdentityAligner(), layers=own)

        def reads(level: list[tuple[int, int]]) -> Callable[[], es.ExpertSteer]:
            return lambda: es.ExpertSteer.in_domain(layers=level)

        yield from both("preset", "paper", es.ExpertSteer.paper)
        yield from both("preset", "in_domain", reads(layers), reads(own), kind="in_domain")
        for name, aligner in ALIGNERS.items():
            yield from both("aligner", name, lambda a=aligner: recommended(aligner=a, layers=layers))
        for name, change in LAYERS.items():
            picked = self._picked(change)
            yield from both("layers", name, lambda p=picked: recommended(layers=p))
        for name in ("rfm", "pca", "logistic", "lda"):
            yield from both("direction", name, lambda d=name: recommended(direction=d, layers=layers))
            yield Arm("direction", name, "native", 0, self.fit(itself().set_params(direction=name), self.target))
        for n in (50, 200, 500, 1000):
            yield from both("anchors", n, lambda: recommended(layers=layers), texts=n)
        yield from both("anchors", "whole texts", lambda: recommended(layers=layers), whole=True)
        for kind in ("in_domain", "generic+in_domain"):
            yield from both("anchors", kind, lambda: recommended(layers=layers), kind=kind)
        for n in (8, 16, 32):
            yield from both("labels", n, lambda: recommended(layers=layers), itself, pairs=n)
            yield from both("labels, reads", n, reads(layers), reads(own), kind="in_domain", pairs=n)
        for share in (0.2, 0.4):
            noisy = self._noisy(share)
            yield from both("noise", share, lambda: recommended(layers=layers), itself, labels=noisy)
            yield from both("noise, reads", share, reads(layers), reads(own), kind="in_domain", labels=noisy)

    def _picked(self, change: dict[str, Any]) -> list[tuple[int, int]]:
        steer = es.ExpertSteer.recommended(**change)
        self.fit(steer, self.expert)
        return [(p.expert, p.target) for p in steer.pairs_]

    def _noisy(self, share: float) -> list[int]:
        """Labels of which a share is flipped, pair by pair, so that the classes stay equally large."""
        flip = np.random.default_rng(0).permutation(len(self.concept.pairs)) < share * len(self.concept.pairs)
        return [label ^ int(flip[i // 2]) for i, label in enumerate(self.labels)]


class Results:
    """Lines of results; what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines = [json.loads(line) for line in lines if line.endswith("}")]
        self.keys = {self.key(line) for line in self.lines}

    @staticmethod
    def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        """What makes a line one measurement."""
        return tuple(line[name] for name in ("pair", "concept", "factor", "level", "who", "draw"))

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Writes lines at once."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.lines += lines
        self.keys |= {self.key(line) for line in lines}


def measure_arms(cell: Cell, arms: list[Arm], effect: Any, results: Results) -> None:
    """Calibrates and scores arms, and writes a line for each."""
    target = model(cell.target)
    if cell.neutral is None:
        cell.neutral = neutral_tokens(target, es.example("sentiment_probe")["neutral_texts"][:8])
    where = {"pair": cell.pair, "concept": cell.concept.name}
    missing = [a for a in arms if Results.key({**where, **_place(a)}) not in results.keys]
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        found, ready = either_sign(target, [a.plan for a in chunk], cell.neutral)
        scores: dict[int, Tensor] = {}
        for count in {a.items for a in chunk}:
            mine = [i for i, a in enumerate(chunk) if a.items == count]
            some = effect if count is None else effect[:count]
            rows = some.score(target, [ready[2 * i + s] for i in mine for s in (0, 1)])[1:]
            scores |= {i: rows[2 * k] - rows[2 * k + 1] for k, i in enumerate(mine)}
        lines = []
        for i, arm in enumerate(chunk):
            steps = arm.plan.info.get("pairs", [])
            lines.append({
                **where, **_place(arm), "n": len(scores[i]), "effect": float(scores[i].mean()),
                "items": [round(x, 5) for x in scores[i].tolist()],
                "strength": [round(float(found.strength[2 * i + s]), 5) for s in (0, 1)],
                "kl_p95": [round(float(found.kl[2 * i + s]), 4) for s in (0, 1)],
                "met": bool(found.met[2 * i : 2 * i + 2].all()),
                "nll": [round(float(found.nll[2 * i + s]), 4) for s in (0, 1)],
                "layers": [[s["expert_layer"], s["target_layer"]] for s in steps],
                "r2": [s["held_out_r2"] for s in steps], "auc": [s.get("held_out_auc") for s in steps],
            })  # fmt: skip
        results.add(lines)


def _place(arm: Arm) -> dict[str, Any]:
    return {"factor": arm.factor, "level": arm.level, "who": arm.who, "draw": arm.draw}


def run(
    data: Data,
    out: Path,
    pairs: list[str],
    concepts: list[str],
    *,
    factors: bool = True,
    anchors: int = 2000,
    draws: int = 20,
    own: bool = False,
    items: int | None = None,
) -> Results:
    """Runs what is missing. The first pair gets every factor, the others the base with its controls.

    Args:
        data: the data sets.
        out: folder of results and states.
        pairs: names in `PAIRS`.
        concepts: names of concepts.
        factors: vary factors on the first pair.
        anchors: how many generic texts.
        draws: of the permuted and random arms.
        own: take the project's own generic texts, which need no data set.
        items: score the first so many of the test items; all of them if None.
    """
    results, states = Results(out / "results.jsonl"), States(out / "states")
    texts = es.example("general")[:anchors] if own else generic(data, anchors)
    work = [(pair, name) for pair in pairs for name in concepts]
    with tqdm(work, desc="study", unit="cell") as bar:
        for pair, name in bar:
            started = time.time()
            bar.set_postfix_str(f"{pair}, {name}")
            cell = Cell(pair, concept(name, data), texts, states)
            effect = es.Choices(cell.concept.test[:items])
            base, layers = cell.base(draws)
            measure_arms(cell, base, effect, results)
            if factors and pair == pairs[0]:
                measure_arms(cell, list(cell.factors(layers)), effect, results)
            bar.write(f"{pair}, {name}: {time.time() - started:.0f} s")
    return results
