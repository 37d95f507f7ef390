"""How much of an expert's knowledge a live expert passes on: choice tasks, with all of its controls.

    python -m evidence.live --data FOLDER                                   # goes on where it stopped
    python -m evidence.live --redraw --publish docs/live_evidence.md        # the page again, without a model

For every task where the expert leads on validation items: the maps are fitted on general texts and on training questions with all
of their options, right and wrong alike; layers and amount are chosen on validation items; two settings that are declared here (the
last prompt token alone, and with the options) answer the test items once. A line holds the answers of all arms to some items.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from evidence.models import PAIRS, model
from evidence.report import filled_with, markdown
from expertsteer_nnsight.fit.live_controls import answered, live_arms
from expertsteer_nnsight.measure.answers import AnswersReceipt
from recipes.domain_tables import read_lines
from recipes.tasks.readers import read

TASKS = ("arc_easy", "arc_challenge", "openbookqa", "piqa", "social_i_qa", "medmcqa", "medqa", "svamp", "mmlu_general",
         "mmlu_medical", "mmlu_financial", "mmlu_mathematics")  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"last prompt token": {}, "and options": {"follow": True}}
LEAD = 0.03  # accuracy on the screened items that an expert must be ahead by
SCREENED, VALIDATION, TEST, CHUNK = 600, 150, 1000, 50
GENERAL, TRAINING = 150, 200  # anchors
VERSION = 1
Line = dict[str, Any]


class Results:
    """Lines of results; what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[Line] = read_lines(path)

    def find(self, **place: Any) -> Line | None:
        """The line of a place."""
        return next((line for line in self.lines if place.items() <= line.items()), None)

    def add(self, line: Line) -> Line:
        """Writes a line at once."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


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


def run(data: Path, out: Path, pairs: Sequence[str], tasks: Sequence[str], most: int = TEST) -> list[Line]:
    """Measures what is missing; the lines."""
    results = Results(out / "live.jsonl")
    for pair in pairs:
        for task in tasks:
            measure(pair, task, data, results, out / "live_states", most)
    return results.lines


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
        live = es.LiveExpert().fit(expert, target, texts, validation, cache=cache / "every", progress=False)
        chosen = results.add({**place, "stage": "chosen", "layers": [list(p) for p in live.layers_], "amount": live.amount_,
                              **live.info_["validation"]})  # fmt: skip
    starts = [i for i in range(0, len(test), CHUNK) if results.find(**place, start=i) is None]
    if not starts:
        return
    layers, arms = [(e, t) for e, t in chosen["layers"]], {}
    live = es.LiveExpert()
    for setting, how in SETTINGS.items():
        live = es.LiveExpert(layers=layers, amount=chosen["amount"], **how)
        live.fit(expert, target, texts, cache=cache / "one", progress=False)
        mine = {"live": live, **live_arms(live, texts, cache=cache / "controls", progress=False)}
        arms |= {f"{setting}: {name}": arm for name, arm in mine.items()}
    for start in tqdm(starts, desc=f"{pair}, {task}"):
        some = test[start : start + CHUNK]
        if len(some) > 1:
            answers = answered(live, arms, some, progress=False)
            right = [r for _, _, r in some.items]
            results.add({**place, "stage": "test", "start": start, "right": right, "answers": answers})


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
            mine = {name.removeprefix(f"{setting}: "): given for name, given in answers.items()}
            found[*key, setting] = AnswersReceipt({k: v for k, v in mine.items() if ": " not in k}, right)
    return found


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
        least = max(made.controls, key=lambda arm: made.comparisons[arm]["holm"])
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the question sets")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="results and activations (%(default)s)")
    parser.add_argument("--pairs", nargs="*", choices=list(PAIRS), default=list(PAIRS), help="models")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=int, default=TEST, help="test items of a task, at most (%(default)s)")
    parser.add_argument(
        "--publish", type=Path, metavar="PAGE", help="write the tables into a page, and the lines beside it"
    )
    parser.add_argument("--redraw", action="store_true", help="measure nothing, take the results that are there")
    args = parser.parse_args(argv)
    if not args.redraw and args.data is None:
        parser.error("--data is missing: name the folder of the question sets.")
    lines = (
        Results(args.out / "live.jsonl").lines
        if args.redraw
        else run(args.data, args.out, args.pairs, args.tasks, args.limit)
    )
    made = tables(lines)
    print("\n\n".join(f"{name}\n\n{text}" for name, text in made.items()))
    if args.publish:
        page = filled_with(args.publish.read_text(), made)
        folder = args.publish.with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / "live.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        args.publish.write_text(page)


if __name__ == "__main__":
    main()
