"""What raises a live expert's effect: one factor at a time, from the setting that the choice task chose.

Measured on training questions of the task that are neither anchors nor validation items, so that no test item is spent. Each
level has its own control: the same live expert reading another item's prompt. Layers and amount are the base's wherever they are
not the factor, which favours the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from evidence.live.choices import GENERAL, SCREENED, TRAINING, VALIDATION, questions
from evidence.live.choices import VERSION as CHOICES
from evidence.live.results import Line, Results
from evidence.live.slopes import best_map, centred, gradient
from evidence.models import PAIRS, model
from evidence.report import markdown
from expertsteer_nnsight.align.closed_form import ProcrustesAligner
from expertsteer_nnsight.fit.live_controls import AnotherPrompt
from expertsteer_nnsight.measure.answers import compared

TASKS = ("arc_easy",)
ITEMS = 200
ANSWERED = 400  # training questions whose right answers a map is fitted on; they overlap with those that are screened
VERSION = 1
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "base": {"base": {}},
    "aligner": {
        "ridge of rank 64": {"aligner": es.RidgeAligner(max_rank=64)},
        "whitened Procrustes": {"aligner": ProcrustesAligner(whiten=True)},
        "Procrustes of 100 dimensions": {"aligner": ProcrustesAligner(100)},
    },
    "op": {"innovation": {"op": "innovation"}, "add": {"op": "add"}},
    "amount": {f"{amount:g}": {"amount": amount} for amount in (0.5, 1.0, 1.5, 2.0)},
    "places": {"every shared end of the prompt": {"where": "shared_ends"}},
    "follow": {
        "innovation, 0.5": {"follow": True},
        "innovation, 1": {"follow": True, "follow_amount": 1.0},
        "blend, 0.5": {"follow": True, "follow_op": "blend"},
    },
    "ends of an anchor": {f"{ends}": {"anchor_ends": ends} for ends in (0, 2, 8)},
}
ANCHORS: dict[str, tuple[int, int, bool]] = {  # general texts, questions, with their options
    "general texts alone": (GENERAL, 0, True),
    "questions alone": (0, TRAINING, True),
    "as many texts of questions without options": (GENERAL, 4 * TRAINING, False),
    "50 questions": (GENERAL, TRAINING // 4, True),
    "twice as many questions": (GENERAL, 2 * TRAINING, True),
    "1000 general texts": (1000, TRAINING, True),
}


def anchors(task: str, data: Path, general: int, asked: int, options: bool) -> list[str]:
    """General texts, and training questions with each of their options or without any."""
    items = questions(task, "train", data, max(asked, 1)).items[:asked]
    told = [f"{prompt}{o}" for prompt, every, _ in items for o in (every if options else [""])]
    return es.example("general")[:general] + told


def held_out(task: str, data: Path) -> es.MultipleChoice:
    """Training questions beyond those that are anchors or tell whether the expert leads."""
    start = max(TRAINING + SCREENED, ANSWERED, *(asked for _, asked, _ in ANCHORS.values()))
    return questions(task, "train", data, start + ITEMS)[start:]


def measure(pair: str, task: str, data: Path, results: Results, folder: Path) -> None:
    """A line for each level."""
    chosen = results.find(version=CHOICES, pair=pair, task=task, stage="chosen")
    if chosen is None:
        return
    expert, target = (model(name) for name in PAIRS[pair])
    place = {"version": VERSION, "pair": pair, "task": task, "stage": "factor"}
    items, states = held_out(task, data), folder / f"{pair}-{task}"
    base = {"layers": [(e, t) for e, t in chosen["layers"]], "amount": chosen["amount"]}
    usual = anchors(task, data, GENERAL, TRAINING, True)

    def fitted(change: dict[str, Any], texts: list[str], where: str, own: bool = False) -> es.LiveExpert:
        live, reader = es.LiveExpert(**{**base, **change}), target if own else expert
        return live.fit(reader, target, texts, cache=states / where, progress=False)

    best: dict[int, tuple[int, int]] = {}  # of each target layer, the best pair first
    for ((e, t),), *_ in chosen["settings"]:
        best.setdefault(t, (e, t))
    several = {
        f"{n} pairs": {"layers": list(best.values())[:n], "amount": chosen["amount"] / n}
        for n in (2, 3)
        if n <= len(best)
    }
    work: list[tuple[str, str, Callable[[], es.LiveExpert]]] = [
        (factor, level, lambda c=change, f=factor, n=level: fitted(c, usual, _folder(f, n)))
        for factor, levels in {**SETTINGS, "layers": several}.items()
        for level, change in levels.items()
    ]
    work += [
        ("anchors", level, lambda h=how, n=level: fitted({}, anchors(task, data, *h), _folder("anchors", n)))
        for level, how in ANCHORS.items()
    ]
    work += [("map", level, make) for level, make in _other_maps(fitted, usual, chosen, task, data).items()]
    for factor, level, make in tqdm(work, desc=f"factors, {pair}, {task}"):
        if results.find(**place, factor=factor, level=level) is None:
            live = make()
            found = items.options(target, [live, AnotherPrompt(live)], progress=False)
            answers = {
                name: [int(x[row].argmax()) for x in found]
                for row, name in enumerate(("unsteered", "live", "another prompt"))
            }
            right = [best for _, _, best in items.items]
            results.add({**place, "factor": factor, "level": level, "right": right, "answers": answers})


def _other_maps(
    fitted: Callable[..., es.LiveExpert], usual: list[str], chosen: Line, task: str, data: Path
) -> dict[str, Callable[[], es.LiveExpert]]:
    """Maps that are no map of the anchors' activations alone."""
    asked = questions(task, "train", data, ANSWERED)
    prompts = [prompt for prompt, _, _ in asked.items]
    ((expert, target),) = chosen["layers"]

    @cache
    def slopes(model: Any) -> Tensor:
        return torch.stack([gradient(model, target, *item) for item in asked.items])

    def on_answers(own: bool) -> es.LiveExpert:
        live = fitted(
            {"op": "add", "layers": [(target if own else expert, target)]}, usual, "own" if own else "one", own
        )
        return best_map(live, asked, slopes(live.target_), questions(task, "validation", data, VALIDATION))

    return {
        "centred on the ends of questions": lambda: centred(fitted({}, usual, "one"), prompts[:TRAINING]),
        "loss gradient of right answers": lambda: on_answers(False),
        "the same from the target's own activation": lambda: on_answers(True),
    }


def _folder(factor: str, level: str) -> str:
    """Where a level's activations of the anchors are: levels that read the same ones share them."""
    return "one" if factor not in ("anchors", "layers", "ends of an anchor") else f"{factor}-{level}".replace(" ", "-")


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Each level: accuracy, what it adds to the unsteered target, and to the base."""
    mine = [line for line in lines if line.get("stage") == "factor"]
    bases = {(line["pair"], line["task"]): line for line in mine if line["factor"] == "base"}
    body = []
    for line in mine:
        hits = {name: np.array(given) == np.array(line["right"]) for name, given in line["answers"].items()}
        base = bases[line["pair"], line["task"]]
        before = np.array(base["answers"]["live"]) == np.array(base["right"])
        told = [compared(hits["live"], other) for other in (hits["unsteered"], hits["another prompt"], before)]
        body.append([
            line["pair"], line["task"], line["factor"], line["level"], str(len(line["right"])), f"{hits['live'].mean():.3f}",
            *("{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**each) for each in told),
        ])  # fmt: skip
    header = ["models", "task", "factor", "level", "n", "live", "live - unsteered", "live - another prompt",
              "live - the base"]  # fmt: skip
    return {"factors": markdown(header, body)}
