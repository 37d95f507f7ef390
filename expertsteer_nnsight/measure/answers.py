"""Answers to questions under several arms: accuracies on the same items, their differences, and what a live expert passed on.

Two arms are compared by McNemar's exact test (Psychometrika 12:153, 1947) on the items that only one of them answers rightly, with
Holm's correction (Scandinavian Journal of Statistics 6:65, 1979) over all comparisons of a receipt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..files import library_versions, whole_file
from .receipts import interval

REFERENCES = ("expert alone", "ensemble", "told the expert's answer")  # which a live expert need not exceed
EVERY_PROMPT = "every prompt by "  # so begin the names of the experts of a `SurestExpert` without a choice among them
LEVEL, RESAMPLES = 0.05, 2000
Right = Sequence[bool] | Sequence[int] | np.ndarray


def compared(arm: Right, other: Right) -> dict[str, Any]:
    """Two arms on the same items.

    Returns:
        `difference` of their accuracies with `low` and `high` (95 %, paired bootstrap), `gained` and `lost` (items that only the
        one or only the other answers rightly), and McNemar's exact `p`, two-sided.
    """
    from scipy.stats import binomtest

    a, b = np.array(arm, dtype=float), np.array(other, dtype=float)
    gained, lost = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    difference, low, high = interval(a - b)
    return {"difference": difference, "low": low, "high": high, "gained": gained, "lost": lost, "p": float(p)}


def holm(p: Sequence[float]) -> list[float]:
    """P values after Holm's correction, in their order."""
    worst, corrected = 0.0, [0.0] * len(p)
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, p[i] * (len(p) - place)))
        corrected[i] = worst
    return corrected


@dataclass(frozen=True, eq=False)
class AnswersReceipt:
    """What a live expert and its controls do to a target's answers; print it for the table.

    Attributes:
        answers: by arm, the number of the option that each item is answered with. `unsteered` and `live` are among them; a control
            of several draws has a name with a number for each.
        right: the number of each item's right option.
        unit: of what the options were compared by.
        notes: what a reader has to know.
    """

    answers: Mapping[str, Sequence[int]]
    right: Sequence[int]
    unit: str = ""
    notes: Sequence[str] = ()
    _found: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        missing = [name for name in ("unsteered", "live") if name not in self.answers]
        if missing:
            raise ValueError(f"A receipt of answers needs the arms unsteered and live, but there is no {missing[0]}.")
        wrong = [name for name, mine in self.answers.items() if len(mine) != len(self.right)]
        if wrong:
            raise ValueError(
                f"The arm {wrong[0]} has {len(self.answers[wrong[0]])} answers to {len(self.right)} questions."
            )

    def hits(self, arm: str) -> np.ndarray:
        """Which items an arm answers rightly, `[item]`, 1 and 0."""
        return (np.array(self.answers[arm]) == np.array(self.right)).astype(float)

    @property
    def controls(self) -> list[str]:
        """The arms that a live expert must exceed, besides the unsteered one."""
        besides = ("unsteered", "live", *REFERENCES)
        return [name for name in self.answers if name not in besides and not name.startswith(EVERY_PROMPT)]

    @property
    def comparisons(self) -> dict[str, dict[str, Any]]:
        """Live less each other arm (`compared`); those with `unsteered` and the controls have `holm`, their corrected p."""
        if not self._found:
            mine = self.hits("live")
            self._found.update({name: compared(mine, self.hits(name)) for name in self.answers if name != "live"})
            tested = ["unsteered", *self.controls]
            for name, p in zip(tested, holm([self._found[name]["p"] for name in tested]), strict=True):
                self._found[name]["holm"] = p
        return self._found

    def nearest(self, arms: Sequence[str]) -> str:
        """The one of some arms that live is least shown to exceed: the one that exceeds live most clearly, or else by Holm's p."""

        def ahead(name: str) -> tuple[float, float]:
            found = self.comparisons[name]
            return 2 - found["holm"] if found["difference"] < 0 else found["holm"], -found["difference"]

        return max(arms, key=ahead)

    @property
    def share(self) -> tuple[float, float, float] | None:
        """(live - unsteered) / (expert alone - unsteered) with its 95 % interval (bootstrap).

        None unless the expert leads in all resamples: a ratio would mean nothing.
        """
        if "expert alone" not in self.answers:
            return None
        base = self.hits("unsteered")
        gain, lead = self.hits("live") - base, self.hits("expert alone") - base
        rows = np.random.default_rng(0).integers(len(base), size=(RESAMPLES, len(base)))
        leads = lead[rows].mean(1)
        if lead.mean() <= 0 or leads.min() <= 0:  # then a ratio means nothing
            return None
        low, high = np.quantile(gain[rows].mean(1) / leads, [0.025, 0.975])
        return float(gain.mean() / lead.mean()), float(low), float(high)

    @property
    def moved(self) -> dict[str, int]:
        """Answers that live changes: how many, and how many of them to and away from the expert's own."""
        before, after = np.array(self.answers["unsteered"]), np.array(self.answers["live"])
        found = {"changed": int((before != after).sum())}
        if "expert alone" in self.answers:
            expert = np.array(self.answers["expert alone"])
            found["to the expert's"] = int(((before != expert) & (after == expert)).sum())
            found["away from it"] = int(((before == expert) & (after != expert)).sum())
        return found

    @property
    def transferred(self) -> bool | None:
        """Whether live exceeds the unsteered target and every control, each with p < 0.05 after Holm; None without controls."""
        if not any(name.startswith("untrained") for name in self.controls) or "another prompt" not in self.controls:
            return None
        tested = [self.comparisons[name] for name in ("unsteered", *self.controls)]
        return all(found["difference"] > 0 and found["holm"] < LEVEL for found in tested)

    @property
    def verdict(self) -> str:
        """In a sentence or two, whether the expert's knowledge reached the target."""
        accuracy, base = (float(self.hits(name).mean()) for name in ("live", "unsteered"))
        gain = self.comparisons["unsteered"]
        told = (
            f"accuracy {accuracy:.3f} with the live expert and {base:.3f} without (n = {len(self.right)}, difference "
            f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}])"
        )
        if self.share is not None:
            value, low, high = self.share
            told += f", {value:.2f} [{low:.2f}, {high:.2f}] of the expert's lead"
        if self.transferred is None:
            said = "no untrained expert or other prompt was measured, so it does not say what the expert contributed"
        elif self.transferred:
            said = "the expert's knowledge of the prompt reached the target"
        else:
            worst = self.nearest(("unsteered", *self.controls))
            found = self.comparisons[worst]
            said = (
                f"no transfer is shown: live less {worst} is {found['difference']:+.3f} [{found['low']:+.3f}, "
                f"{found['high']:+.3f}], p = {found['holm']:.2g}"
            )
        return "; ".join([told, said, *self.notes]) + "."

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        kept = {"answers": {k: list(v) for k, v in self.answers.items()}, "right": list(self.right), "unit": self.unit}
        return {"verdict": self.verdict, **kept, "notes": list(self.notes), "versions": library_versions()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnswersReceipt:
        """What `to_dict` gave.

        Raises:
            KeyError: the values are no receipt's.
        """
        return cls(**{f.name: values[f.name] for f in fields(cls) if not f.name.startswith("_")})

    def save(self, path: str | Path) -> Path:
        """Writes JSON; the file appears whole or not at all."""
        return whole_file(path, lambda to: to.write_text(json.dumps(self.to_dict(), indent=1)))

    @classmethod
    def load(cls, path: str | Path) -> AnswersReceipt:
        """Reads what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def __repr__(self) -> str:
        lines = [f"{'arm':<26}{'accuracy':>9}  {'live less it, 95 %':<26}{'gained':>7}{'lost':>6}{'p':>9}{'Holm':>9}"]
        for name in self.answers:
            line = f"{name:<26}{self.hits(name).mean():>9.3f}"
            if name != "live":
                found = self.comparisons[name]
                between = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
                corrected = f"{found['holm']:.2g}" if "holm" in found else ""
                line += f"  {between:<26}{found['gained']:>7}{found['lost']:>6}{found['p']:>9.2g}{corrected:>9}"
            lines.append(line)
        moved = ", ".join(f"{count} {name}" for name, count in self.moved.items())
        return "\n".join([*lines, f"Answers: {moved}.", self.verdict[0].upper() + self.verdict[1:]])
