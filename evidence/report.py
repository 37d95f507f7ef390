"""Tables and figures of docs/evidence.md, from the lines of results alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence.concepts import REPORTING, TUNING
from expertsteer_nnsight.plotting import figure

RESAMPLES = 2000
Line = Mapping[str, Any]


class Table:
    """Effects `[item]` by (pair, concept, factor, level, who): of several draws their mean, or their own.

    Args:
        lines: of results.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)
        self.draws: dict[tuple[str, ...], list[Line]] = defaultdict(list)
        for line in self.lines:
            self.draws[tuple(line[k] for k in ("pair", "concept", "factor", "level", "who"))].append(line)

    def items(self, *key: str) -> np.ndarray | None:
        """Per-item effects, mean over draws; None where the arm was not measured."""
        found = self.draws.get(key)
        return None if not found else np.mean([line["items"] for line in found], 0)

    def bar(self, *key: str) -> float:
        """95th percentile of |effect| over draws."""
        return float(np.quantile([abs(line["effect"]) for line in self.draws[key]], 0.95))

    def levels(self, pair: str) -> list[tuple[str, str]]:
        """(factor, level) in the order in which they were measured."""
        return list(dict.fromkeys((line["factor"], line["level"]) for line in self.lines if line["pair"] == pair))


def share(
    rows: Sequence[np.ndarray], minus: Sequence[np.ndarray] | None, unit: Sequence[np.ndarray], seed: int = 0
) -> list[float]:
    """Median over concepts of (row - minus) / unit with a 95 % interval: concepts are resampled, and items within each.

    Args:
        rows: effects by item, one array a concept.
        minus: effects that are taken off, or None.
        unit: effects that they are shares of.
        seed: of the resampling.
    """
    pairs = [(a if minus is None else a - minus[i], unit[i]) for i, a in enumerate(rows)]
    value = float(np.median([a.mean() / b.mean() for a, b in pairs]))
    rng, found = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        shares = []
        for i in rng.integers(len(pairs), size=len(pairs)):
            a, b = pairs[i]
            pick = rng.integers(len(a), size=len(a))
            shares.append(a[pick].mean() / b[pick].mean())
        found.append(np.median(shares))
    return [value, float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))]


def one(a: np.ndarray, minus: np.ndarray | None = None, unit: np.ndarray | None = None, seed: int = 0) -> list[float]:
    """Mean over items (of a difference, as a share) with its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    rows = a if minus is None else a - minus

    def value(pick: Any) -> float:
        return float(rows[pick].mean() / (1 if unit is None else unit[pick].mean()))

    found = [value(rng.integers(len(rows), size=len(rows))) for _ in range(RESAMPLES)]
    return [value(slice(None)), float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))]


def told(found: Sequence[float]) -> str:
    """A value with its interval."""
    return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def _rows(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def base_table(table: Table, pair: str, concepts: Sequence[str]) -> str:
    """Every concept's base arms."""
    body = []
    for name in concepts:
        key = (pair, name, "base", "recommended")
        expert, own, untrained = (table.items(*key, who) for who in ("expert", "native", "untrained"))
        if expert is None or own is None or untrained is None:
            continue
        seeds = [line["effect"] for line in table.draws[(*key, "untrained")]]
        features = table.items(*key, "text_features")
        null = [f"{table.bar(*key, who):.2f}" for who in ("permuted", "random")]
        body.append([
            name, str(len(expert)), told(one(own)), told(one(expert)), told(one(expert, None, own)),
            told(one(expert, untrained, own)), ", ".join(f"{e:.2f}" for e in seeds),
            "" if features is None else f"{features.mean():.2f}", *null, f"{np.mean(expert < 0):.0%}",
        ])  # fmt: skip
    return _rows(["concept", "n", "native", "expert", "expert / native", "(expert - untrained) / native", "untrained, each seed",
                  "text features", "permuted p95", "random p95", "expert, wrong way"], body)  # fmt: skip


def gather(
    table: Table, pair: str, concepts: Sequence[str], factor: str, level: str, who: str
) -> dict[str, np.ndarray]:
    """Effects by item of one arm, for the concepts that have it."""
    found = {name: table.items(pair, name, factor, level, who) for name in concepts}
    return {name: items for name, items in found.items() if items is not None}


def medians(table: Table, pair: str, concepts: Sequence[str], factor: str, level: str) -> list[list[float] | None]:
    """Medians over concepts of expert / native, untrained / native, (expert - untrained) / native and own native / native."""
    expert, untrained, own = (
        gather(table, pair, concepts, factor, level, who) for who in ("expert", "untrained", "native")
    )
    unit = gather(table, pair, concepts, "base", "recommended", "native")
    names = [n for n in concepts if n in expert and n in unit]
    if not names:
        return [None] * 4

    def over(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray] | None = None) -> list[float] | None:
        have = [n for n in names if n in a and (b is None or n in b)]
        return (
            share([a[n] for n in have], None if b is None else [b[n] for n in have], [unit[n] for n in have])
            if have
            else None
        )

    return [over(expert), over(untrained), over(expert, untrained), over(own)]


def factor_table(
    table: Table, pair: str, concepts: Sequence[str], keep: Callable[[str], bool] = lambda factor: True
) -> str:
    """A row for each level of each factor: medians over concepts."""
    body = []
    for factor, level in table.levels(pair):
        if keep(factor):
            found = medians(table, pair, concepts, factor, level)
            if found[0] is not None:
                body.append([factor, level, *("" if f is None else told(f) for f in found)])
    return _rows(["factor", "level", "expert", "untrained", "expert - untrained", "native with the same labels"], body)


def beats(table: Table, pair: str, concepts: Sequence[str]) -> list[tuple[str, str, str, list[float]]]:
    """(concept, factor, level, expert - native with the same labels) where the interval lies above zero.

    Not corrected for the number of comparisons: it tells where to look, on the tuning concepts, and what was confirmed, on the
    reporting ones.
    """
    found = []
    for factor, level in table.levels(pair):
        for name in concepts:
            expert = table.items(pair, name, factor, level, "expert")
            own = table.items(pair, name, factor, level, "native")
            own = table.items(pair, name, "base", "recommended", "native") if own is None else own
            if expert is not None and own is not None and len(expert) == len(own):
                gap = one(expert, own)
                if gap[1] > 0:
                    found.append((name, factor, level, gap))
    return found


def draw(table: Table, pair: str, concepts: Sequence[str], path: Path) -> None:
    """Expert, untrained and controls as shares of native, a row for each concept."""
    fig, ax = figure(8, 0.5 * len(concepts) + 1.5)
    marks = {"expert": "o", "untrained": "s", "text_features": "^"}
    for row, name in enumerate(reversed(concepts)):
        key = (pair, name, "base", "recommended")
        unit = table.items(*key, "native")
        if unit is None:
            continue
        for color, (who, mark) in enumerate(marks.items()):
            items = table.items(*key, who)
            if items is not None:
                value, low, high = one(items, None, unit)
                ax.errorbar(value, row + 0.15 * (1 - color), xerr=[[max(0, value - low)], [max(0, high - value)]], fmt=mark, ms=5,
                            capsize=2, color=f"C{color}", label=who if row == 0 else None)  # fmt: skip
        bar = table.bar(*key, "random") / unit.mean()
        ax.plot([-bar, bar], [row - 0.3] * 2, color="0.6", lw=3, label="random, 95 % of |effect|" if row == 0 else None)
    ax.axvline(0, color="0.6", lw=0.8)
    ax.axvline(1, color="0.6", lw=0.8, ls=":")
    ax.set_yticks(range(len(concepts)), labels=[f"{n}{' (tuning)' if n in TUNING else ''}" for n in reversed(concepts)])
    ax.set_xlabel("share of the native effect, at equal KL")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def summary(table: Table) -> str:
    """What `python -m evidence` prints at the end."""
    parts = []
    for pair in dict.fromkeys(line["pair"] for line in table.lines):
        for title, concepts in (("reporting", REPORTING), ("tuning", TUNING)):
            found = medians(table, pair, concepts, "base", "recommended")
            if found[0] is not None:
                parts += [f"{pair}, {title} concepts", base_table(table, pair, concepts),
                          factor_table(table, pair, concepts), ""]  # fmt: skip
    return "\n".join(parts)
