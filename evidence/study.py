"""The study: one factor at a time from a base setting, every arm at equal KL on held-out items.

    python -m evidence --data FOLDER          # everything; interrupted, the same command goes on
    python -m evidence --slice                # the project's own concept alone, without a data set

Each arm is one line of runs/evidence/results.jsonl, with the effect on every item, so that tables and figures can be drawn
again without a model. No text of a data set is written.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from evidence.arms import base, factors, few, widened
from evidence.cell import Arm, Cell
from evidence.concepts import FACTORED, OPENINGS, REPORTING, Data, concept, generic
from evidence.lines import Line, Lines
from evidence.models import PAIRS, States, model
from expertsteer_nnsight.measure.calibration import either_sign, neutral_tokens
from expertsteer_nnsight.measure.effects import Effect
from expertsteer_nnsight.measure.judge import SentenceJudge
from expertsteer_nnsight.measure.rollouts import completions, rollouts, variety
from expertsteer_nnsight.measure.scoring import likelihoods
from expertsteer_nnsight.states.shards import VERSION as STATES
from expertsteer_nnsight.steering.plan import SteeringPlan, with_total
from expertsteer_nnsight.texts.texts import texts_hash

CHUNK = 40  # plans that share forwards, and whose results are written at once
NULLS = ("permuted", "random")
JUDGE_DRAWS = 4  # random draws that a judge sees
NEW_TOKENS = 24  # of a continuation
OTHERS = {"items": 32, "draws": 5, "anchors": 500}  # at most, for the pairs after the first
START = 0.2  # first strength of a calibration, median residual norms
VERSION = 6  # of what is measured: lines of another one are refused
DOSE = ("strength", "kl_p95", "met", "nll", "nll_unsteered")


@contextmanager
def halves() -> Iterator[None]:
    """Matrix products in bfloat16, where the processor has them; sums, states and fits stay as they are.

    Scoring is nearly all of the study's time, and takes two thirds of it so. Strengths and effects differ by about a hundredth
    from those in float32.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused one is ten times slower then
            yield
    finally:
        matmul.fp32_precision = before


class Results(Lines):
    """Lines of results, of which each is one measurement.

    Args:
        path: of the JSON lines; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.keys = {self.key(line) for line in self.lines}

    def check(self, pair: str, settings: str) -> None:
        """Refuses to mix results of a pair of models that were made with different settings.

        Raises:
            ValueError: there are some that were.
        """
        other = {line.get("settings", "those of an earlier version") for line in self.lines if line["pair"] == pair} - {
            settings
        }
        if other:
            raise ValueError(
                f"{self.path} holds results for {pair} with other settings ({other.pop()}) than these ({settings}): take another "
                "--out."
            )

    @staticmethod
    def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        """What makes a line one measurement."""
        return tuple(line[name] for name in ("pair", "concept", "factor", "level", "who", "draw"))

    def add(self, lines: list[Line]) -> None:
        """Writes lines at once."""
        self.write(lines)
        self.keys |= {self.key(line) for line in lines}


class Measuring:
    """Measures arms of one concept and writes a line for each.

    Args:
        pair: of models, a name in `PAIRS`.
        name: of the concept.
        results: where to; what is there is left out.
        settings: what lines that may be compared have in common.

    Raises:
        ValueError: there are results with other settings.
    """

    def __init__(self, pair: str, name: str, results: Results, settings: str = "") -> None:
        results.check(pair, settings)
        self.results, self.target = results, model(PAIRS[pair][1])
        self.where = {"pair": pair, "concept": name, "settings": settings}
        self.neutral = neutral_tokens(self.target, es.example("sentiment_probe")["neutral_texts"][:8])

    def has(self, factor: str, level: str, who: str, draw: int = 0) -> bool:
        """Whether the line is there."""
        place = {**self.where, "factor": factor, "level": level, "who": who, "draw": draw}
        return Results.key(place) in self.results.keys

    def complete(self, draws: int) -> bool:
        """Whether the base is there with all of its controls."""
        last = [("base", "recommended", "prompted", 0)] + [("base", "recommended", "random", draws - 1)] * (draws > 0)
        return all(self.has(*place) for place in last)

    def was_judged(self, draws: int) -> bool:
        """Whether the continuations of all arms were judged."""
        last = min(draws, JUDGE_DRAWS) - 1
        return self.has("judge", "rollouts", *(("random", last) if last >= 0 else ("text_features", 0)))

    def layers(self) -> list[tuple[int, int]]:
        """The base's layer pairs."""
        for line in self.results.lines:
            where = tuple(line[k] for k in ("pair", "concept", "level", "who"))
            if where == (self.where["pair"], self.where["concept"], "recommended", "expert"):
                return [(e, t) for e, t in line["layers"]]
        raise ValueError(f"There is no base of {self.where['concept']} whose layers factors could take.")

    def arms(self, arms: Iterable[Arm], effect: Effect) -> None:
        """Calibrates and scores arms.

        Args:
            arms: taken one chunk at a time.
            effect: what they are scored with.
        """
        # by what shares forwards, and random plans by themselves
        waiting: dict[tuple[Any, ...], list[Arm]] = defaultdict(list)
        for arm in arms:
            if not self.has(arm.factor, arm.level, arm.who, arm.draw):
                kind = (arm.who == "random", arm.who in NULLS, arm.items, arm.plan.layers)
                waiting[kind].append(arm)
                if len(waiting[kind]) == CHUNK:
                    self._chunk(waiting.pop(kind), effect)
        for some in waiting.values():
            self._chunk(some, effect)

    def _chunk(self, arms: list[Arm], effect: Effect) -> None:
        items = arms[0].items
        effect = effect[:items] if items else effect
        with halves():
            doses = self._doses(arms, 0.1 if arms[0].who in NULLS else 0.03)
            ready = [_at(a.plan, dose) for a, dose in zip(arms, doses, strict=True)]
            unsteered, *scores = effect.score(self.target, [plan for both in ready for plan in both])
        if not items and not self.has("base", "recommended", "unsteered"):
            nothing = Arm("base", "recommended", "unsteered", 0, None)  # type: ignore[arg-type]
            self.results.add([self._line(nothing, unsteered, torch.zeros_like(unsteered))])
        lines = []
        for i, (arm, dose) in enumerate(zip(arms, doses, strict=True)):
            steps = arm.plan.info.get("pairs", [])
            lines.append({
                **self._line(arm, *scores[2 * i : 2 * i + 2]), **dose,
                "layers": [[s["expert_layer"], s["target_layer"]] for s in steps] or [[None, t] for t in arm.plan.layers],
                "r2": [s["held_out_r2"] for s in steps], "auc": [s.get("held_out_auc") for s in steps],
                "cosine": [s.get("native_cosine") for s in steps],
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
        # always the same first try, so that a strength does not depend on what was measured before
        found, _ = either_sign(self.target, [a.plan for a in arms], self.neutral, tolerance=tolerance, start=START)
        places = [slice(2 * i, 2 * i + 2) for i in range(len(arms))]
        return [
            {
                "strength": [round(x, 5) for x in found.strength[mine].tolist()],
                "kl_p95": [round(x, 4) for x in found.kl[mine].tolist()], "met": bool(found.met[mine].all()),
                "nll": [round(x, 4) for x in found.nll[mine].tolist()], "nll_unsteered": round(found.unsteered_nll, 4),
            }
            for mine in places
        ]  # fmt: skip

    def _line(self, arm: Arm, up: Tensor, down: Tensor) -> Line:
        return {
            **self.where, "factor": arm.factor, "level": arm.level, "who": arm.who, "draw": arm.draw, "n": len(up),
            "effect": float((up - down).mean()), "items": [round(x, 5) for x in (up - down).tolist()],
            "up": [round(x, 5) for x in up.tolist()],  # steered towards; unsteered is an arm by itself
            # share of the items on whose positive side the model is, steered towards and away
            "agrees": [round(float((x > 0).double().mean()), 4) for x in (up, down)],
        }  # fmt: skip

    def prompted(self, effect: es.Choices, instruction: tuple[str, str]) -> None:
        """An instruction in place of a plan; its KL is not bounded."""
        if not self.has("base", "recommended", "prompted"):
            up, down = (effect.instructed(text).score(self.target, [])[0] for text in instruction)
            nothing = Arm("base", "recommended", "prompted", 0, None)  # type: ignore[arg-type]
            self.results.add([self._line(nothing, up, down)])

    def judged(self, arms: list[Arm], judge: Any, openings: list[str], instruction: tuple[str, str]) -> None:
        """What a judge makes of continuations, of an instruction and steered at the strengths that were found for `arms`."""
        known = {Results.key(line): line for line in self.results.lines if "strength" in line}

        def seen(arm: Arm, both: list[list[str]], plans: list[Any], met: bool = True) -> None:
            if not self.has("judge", "rollouts", arm.who, arm.draw):
                found = [self._continued(*each, judge) for each in zip(both, plans, strict=True)]
                line = self._line(replace(arm, factor="judge", level="rollouts"), *(score for score, _ in found))
                costs = {name: [cost[name] for _, cost in found] for name in ("rollout_nll", "repetition")}
                self.results.add([{**line, **costs, "met": met, "judge_accuracy": judge.accuracy_}])

        nothing = Arm("base", "recommended", "prompted", 0, None)  # type: ignore[arg-type]
        seen(nothing, [[f"{text}\n\n{o}" for o in openings] for text in instruction], [None, None])
        for arm in arms:
            place = {**self.where, "factor": arm.factor, "level": arm.level, "who": arm.who, "draw": arm.draw}
            dose = known[Results.key(place)]
            seen(arm, [openings] * 2, _at(arm.plan, dose), dose["met"])

    def _continued(self, openings: list[str], plan: Any, judge: Any) -> tuple[Tensor, dict[str, float]]:
        """The judge's score of every continuation, and how unlikely (to the unsteered model) and repetitive they are."""
        made = rollouts(self.target, openings, plan, NEW_TOKENS)
        score = torch.as_tensor(judge(completions(self.target, made)))
        new = sum(len(text.ids) - text.prompt for text in made)
        nll = -float(likelihoods(self.target, [], made)[0].sum()) / new
        return score, {"rollout_nll": round(nll, 4), "repetition": round(variety(made)["repetition"], 4)}


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
    anchors: int = 0,
    draws: int = 10,
    own: bool = False,
    items: int | None = None,
) -> Results:
    """Runs what is missing. The first pair gets every factor, the others the base with its controls on the reporting concepts.

    An uninterrupted run gives the same numbers again. One that goes on calibrates what is left in other company: those
    strengths may differ within the tolerance of 3 % of the KL, 10 % for the permuted and random arms.

    Args:
        data: the data sets.
        out: folder of results and states.
        pairs: names in `PAIRS`.
        concepts: names of concepts.
        vary: vary factors on the first pair, for the concepts in `FACTORED`.
        anchors: how many generic texts of the data sets, beside the project's own.
        draws: of the permuted and random arms.
        own: take the first `anchors` of the project's own generic texts, which need no data set.
        items: score the first so many of the test items; all of them if None.
    """
    results, states = Results(out / "results.jsonl"), States(out / f"states-{STATES}")
    general, first = es.example("general"), next(iter(PAIRS))
    # every base first, then the factors: if time runs out, the least is left
    work = [(pair, name, "base") for pair in pairs for name in concepts if pair == first or name in REPORTING]
    if first in pairs:
        work += [(first, name, "factors") for name in concepts if name in FACTORED and vary]
        work += [(first, name, "judge") for name in concepts if name in OPENINGS]
    with tqdm(work, desc="study", unit="cell") as bar:
        for pair, name, stage in bar:
            started = time.time()
            bar.set_postfix_str(f"{pair}, {name}, {stage}")
            scored, nulls, many = (items, draws, anchors) if pair == first else _fewer(items, draws, anchors)
            texts = general[: many or None] if own else [*general, *(generic(data, many) if many else [])]
            cell = Cell(pair, concept(name, data), texts, states)
            settings = (
                f"version {VERSION}, anchors {texts_hash(texts)[:8]}, {'all' if scored is None else scored} items"
            )
            measuring, effect = Measuring(pair, name, results, settings), es.Choices(cell.concept.test[:scored])
            if stage == "factors":
                measuring.arms(factors(cell, measuring.layers(), measuring.neutral, measuring.has), effect)
            elif stage == "judge" and not measuring.was_judged(draws):
                arms, _ = base(cell, min(draws, JUDGE_DRAWS))
                judge = SentenceJudge().fit(cell.texts, cell.labels, cell.groups)
                seen = [arm for arm in arms if arm.who != "permuted"]
                measuring.judged(seen, judge, OPENINGS[name][:items], cell.concept.instruction)
            elif stage == "base" and not measuring.complete(nulls):
                measuring.arms(base(cell, nulls)[0], effect)
                measuring.prompted(effect, cell.concept.instruction)
            if stage == "base" and not own:
                measuring.arms(few(cell, measuring.has), effect)
            if stage == "base" and pair == first and vary and not own:
                measuring.arms(widened(cell, measuring.has), effect)
            bar.write(f"{pair}, {name}, {stage}: {time.time() - started:.0f} s")
    return results


def _fewer(items: int | None, draws: int, anchors: int) -> tuple[int, int, int]:
    """For the pairs after the first."""
    return min(items or OTHERS["items"], OTHERS["items"]), min(draws, OTHERS["draws"]), min(anchors, OTHERS["anchors"])
