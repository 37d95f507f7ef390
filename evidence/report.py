"""Tables and figures of docs/evidence.md, from the lines of results alone."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence.concepts import REPORTING, TUNING
from expertsteer_nnsight.plotting import figure

RESAMPLES = 2000
BASE = ("base", "recommended")
Line = Mapping[str, Any]
Rows = Mapping[str, np.ndarray]


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

    def null(self, *key: str) -> float:
        """1.96 times the root mean square of the draws' effects: 19 of 20 draws lie within it, if they are normal."""
        return 1.96 * float(np.sqrt(np.mean([line["effect"] ** 2 for line in self.draws[key]])))

    def levels(self, pair: str) -> list[tuple[str, str]]:
        """(factor, level) in the order in which they were measured."""
        found = dict.fromkeys((line["factor"], line["level"]) for line in self.lines if line["pair"] == pair)
        return [level for level in found if level[0] != "judge"]

    def arm(self, pair: str, concepts: Sequence[str], factor: str, level: str, who: str) -> dict[str, np.ndarray]:
        """Effects by item of one arm, for the concepts that have it."""
        found = {name: self.items(pair, name, factor, level, who) for name in concepts}
        return {name: items for name, items in found.items() if items is not None}


def share(
    rows: Sequence[np.ndarray], minus: Sequence[np.ndarray] | None, unit: Sequence[np.ndarray], seed: int = 0
) -> list[float]:
    """Median over concepts of (row - minus) / unit with a 95 % interval: concepts are resampled, and items within each.

    Args:
        rows: effects by item, one array a concept.
        minus: effects that are taken off, or None.
        unit: effects that they are shares of; where there are more items than in `rows`, the first count.
        seed: of the resampling.
    """
    n = [len(a) for a in rows]
    pairs = [(a if minus is None else a - minus[i][: n[i]], unit[i][: n[i]]) for i, a in enumerate(rows)]
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


def over(rows: Rows, unit: Rows, minus: Rows | None = None) -> list[float] | None:
    """`share` over the concepts that all three have; None if there are none."""
    names = [n for n in rows if n in unit and (minus is None or n in minus)]
    if not names:
        return None
    return share(
        [rows[n] for n in names], None if minus is None else [minus[n] for n in names], [unit[n] for n in names]
    )


def one(a: np.ndarray, minus: np.ndarray | None = None, unit: np.ndarray | None = None, seed: int = 0) -> list[float]:
    """Mean over items (of a difference, as a share) with its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    rows = a if minus is None else a - minus

    def value(pick: Any) -> float:
        return float(rows[pick].mean() / (1 if unit is None else unit[pick].mean()))

    found = [value(rng.integers(len(rows), size=len(rows))) for _ in range(RESAMPLES)]
    return [value(slice(None)), float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))]


def told(found: Sequence[float] | None) -> str:
    """A value with its interval."""
    return "" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def _rows(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def base_table(table: Table, pair: str, concepts: Sequence[str]) -> str:
    """Every concept's base arms, and the medians of the shares."""
    body = []
    for name in concepts:
        key = (pair, name, *BASE)
        expert, own, untrained = (table.items(*key, who) for who in ("expert", "native", "untrained"))
        if expert is None or own is None or untrained is None:
            continue
        seeds = [line["effect"] for line in table.draws[(*key, "untrained")]]
        other = [table.items(*key, who) for who in ("text_features", "prompted")]
        body.append([
            name, str(len(expert)), told(one(own)), told(one(expert)), told(one(expert, None, own)),
            told(one(expert, untrained, own)), ", ".join(f"{e:.2f}" for e in seeds),
            *("" if found is None else f"{found.mean():.2f}" for found in other),
            *(f"{table.null(*key, who):.2f}" for who in ("permuted", "random")), f"{np.mean(expert < 0):.0%}",
        ])  # fmt: skip
    found = medians(table, pair, concepts, *BASE)
    body.append(["**median**", "", "", "", told(found["expert"]), told(found["beyond"]), *[""] * 6])
    return _rows(["concept", "n", "native", "expert", "expert / native", "(expert - untrained) / native", "untrained, each seed",
                  "text features", "prompted", "permuted", "random", "wrong way"], body)  # fmt: skip


def medians(table: Table, pair: str, concepts: Sequence[str], factor: str, level: str) -> dict[str, list[float] | None]:
    """Medians over concepts, as shares of the base's native effect.

    Returns:
        expert, untrained, beyond (expert - untrained), own (native with the same labels and layers) and ahead (expert - own).
    """
    expert, untrained, own = (
        table.arm(pair, concepts, factor, level, who) for who in ("expert", "untrained", "native")
    )
    unit = table.arm(pair, concepts, *BASE, "native")
    return {
        "expert": over(expert, unit),
        "untrained": over(untrained, unit),
        "beyond": over(expert, unit, untrained),
        "own": over(own, unit),
        "ahead": over(expert, unit, own if own else unit),
    }


def factor_table(table: Table, pair: str, concepts: Sequence[str]) -> str:
    """A row for each level of each factor: medians over concepts."""
    body = []
    for factor, level in table.levels(pair):
        found = medians(table, pair, concepts, factor, level)
        if found["expert"] is not None:
            body.append([factor, level, *map(told, found.values())])
    header = [
        "factor",
        "level",
        "expert",
        "untrained",
        "expert - untrained",
        "native likewise",
        "expert - native likewise",
    ]
    return _rows(header, body)


def ahead(table: Table, pair: str) -> list[tuple[str, str, list[float], list[float] | None]]:
    """Levels at which the expert exceeds native (with the same labels and layers) on the tuning concepts.

    Returns:
        (factor, level, share on the tuning concepts, share on the reporting concepts): medians of (expert - native) / native
        of the base. An interval above zero in the first makes a candidate, one in the second confirms it.
    """
    found = []
    for factor, level in table.levels(pair):
        first, second = (medians(table, pair, concepts, factor, level)["ahead"] for concepts in (TUNING, REPORTING))
        if first is not None and first[1] > 0:
            found.append((factor, level, first, second))
    return found


def ahead_table(table: Table, pair: str) -> str:
    """`ahead` as a table, or a sentence."""
    body = [[factor, level, told(first), told(second)] for factor, level, first, second in ahead(table, pair)]
    if not body:
        return "None: at no level does the interval over the tuning concepts lie above zero."
    return _rows(["factor", "level", "tuning", "reporting"], body)


def judge_table(table: Table, pair: str, concepts: Sequence[str]) -> str:
    """What the sentence judge makes of steered continuations."""
    body = []
    for name in concepts:
        arms = {who: table.items(pair, name, "judge", "rollouts", who) for who in ("native", "expert", "untrained")}
        if arms["expert"] is not None:
            random = table.null(pair, name, "judge", "rollouts", "random")
            body.append(
                [
                    name,
                    str(len(arms["expert"])),
                    *("" if a is None else told(one(a)) for a in arms.values()),
                    f"{random:.2f}",
                ]
            )
    return _rows(["concept", "n", "native", "expert", "untrained", "random"], body)


def draw(table: Table, pair: str, concepts: Sequence[str], path: Path) -> None:
    """Expert, untrained and controls as shares of native, a row for each concept."""
    fig, ax = figure(8, 0.5 * len(concepts) + 1.5)
    marks = {"expert": "o", "untrained": "s", "text_features": "^"}
    concepts = [name for name in concepts if table.items(pair, name, *BASE, "native") is not None]
    for row, name in enumerate(reversed(concepts)):
        key = (pair, name, *BASE)
        unit = table.arm(pair, [name], *BASE, "native")[name]
        for color, (who, mark) in enumerate(marks.items()):
            items = table.items(*key, who)
            if items is not None:
                value, low, high = one(items, None, unit)
                ax.errorbar(value, row + 0.15 * (1 - color), xerr=[[max(0, value - low)], [max(0, high - value)]], fmt=mark, ms=5,
                            capsize=2, color=f"C{color}", label=None if row else who)  # fmt: skip
        bar = table.null(*key, "random") / unit.mean()
        ax.plot([-bar, bar], [row - 0.3] * 2, color="0.6", lw=3, label=None if row else "random, 19 of 20 draws")
    ax.axvline(0, color="0.6", lw=0.8)
    ax.axvline(1, color="0.6", lw=0.8, ls=":")
    ax.set_yticks(range(len(concepts)), labels=[f"{n}{' (tuning)' if n in TUNING else ''}" for n in reversed(concepts)])
    ax.set_xlabel("share of the native effect, at equal KL")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def tables(table: Table) -> dict[str, str]:
    """Every table by its name, such as `base gemma-smol reporting`."""
    found = {}
    for pair in dict.fromkeys(line["pair"] for line in table.lines):
        for title, concepts in (("reporting", REPORTING), ("tuning", TUNING)):
            if table.arm(pair, concepts, *BASE, "expert"):
                found[f"base {pair} {title}"] = base_table(table, pair, concepts)
            if any(medians(table, pair, concepts, *level)["expert"] for level in table.levels(pair) if level != BASE):
                found[f"factors {pair} {title}"] = factor_table(table, pair, concepts)
        if table.arm(pair, REPORTING, "judge", "rollouts", "expert"):
            found[f"judge {pair}"] = judge_table(table, pair, REPORTING)
        if f"factors {pair} tuning" in found:
            found[f"ahead {pair}"] = ahead_table(table, pair)
    return found


def filled(text: str, table: Table) -> str:
    """A page with its tables made anew: each stands between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        KeyError: the page names a table that the results do not give.
    """
    made = tables(table)

    def put(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{made[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", put, text, flags=re.DOTALL)


def publish(lines: Iterable[Line], page: Path) -> None:
    """Writes a page's tables, its figure and the lines that they are made of, to `results.jsonl` and `.png` beside it."""
    lines = list(lines)
    table = Table(lines)
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(table, lines[0]["pair"], [*REPORTING, *TUNING], folder / "base.png")
    page.write_text(filled(page.read_text(), table))


def summary(table: Table) -> str:
    """What `python -m evidence` prints at the end."""
    return "\n\n".join(f"{name}\n\n{text}" for name, text in tables(table).items())
