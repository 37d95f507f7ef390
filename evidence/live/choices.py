"""Choice tasks: how much of an expert's lead a live expert passes on, with all of its controls.

For every task where the expert leads on validation items: the maps are fitted on general texts and on training questions with all
of their options, right and wrong alike; layers, amount and gate are chosen on validation items. Two settings that are declared
here (the last prompt token alone, and with the options), with the gate and without, answer the test items once. A line holds the
answers of all arms to some items.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from evidence.live.results import Line, Results, of_setting
from evidence.models import PAIRS, model
from evidence.report import markdown
from expertsteer_nnsight.fit.live_controls import answered, live_arms
from expertsteer_nnsight.measure.answers import REFERENCES, AnswersReceipt
from recipes.tasks.readers import read

TASKS = ("arc_easy", "arc_challenge", "openbookqa", "piqa", "social_i_qa", "medmcqa", "medqa", "svamp", "mmlu_general",
         "mmlu_medical", "mmlu_financial", "mmlu_mathematics")  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"last prompt token": {}, "and options": {"follow": True}}
LEAD = 0.03  # accuracy on the screened items that an expert must be ahead by
SCREENED, VALIDATION, TEST, CHUNK = 600, 150, 1000, 50
GENERAL, TRAINING = 150, 200  # anchors
VERSION = 1


def questions(task: str, split: str, data: Path, most: int) -> es.MultipleChoice:
    """The first items of a split, as the tasks of `recipes/tasks` ask them."""
    rows = read(task, data)[split][:most]
    per = "text" if task == "svamp" else "character"  # numbers of other lengths are no longer answers
    return es.MultipleChoice([(_prompt(row), [f" {c}" for c in row["choices"]], row["answer"]) for row in rows], per)


def screened(task: str, data: Path) -> es.MultipleChoice:
    """The items that tell whether the expert leads: validation items, and training items that are no anchors."""
    validation, training = (
        questions(task, "validation", data, SCREENED),
        questions(task, "train", data, TRAINING + SCREENED),
    )
    return es.MultipleChoice([*validation.items, *training.items[TRAINING:]][:SCREENED], validation.per)


def _prompt(row: Line) -> str:
    before = f"{row['context']}\n" if row["context"] else ""
    return f"{before}Question: {row['question']}\nAnswer:"


def anchors(task: str, data: Path) -> list[str]:
    """General texts, and training questions with each of their options; no answer is told."""
    asked = questions(task, "train", data, TRAINING)
    return es.example("general")[:GENERAL] + [f"{prompt}{o}" for prompt, options, _ in asked.items for o in options]


def measure(pair: str, task: str, data: Path, results: Results, folder: Path, most: int) -> None:
    """One task and one pair of models."""
    place = {"version": VERSION, "pair": pair, "task": task}
    expert, target = (model(name) for name in PAIRS[pair])
    screen = results.find(**place, stage="screen")
    if screen is None:
        asked = screened(task, data)
        found = {
            name: [float(x) for x in asked.score(m, [])[0] > 0] for name, m in (("expert", expert), ("target", target))
        }
        screen = results.add(
            {**place, "stage": "screen", "n": len(asked)} | {k: float(np.mean(v)) for k, v in found.items()}
        )
    if screen["expert"] - screen["target"] < LEAD:
        return
    texts, validation = anchors(task, data), questions(task, "validation", data, VALIDATION)
    test = questions(task, "test", data, most)
    cache = folder / f"{pair}-{task}"
    chosen = results.find(**place, stage="chosen")
    if chosen is None:
        live = es.LiveExpert(gate="validation")
        live.fit(expert, target, texts, validation, cache=cache / "every", progress=False)
        made = {"layers": [list(p) for p in live.layers_], "amount": live.amount_, "gate": live.gate_}
        chosen = results.add({**place, "stage": "chosen", **made, **live.info_["validation"]})
    starts = [i for i in range(0, len(test), CHUNK) if results.find(**place, start=i) is None]
    if not starts:
        return
    layers, arms = [(e, t) for e, t in chosen["layers"]], {}
    live = es.LiveExpert()
    for setting, how in SETTINGS.items():
        live = es.LiveExpert(layers=layers, amount=chosen["amount"], **how)
        live.fit(expert, target, texts, cache=cache / "one", progress=False)
        read = live._setting()  # once for the live expert and its controls
        mine = {"live": read, **live_arms(live, texts, cache=cache / "controls", progress=False, setting=read)}
        arms |= {f"{setting}: {name}": arm for name, arm in mine.items()}
    for start in tqdm(starts, desc=f"{pair}, {task}"):
        some = test[start : start + CHUNK]
        if len(some) > 1:
            answers = answered(live, arms, some, progress=False)
            right, heard = [r for _, _, r in some.items], None
            if chosen["gate"] is not None:  # what the gate would have changed is known without asking again
                prompts = [prompt for prompt, _, _ in some.items]
                heard = (live._setting().read.gaps(prompts, prompts) <= chosen["gate"]).tolist()
            results.add({**place, "stage": "test", "start": start, "right": right, "heard": heard, "answers": answers})


def receipts(lines: Sequence[Line]) -> dict[tuple[str, str, str], AnswersReceipt]:
    """By pair, task and setting, of all items that were answered."""
    parts: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        if line["stage"] == "test":
            parts[line["pair"], line["task"]].append(line)
    found = {}
    for key, some in parts.items():
        some = sorted(some, key=lambda line: line["start"])
        answers = {arm: [a for line in some for a in line["answers"][arm]] for arm in some[0]["answers"]}
        right = [r for line in some for r in line["right"]]
        for setting in SETTINGS:
            mine = of_setting(answers, setting)
            found[*key, setting] = AnswersReceipt(mine, right)
            if all(line["heard"] is not None for line in some):
                heard = [on for line in some for on in line["heard"]]
                found[*key, f"{setting}, gated"] = AnswersReceipt(_gated(mine, heard), right)
    return found


def _gated(answers: dict[str, list[int]], heard: Sequence[bool]) -> dict[str, list[int]]:
    """Answers where the unsteered ones stand at every item that a gate leaves unsteered, in live and in its controls."""
    unsteered = answers["unsteered"]
    return {
        name: given
        if name in REFERENCES
        else [own if on else plain for own, plain, on in zip(given, unsteered, heard, strict=True)]
        for name, given in answers.items()
    }


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Every table by its name."""
    screened = [
        [line["pair"], line["task"], str(line["n"]), f"{line['target']:.3f}", f"{line['expert']:.3f}",
         "yes" if line["expert"] - line["target"] >= LEAD else "no"]
        for line in lines
        if line["stage"] == "screen"
    ]  # fmt: skip
    found = {"screen": markdown(["models", "task", "n", "target", "expert", "measured"], screened)}
    body = []
    for (pair, task, setting), made in receipts(lines).items():
        gain = made.comparisons["unsteered"]
        share = "" if made.share is None else "{:.2f} [{:.2f}, {:.2f}]".format(*made.share)
        shown = [f"{made.hits(arm).mean():.3f}" for arm in ("unsteered", "live", "expert alone", "ensemble")]
        least = made.nearest(made.controls)
        worst = made.comparisons[least]
        body.append([
            pair, task, setting, str(len(made.right)), *shown,
            f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}], p = {gain['holm']:.1g}",
            f"{worst['difference']:+.3f}, p = {worst['holm']:.1g} ({least})", share,
            "yes" if made.transferred else "no",
        ])  # fmt: skip
        found[f"{pair} {task}, {setting}"] = f"    {str(made).replace(chr(10), chr(10) + '    ')}"
    found["test"] = markdown(
        ["models", "task", "setting", "n", "unsteered", "live", "expert alone", "ensemble", "live - unsteered",
         "live - the nearest control", "share of the lead", "transferred"], body)  # fmt: skip
    return found
