"""Free answers: the questions of a task without their options, where the logits of two tokenizers could not be averaged.

An answer counts as right if its first line names the right option and none of the others. Layers and amount are those that the
choice task chose on its validation items.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import expertsteer_nnsight as es
from evidence.live.choices import VERSION as CHOICES
from evidence.live.choices import anchors, questions
from evidence.live.results import Line, Results, of_setting
from evidence.models import PAIRS, model
from evidence.report import markdown
from expertsteer_nnsight.fit.live_controls import live_arms
from expertsteer_nnsight.measure.answers import AnswersReceipt
from expertsteer_nnsight.measure.rollouts import completions, rollouts

TASKS = ("arc_easy", "svamp")
TEST, NEW_TOKENS = 300, 16
SETTINGS: dict[str, dict[str, Any]] = {"the prompt": {}, "and what is written": {"follow": True}}
VERSION = 1


def named(answer: str, options: Sequence[str]) -> list[int]:
    """Which options the first line of an answer names, as whole words."""

    def words(text: str) -> str:
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|[^\W\d_]+", text.lower())
        told = [str(float(w.replace(",", ""))) if w[-1].isdigit() or w[-1] == "," else w for w in found]
        return f" {' '.join(told)} "

    line = words(next((line for line in answer.splitlines() if line.strip()), ""))
    found = [i for i, option in enumerate(options) if words(option).strip() and words(option) in line]
    # an option within another one that is named too is not meant
    return [i for i in found if not any(i != j and words(options[i]) in words(options[j]) for j in found)]


def measure(pair: str, task: str, data: Path, results: Results, folder: Path) -> None:
    """One line with which answers are right, by arm."""
    place = {"version": VERSION, "pair": pair, "task": task, "stage": "generation"}
    chosen = results.find(version=CHOICES, pair=pair, task=task, stage="chosen")
    if chosen is None or results.find(**place) is not None:
        return
    expert, target = (model(name) for name in PAIRS[pair])
    texts, test = anchors(task, data), questions(task, "test", data, TEST)
    prompts, cache = [prompt for prompt, _, _ in test.items], folder / f"{pair}-{task}"
    arms: dict[str, Any] = {}
    for setting, how in SETTINGS.items():
        live = es.LiveExpert(layers=[(e, t) for e, t in chosen["layers"]], amount=chosen["amount"], **how)
        live.fit(expert, target, texts, cache=cache / "one", progress=False)
        others = live_arms(live, texts, untrained=1, cache=cache / "controls", progress=False)
        wanted = {name: arm for name, arm in others.items() if name != "mean" or not live.follow}
        arms |= {f"{setting}: {name}": arm for name, arm in {"live": live, **wanted}.items()}
    said = {name: completions(who, rollouts(who, prompts, None, NEW_TOKENS))
            for name, who in (("unsteered", target), ("expert alone", expert))}  # fmt: skip
    said |= {name: arm.generate(prompts, NEW_TOKENS) for name, arm in arms.items()}
    right = {
        name: [
            int(named(answer, options) == [best]) for answer, (_, options, best) in zip(mine, test.items, strict=True)
        ]
        for name, mine in said.items()
    }
    results.add({**place, "n": len(prompts), "right": right})


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Shares of right answers, and live against the other arms."""
    body = []
    for line in (line for line in lines if line.get("stage") == "generation"):
        for setting in SETTINGS:
            mine = of_setting(line["right"], setting)
            receipt = AnswersReceipt(mine, [1] * line["n"])
            gain = receipt.comparisons["unsteered"]
            least = receipt.nearest(receipt.controls)
            body.append([
                line["pair"], line["task"], setting, str(line["n"]),
                *(f"{np.mean(mine[name]):.3f}" for name in ("unsteered", "live", "expert alone")),
                f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}], p = {gain['holm']:.1g}",
                f"{receipt.comparisons[least]['difference']:+.3f}, p = {receipt.comparisons[least]['holm']:.1g} ({least})",
            ])  # fmt: skip
    header = ["models", "task", "the expert reads", "n", "unsteered", "live", "expert alone", "live - unsteered",
              "live - the nearest control"]  # fmt: skip
    return {"generation": markdown(header, body)}
