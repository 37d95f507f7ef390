"""Effects by arm, shares of the native effect and their intervals, from the lines of results alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

RESAMPLES = 2000
BASE = ("base", "recommended")
FEW = "with 300 anchors"  # another level of that factor
WIDENED = "with in-domain anchors"  # the same factor's other level
Line = Mapping[str, Any]
Rows = Mapping[str, np.ndarray]  # concept -> effects [draw, item]
Found = tuple[float, np.ndarray]  # a value, and its resamples


class Table:
    """Effects `[draw, item]` by (pair, concept, factor, level, who).

    Args:
        lines: of results; arms that no strength brought to the KL budget are left out, and counted in `unmet`.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        lines = list(lines)
        # a line without a dose (prompted) has nothing to meet
        self.lines = [line for line in lines if line.get("met", True)]
        self.unmet = len(lines) - len(self.lines)
        self.draws: dict[tuple[str, ...], list[Line]] = defaultdict(list)
        for line in self.lines:
            self.draws[tuple(line[k] for k in ("pair", "concept", "factor", "level", "who"))].append(line)

    def items(self, *key: str) -> np.ndarray | None:
        """Effects `[draw, item]`; None where the arm was not measured."""
        found = self.draws.get(key)
        return None if not found else np.array([line["items"] for line in found])

    def null(self, *key: str) -> float:
        """What one more draw stays within 19 times of 20, if draws are normal around 0: t times their root mean square."""
        effects = [line["effect"] for line in self.draws.get(key, [])]
        if not effects:
            return 0.0
        return float(student.ppf(0.975, len(effects)) * np.sqrt(np.mean(np.square(effects))))

    def levels(self, pair: str) -> list[tuple[str, str]]:
        """(factor, level) in the order in which they were measured, factor by factor."""
        found = dict.fromkeys((line["factor"], line["level"]) for line in self.lines if line["pair"] == pair)
        order = list(dict.fromkeys(factor for factor, _ in found))
        return sorted((level for level in found if level[0] != "judge"), key=lambda level: order.index(level[0]))

    def arm(self, pair: str, concepts: Sequence[str], factor: str, level: str, who: str) -> dict[str, np.ndarray]:
        """Effects of one arm, for the concepts that have it."""
        found = {name: self.items(pair, name, factor, level, who) for name in concepts}
        return {name: items for name, items in found.items() if items is not None}

    def steerable(self, pair: str, concepts: Sequence[str]) -> list[str]:
        """Those of the concepts whose native effect exceeds what random directions reach: shares of the others mean nothing."""
        native = self.arm(pair, concepts, *BASE, "native")
        return [n for n in native if native[n].mean() > self.null(pair, n, *BASE, "random")]

    def first(self, concepts: Sequence[str], items: int) -> Table:
        """The first of the items of some concepts."""
        return Table(
            {**line, "items": line["items"][:items], "effect": float(np.mean(line["items"][:items]))}
            for line in self.lines
            if line["concept"] in concepts
        )


def resampled(a: np.ndarray, minus: np.ndarray | None = None, unit: np.ndarray | None = None, seed: int = 0) -> Found:
    """(a - minus) / unit of the means over draws and items, and the same with the items drawn again.

    Args:
        a: effects `[draw, item]`.
        minus: effects of the same items that are taken off.
        unit: effects that they are a share of; of other items if there are more or fewer.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    pick = rng.integers(a.shape[1], size=(RESAMPLES, a.shape[1]))
    gap = a.mean(0) if minus is None else a.mean(0) - minus.mean(0)
    value, found = gap.mean(), gap[pick].mean(1)
    if unit is not None:
        whole = unit.mean(0)
        other = pick if len(whole) == a.shape[1] else rng.integers(len(whole), size=(RESAMPLES, len(whole)))
        value, found = value / whole.mean(), found / whole[other].mean(1)
    return float(value), found


def between(a: np.ndarray, minus: np.ndarray | None = None) -> tuple[float, int]:
    """Squared standard error of the mean of a - minus from the draws, and its degrees of freedom; 0 where there is one draw.

    As many draws on both sides are the same draws (of pairs, flips or anchors), so they are compared one by one.
    """
    sides = [a] if minus is None else [a - minus] if len(a) == len(minus) else [a, minus]
    many = [side.mean(1) for side in sides if len(side) > 1]
    return sum(float(x.var(ddof=1)) / len(x) for x in many), sum(len(x) - 1 for x in many)


def _noise(error: float, freedom: int) -> np.ndarray:
    """What draws add to resamples: Student's, because two or three draws hardly tell how far the next one is."""
    return np.sqrt(error) * np.random.default_rng(1).standard_t(max(freedom, 1), RESAMPLES)


def interval(found: Found) -> list[float]:
    """A value with its 95 % interval."""
    return [found[0], *(float(x) for x in np.quantile(found[1], [0.025, 0.975]))]


def one(a: np.ndarray, minus: np.ndarray | None = None, unit: np.ndarray | None = None) -> list[float]:
    """`resampled` with its 95 % interval, over items and draws."""
    value, found = resampled(a, minus, unit)
    return interval((value, found + _noise(*between(a, minus)) / (1 if unit is None else unit.mean())))


def over(rows: Rows, unit: Rows, minus: Rows | None = None, seed: int = 0) -> list[float] | None:
    """Median over the concepts that all three have of (row - minus) / unit, with a 95 % interval; None if there are none.

    Concepts are drawn again, and items within each. What draws differ by is part of what concepts differ by.
    """
    names = [n for n in rows if n in unit and (minus is None or n in minus)]
    if not names:
        return None
    each = [resampled(rows[n], None if minus is None else minus[n], unit[n], i) for i, n in enumerate(names)]
    pick = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    samples = np.array([found for _, found in each])  # [concept, resample]
    return interval(
        (float(np.median([value for value, _ in each])), np.median(samples[pick.T, np.arange(RESAMPLES)], 0))
    )


def mean_over(rows: Rows, minus: Rows) -> tuple[list[float], float, bool] | None:
    """Mean over concepts of row - minus with its interval, its one-sided p-value, and whether every concept is above 0.

    Items are drawn again, what draws add is pooled over concepts, and concepts are not drawn again, so this is about these
    concepts.
    """
    names = [n for n in rows if n in minus]
    if not names:
        return None
    each = [resampled(rows[n], minus[n], None, i) for i, n in enumerate(names)]
    errors = [between(rows[n], minus[n]) for n in names]
    noise = _noise(sum(error for error, _ in errors) / len(names) ** 2, sum(freedom for _, freedom in errors))
    samples = np.mean([found for _, found in each], 0) + noise
    values = [value for value, _ in each]
    return (
        interval((float(np.mean(values)), samples)),
        float((1 + (samples <= 0).sum()) / (1 + RESAMPLES)),
        min(values) > 0,
    )
