"""The study: one factor at a time from a base setting, every arm at equal KL on held-out items.

    python -m evidence --data FOLDER          # everything; interrupted, the same command goes on
    python -m evidence --slice                # the project's own concept alone, without a data set

Each arm is one line of runs/evidence/results.jsonl, with the effect on every item, so that tables and figures can be drawn
again without a model. No text of a data set is written.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from evidence.arms import base, factors
from evidence.cell import Arm, Cell
from evidence.concepts import OPENINGS, Data, concept, generic
from evidence.models import PAIRS, States, model
from expertsteer_nnsight.calibration import either_sign, neutral_tokens, with_total
from expertsteer_nnsight.effects import Effect
from expertsteer_nnsight.judge import SentenceJudge
from expertsteer_nnsight.steering import SteeringPlan

CHUNK = 16  # plans whose results are written at once
NULLS = ("permuted", "random")
JUDGE_DRAWS = 4  # random draws that a judge sees
DOSE = ("strength", "kl_p95", "met", "nll")
Line = dict[str, Any]


class Results:
    """Lines of results; what is there is not measured again.

    Args:
        path: of the JSON lines; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines: list[Line] = [json.loads(line) for line in lines if line.endswith("}")]
        self.keys = {self.key(line) for line in self.lines}

    @staticmethod
    def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        """What makes a line one measurement."""
        return tuple(line[name] for name in ("pair", "concept", "factor", "level", "who", "draw"))

    def add(self, lines: list[Line]) -> None:
        """Writes lines at once."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.lines += lines
        self.keys |= {self.key(line) for line in lines}


class Measuring:
    """Measures arms of one cell and writes a line for each.

    Args:
        cell: models and concept.
        results: where to; what is there is left out.
    """

    def __init__(self, cell: Cell, results: Results) -> None:
        self.results, self.target = results, model(cell.target)
        self.where = {"pair": cell.pair, "concept": cell.concept.name}
        self.neutral = neutral_tokens(self.target, es.example("sentiment_probe")["neutral_texts"][:8])
        self.start: dict[int, float] = {}  # the first strength tried, by the number of layers: what others needed

    def has(self, factor: str, level: str, who: str, draw: int = 0) -> bool:
        """Whether the line is there."""
        place = {**self.where, "factor": factor, "level": level, "who": who, "draw": draw}
        return Results.key(place) in self.results.keys

    def complete(self, draws: int, judged: bool) -> bool:
        """Whether the base is there with all of its controls."""
        last = [("base", "recommended", "prompted", 0), ("base", "recommended", "random", draws - 1)]
        last += [("judge", "rollouts", "random", min(draws, JUDGE_DRAWS) - 1)] if judged else []
        return all(self.has(*place) for place in last if place[3] >= 0)

    def arms(self, arms: Iterable[Arm], effect: Effect) -> None:
        """Calibrates and scores arms.

        Args:
            arms: taken one chunk at a time.
            effect: what they are scored with.
        """
        missing = [a for a in arms if not self.has(a.factor, a.level, a.who, a.draw)]

        def kind(arm: Arm) -> tuple[Any, ...]:  # what shares forwards, and random plans by themselves
            return arm.who == "random", arm.who in NULLS, arm.items or 0, arm.plan.layers

        for (_, null, items, _), group in groupby(sorted(missing, key=kind), kind):
            mine = list(group)
            for at in range(0, len(mine), CHUNK):
                self._chunk(mine[at : at + CHUNK], effect[:items] if items else effect, 0.1 if null else 0.03)

    def _chunk(self, arms: list[Arm], effect: Effect, tolerance: float) -> None:
        doses = self._doses(arms, tolerance)
        ready = [_at(a.plan, dose) for a, dose in zip(arms, doses, strict=True)]
        scores = effect.score(self.target, [plan for both in ready for plan in both])[1:]
        lines = []
        for i, (arm, dose) in enumerate(zip(arms, doses, strict=True)):
            steps = arm.plan.info.get("pairs", [])
            lines.append({
                **self._line(arm, *scores[2 * i : 2 * i + 2]), **dose,
                "layers": [[s["expert_layer"], s["target_layer"]] for s in steps] or [[None, t] for t in arm.plan.layers],
                "r2": [s["held_out_r2"] for s in steps], "auc": [s.get("held_out_auc") for s in steps],
            })  # fmt: skip
        self.results.add(lines)

    def _doses(self, arms: list[Arm], tolerance: float) -> list[Line]:
        """Strength, KL, whether it meets the budget, and NLL of each arm, towards and away."""
        # random plans at the same layers are the same whatever the concept
        layers = list(arms[0].plan.layers)
        known = {
            line["draw"]: {k: line[k] for k in DOSE}
            for line in self.results.lines
            if (line["pair"], line["who"]) == (self.where["pair"], "random")
            and [t for _, t in line.get("layers", [])] == layers
        }
        if all(a.who == "random" and a.draw in known for a in arms):
            return [known[a.draw] for a in arms]
        plans, start = [a.plan for a in arms], self.start.get(len(layers), 0.3)
        found, _ = either_sign(self.target, plans, self.neutral, tolerance=tolerance, start=start)
        self.start[len(layers)] = statistics.median(found.strength.tolist())
        places = [slice(2 * i, 2 * i + 2) for i in range(len(arms))]
        return [
            {
                "strength": [round(x, 5) for x in found.strength[mine].tolist()],
                "kl_p95": [round(x, 4) for x in found.kl[mine].tolist()], "met": bool(found.met[mine].all()),
                "nll": [round(x, 4) for x in found.nll[mine].tolist()],
            }
            for mine in places
        ]  # fmt: skip

    def _line(self, arm: Arm, up: Tensor, down: Tensor) -> Line:
        return {
            **self.where, "factor": arm.factor, "level": arm.level, "who": arm.who, "draw": arm.draw, "n": len(up),
            "effect": float((up - down).mean()), "items": [round(x, 5) for x in (up - down).tolist()],
            # share of the items on whose positive side the model is, steered towards and away
            "agrees": [round(float((x > 0).double().mean()), 4) for x in (up, down)],
        }  # fmt: skip

    def prompted(self, effect: es.Choices, instruction: tuple[str, str]) -> None:
        """An instruction in place of a plan; its KL is not bounded."""
        if not self.has("base", "recommended", "prompted"):
            up, down = (effect.instructed(text).score(self.target, [])[0] for text in instruction)
            nothing = Arm("base", "recommended", "prompted", 0, None)  # type: ignore[arg-type]
            self.results.add([self._line(nothing, up, down)])

    def judged(self, arms: list[Arm], judge: Any, openings: list[str]) -> None:
        """What a judge makes of continuations steered at the strengths that were found for `arms`."""
        effect = es.Judged(openings, judge)
        key = [
            Results.key({**self.where, "factor": a.factor, "level": a.level, "who": a.who, "draw": a.draw})
            for a in arms
        ]
        known = {Results.key(line): line for line in self.results.lines if "strength" in line}
        for arm, place in zip(arms, key, strict=True):
            if not self.has("judge", "rollouts", arm.who, arm.draw):
                up, down = effect.score(self.target, _at(arm.plan, known[place]))[1:]
                self.results.add([self._line(Arm("judge", "rollouts", arm.who, arm.draw, arm.plan), up, down)])


def _at(plan: SteeringPlan, dose: Line) -> list[SteeringPlan]:
    """A plan towards and away, at the strengths of a line."""
    return [with_total(sign * plan, x) for sign, x in zip((1.0, -1.0), dose["strength"], strict=True)]


def run(
    data: Data,
    out: Path,
    pairs: list[str],
    concepts: list[str],
    *,
    vary: bool = True,
    anchors: int = 2000,
    draws: int = 10,
    own: bool = False,
    items: int | None = None,
) -> Results:
    """Runs what is missing. The first pair gets every factor, the others the base with its controls.

    Args:
        data: the data sets.
        out: folder of results and states.
        pairs: names in `PAIRS`.
        concepts: names of concepts.
        vary: vary factors on the first pair.
        anchors: how many generic texts of the data sets, beside the project's own.
        draws: of the permuted and random arms.
        own: take the project's own generic texts alone, the first `anchors` of them, which need no data set.
        items: score the first so many of the test items; all of them if None.
    """
    results, states = Results(out / "results.jsonl"), States(out / "states")
    general = es.example("general")
    texts = general[:anchors] if own else [*general, *generic(data, anchors)]
    first = next(iter(PAIRS))
    # every base first: if time runs out, factors are what is left
    work = [(pair, name, False) for pair in pairs for name in concepts]
    work += [(first, name, True) for name in concepts] if vary and first in pairs else []
    with tqdm(work, desc="study", unit="cell") as bar:
        for pair, name, varied in bar:
            started = time.time()
            bar.set_postfix_str(f"{pair}, {name}{', factors' if varied else ''}")
            cell = Cell(pair, concept(name, data), texts, states)
            measuring, effect = Measuring(cell, results), es.Choices(cell.concept.test[:items])
            if varied:
                done = [line for line in results.lines if (line["pair"], line["concept"]) == (pair, name)]
                layers = next(line["layers"] for line in done if line["who"] == "expert" and line["factor"] == "base")
                measuring.arms(factors(cell, [(e, t) for e, t in layers], measuring.neutral, measuring.has), effect)
            elif not measuring.complete(draws, name in OPENINGS and items is None):
                arms, _ = base(cell, draws)
                measuring.arms(arms, effect)
                measuring.prompted(effect, cell.concept.instruction)
                if name in OPENINGS and items is None:
                    judge = SentenceJudge().fit(cell.texts, cell.labels, cell.groups)
                    seen = [a for a in arms if a.who != "permuted" and (a.who != "random" or a.draw < JUDGE_DRAWS)]
                    measuring.judged(seen, judge, OPENINGS[name])
            bar.write(f"{pair}, {name}{', factors' if varied else ''}: {time.time() - started:.0f} s")
    return results
