"""Private context: the expert alone reads a sentence, the target only the question about it. Does anything of it arrive?

The items are made here: who keeps which thing where, with four places to choose from. Nothing but the sentence tells the right
one, so the unsteered target answers by chance. Anchors are general texts and other items of the same form with their sentence,
which both models read whole. Places of the test items are among those of the anchors ("known places"), or never ("new places").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import expertsteer_nnsight as es
from evidence.live.results import Line, Results, of_setting
from evidence.models import PAIRS, model
from evidence.report import markdown
from expertsteer_nnsight.fit.live_controls import live_arms
from expertsteer_nnsight.measure.answers import AnswersReceipt
from expertsteer_nnsight.texts.texts import Text

KINDS = ("known places", "new places")
GENERAL, TRAINING, VALIDATION, TEST = 150, 300, 60, 300
OPTIONS, UNTRAINED = 4, 2
SETTINGS: dict[str, dict[str, Any]] = {"last prompt token": {}, "and options": {"follow": True}}
VERSION = 1
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Karen", "Leo", "Maria", "Nora",
         "Oscar", "Paul", "Rosa", "Simon", "Tina", "Victor")  # fmt: skip
THINGS = ("key", "ring", "letter", "map", "watch", "coin", "knife", "lamp", "photo", "ticket", "hammer", "flute", "wallet", "diary",
          "scarf", "compass", "rope", "mirror")  # fmt: skip
PLACES = ("garden", "kitchen", "cellar", "attic", "garage", "office", "car", "library", "barn", "church", "school",
          "boat", "tent", "drawer", "bank", "hotel", "museum", "stable", "tower", "bathroom", "hospital", "theatre", "bakery",
          "forest")  # fmt: skip


def items(
    count: int, seed: int, places: Sequence[str], given: Sequence[tuple[str, str]]
) -> list[tuple[str, str, list[str], int]]:
    """(sentence, question, options, number of the right one); who keeps what is drawn from `given`."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        name, thing = given[int(rng.integers(len(given)))]
        some = [places[i] for i in rng.choice(len(places), OPTIONS, replace=False)]
        right = int(rng.integers(OPTIONS))
        sentence = f"{name} keeps the {thing} in the {some[right]}.\n"
        question = f"Question: Where does {name} keep the {thing}?\nAnswer: {name} keeps it in the"
        found.append((sentence, question, [f" {place}" for place in some], right))
    return found


def splits(kind: str) -> dict[str, list[tuple[str, str, list[str], int]]]:
    """Items of each split, which share no pair of a person and a thing."""
    every = [(name, thing) for name in NAMES for thing in THINGS]
    order = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
    third = len(order) // 3
    held_out = PLACES[: len(PLACES) // 2] if kind == "new places" else PLACES
    train = PLACES[len(PLACES) // 2 :] if kind == "new places" else PLACES
    return {
        "train": items(TRAINING, 1, train, order[:third]),
        "validation": items(VALIDATION, 2, held_out, order[third : 2 * third]),
        "test": items(TEST, 3, held_out, order[2 * third :]),
    }


class Reads:
    """What steers by text, with the expert reading something before each prompt.

    Args:
        steering: a live expert, or one of its controls.
        before: by item, what it reads before the prompt.
        count: of options, for each of which a prompt is asked.
    """

    def __init__(self, steering: Any, before: Sequence[str], count: int = OPTIONS) -> None:
        self.steering, self.before, self.count = steering, before, count

    def for_texts(self, prompts: Sequence[Text], continuations: Sequence[str] | None = None) -> list[es.SteeringPlan]:
        """As `LiveExpert.for_texts`, of the items' prompts, each as often as it has options."""
        reads = [f"{self.before[i // self.count]}{prompt}" for i, prompt in enumerate(prompts)]
        return self.steering.for_texts(prompts, continuations, reads)

    def generate(self, prompts: Sequence[Text], max_new_tokens: int) -> list[str]:
        """Nothing here asks for it."""
        raise NotImplementedError("Private context is measured on options alone.")


class Private:
    """Questions of which the expert reads the sentence too: what a live expert is fitted on.

    Args:
        questions: as the target reads them.
        before: the sentences.
    """

    def __init__(self, questions: es.MultipleChoice, before: Sequence[str]) -> None:
        self.questions, self.before, self.items, self.unit = questions, before, questions.items, questions.unit

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, key: slice) -> Private:
        return Private(self.questions[key], self.before[key])

    def score(self, model: Any, plans: Sequence[Any], **settings: Any) -> Tensor:
        """As `MultipleChoice.score`."""
        return self.questions.score(model, [Reads(plan, self.before) for plan in plans], **settings)


def asked(some: Sequence[tuple[str, str, list[str], int]], whole: bool = False) -> es.MultipleChoice:
    """The questions, with their sentence before them if `whole`."""
    return es.MultipleChoice([(s * whole + q, options, right) for s, q, options, right in some], "text")


def measure(pair: str, kind: str, results: Results, folder: Path) -> None:
    """One line with all answers."""
    place = {"version": VERSION, "pair": pair, "kind": kind, "stage": "context"}
    if results.find(**place) is not None:
        return
    expert, target = (model(name) for name in PAIRS[pair])
    made = splits(kind)
    anchors = es.example("general")[:GENERAL] + [f"{s}{q}{options[right]}." for s, q, options, right in made["train"]]
    validation, test = made["validation"], made["test"]
    cache = folder / f"{pair}-{kind.replace(' ', '-')}"
    answers: dict[str, list[int]] = {}
    live = es.LiveExpert()
    effect = Private(asked(validation), [s for s, *_ in validation])
    live.fit(expert, target, anchors, effect, cache=cache / "every", progress=False)
    layers, amount, tried = live.layers_, live.amount_, live.info_["validation"]
    before = [s for s, *_ in test]
    arms: dict[str, Any] = {}
    for setting, how in SETTINGS.items():
        live = es.LiveExpert(layers=layers, amount=amount, **how)
        live.fit(expert, target, anchors, cache=cache / "one", progress=False)
        others = live_arms(live, anchors, untrained=UNTRAINED, cache=cache / "controls", progress=False)
        arms[f"{setting}: live"] = Reads(live, before)
        arms[f"{setting}: another sentence"] = Reads(live, before[1:] + before[:1])
        arms[f"{setting}: no sentence"] = Reads(live, [""] * len(before))
        arms |= {
            f"{setting}: {name}": Reads(arm, before) for name, arm in others.items() if name.startswith("untrained")
        }
    found = asked(test).options(target, list(arms.values()), progress=False)
    for row, name in enumerate(("unsteered", *arms)):
        answers[name] = [int(x[row].argmax()) for x in found]
    for name, who in (("expert alone", expert), ("target with the sentence", target)):
        answers[name] = [int(x[0].argmax()) for x in asked(test, True).options(who, [], progress=False)]
    results.add({**place, "layers": [list(p) for p in layers], "amount": amount, "right": [r for *_, r in test],
                 "answers": answers, "validation": tried})  # fmt: skip


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """The table of all arms, by setting."""
    body = []
    for line in lines:
        if line.get("stage") != "context":
            continue
        for setting in SETTINGS:
            mine = of_setting(line["answers"], setting)
            references = ("expert alone", "target with the sentence")
            receipt = AnswersReceipt({name: a for name, a in mine.items() if name not in references}, line["right"])
            told = {name: float(np.mean(np.array(a) == np.array(line["right"]))) for name, a in mine.items()}
            seeds = ", ".join(f"{told[name]:.3f}" for name in told if name.startswith("untrained"))
            gain = receipt.comparisons["unsteered"]
            worst = receipt.nearest(("unsteered", *receipt.controls))
            body.append([
                line["pair"], line["kind"], setting, str(len(line["right"])),
                *(f"{told[name]:.3f}" for name in ("unsteered", "live", "another sentence", "no sentence")), seeds,
                *(f"{told[name]:.3f}" for name in references),
                f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
                f"{receipt.comparisons[worst]['holm']:.2g} ({worst})",
            ])  # fmt: skip
    header = ["models", "places", "setting", "n", "unsteered", "live", "another sentence", "no sentence", "untrained",
              "expert with the sentence", "target with the sentence", "live - unsteered", "p of the nearest arm"]  # fmt: skip
    return {"context": markdown(header, body)}
