"""Tables and figures of docs/evidence.md, from the lines of results alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from evidence.concepts import REPORTING, TUNING
from evidence.models import PAIRS
from evidence.shares import BASE, FEW, WIDENED, Line, Rows, Table, mean_over, one, over
from expertsteer_nnsight.plotting import figure


def told(found: Sequence[float] | None) -> str:
    """A value with its interval."""
    return "" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def base_table(table: Table, pair: str, concepts: Sequence[str], level: str = BASE[1]) -> str:
    """Every concept's base arms, and the medians of the shares.

    Shares of a native effect that random directions reach too are in brackets. Another `level` of the base has an expert, untrained
    experts and text features of its own.
    """
    body, steerable = [], table.steerable(pair, concepts)
    for name in concepts:
        key, mine = (pair, name, *BASE), (pair, name, BASE[0], level)
        native, prompted = (table.items(*key, who) for who in ("native", "prompted"))
        expert, untrained, text = (table.items(*mine, who) for who in ("expert", "untrained", "text_features"))
        if native is None or expert is None or untrained is None or text is None:
            continue
        costs = (table.draws[(*key, "native")][0], table.draws[(*mine, "expert")][0])
        nll = (f"{np.mean(line.get('nll', np.nan)):.2f}" for line in costs)
        shares = [told(one(expert, x, native)) for x in (None, untrained, text)]
        shares = shares if name in steerable else [f"({x})" for x in shares]
        body.append([
            name, str(expert.shape[1]), told(one(native)), told(one(expert)), *shares,
            ", ".join(f"{e:.2f}" for e in untrained.mean(1)), *("" if x is None else f"{x.mean():.2f}" for x in (text, prompted)),
            *(f"{table.null(*key, who):.2f}" for who in ("permuted", "random")), f"{np.mean(expert < 0):.0%}", " / ".join(nll),
        ])  # fmt: skip
    for title, names in (("**median**", steerable), ("median with those in brackets", concepts)):
        if title == "**median**" or len(steerable) < len(body) - 1:
            found = medians(table, pair, names, BASE[0], level)
            shares = [told(found[name]) for name in ("expert", "beyond", "beyond_text")]
            body.append([title, "", "", "", *shares, *[""] * 7])
    return markdown(["concept", "n", "native", "expert", "expert / native", "(expert - untrained) / native",
                  "(expert - text features) / native", "untrained, each seed", "text features", "prompted", "permuted", "random",
                  "wrong way", "NLL, native / expert"], body)  # fmt: skip


def medians(
    table: Table, pair: str, concepts: Sequence[str], factor: str, level: str, units: Rows | None = None
) -> dict[str, list[float] | None]:
    """Medians over concepts, as shares of the base's native effect.

    Args:
        table: effects.
        pair: of models.
        concepts: names.
        factor: of the level.
        level: what is looked at.
        units: native effects on more items, where `table` has few: a share is then 1 + (effect - native) / unit, with the
            difference on the same few items and a unit that is better known.

    Returns:
        expert, change (expert - the base's expert), untrained, own (native with the same labels and layers), ahead
        (expert - own), beyond (expert - untrained) and beyond_text (expert - text features).
    """
    expert, untrained, own, text = (
        table.arm(pair, concepts, factor, level, who) for who in ("expert", "untrained", "native", "text_features")
    )
    native, base = (table.arm(pair, concepts, *BASE, who) for who in ("native", "expert"))
    unit = native if units is None else units

    def share(rows: Rows) -> list[float] | None:
        if units is None:
            return over(rows, unit)
        found = over(rows, unit, native)
        return found and [1 + x for x in found]

    return {
        "expert": share(expert),
        "change": over(expert, unit, base),
        "untrained": share(untrained),
        "own": share(own),
        "ahead": over(expert, unit, own if own else native),
        "beyond": over(expert, unit, untrained),
        "beyond_text": over(expert, unit, text),
    }


def _varied(table: Table, pair: str, concepts: Sequence[str]) -> tuple[Table, list[str], Rows]:
    """What factors are compared on, the items and concepts that they were measured on, and native effects on all items."""
    lines = [x for x in table.lines if x["pair"] == pair and x["factor"] not in ("base", "judge")]
    varied = {line["concept"] for line in lines}
    names = [name for name in concepts if name in varied]
    items = min((line["n"] for line in lines), default=0)
    return table.first(names, items), names, table.arm(pair, names, *BASE, "native")


def factor_table(table: Table, pair: str, concepts: Sequence[str]) -> str:
    """A row for each level of each factor: medians over the concepts that factors were varied on."""
    few, names, units = _varied(table, pair, table.steerable(pair, concepts))
    body = []
    for factor, level in few.levels(pair):
        found = medians(few, pair, names, factor, level, units)
        if found["expert"] is not None or found["own"] is not None:
            count = len(few.arm(pair, names, factor, level, "expert") or few.arm(pair, names, factor, level, "native"))
            shown = [told(found[name]) for name in ("expert", "change", "untrained", "own", "ahead")]
            body.append([factor, level, str(count), *shown])
    return markdown(["factor", "level", "concepts", "expert", "expert - base's expert", "untrained", "native likewise",
                  "expert - native likewise"], body)  # fmt: skip


MARGIN = 1.03  # a dose may be 3 % off


def _rival(few: Table, pair: str, names: Sequence[str], factor: str, level: str) -> Rows:
    """Native with the same labels; if labels are not what is varied, the better one of it and the base's."""
    likewise, base = few.arm(pair, names, factor, level, "native"), few.arm(pair, names, *BASE, "native")
    if factor == "labels":
        return {n: MARGIN * likewise.get(n, base[n]) for n in base}
    return {n: MARGIN * max(base[n], likewise.get(n, base[n]), key=np.mean) for n in base}


def ahead(table: Table, pair: str) -> list[tuple[str, str, list[float], list[float] | None, list[float] | None, float]]:
    """Levels at which the expert exceeds native (see `_rival`) on the tuning concepts.

    Layers that are chosen for the expert are left out, and levels that not every concept has. A level is a candidate if the
    expert exceeds native on every tuning concept, and on their mean with p < 0.05.

    Returns:
        (factor, level, mean of expert - native on the tuning concepts in nats, the same on the reporting concepts, expert -
        untrained there, p-value of the second times the number of candidates).
    """
    found = []
    sides = [_varied(table, pair, concepts) for concepts in (TUNING, REPORTING)]
    for factor, level in sides[0][0].levels(pair):
        if factor == "layers" or level == "paper":
            continue
        experts = [few.arm(pair, names, factor, level, "expert") for few, names, _ in sides]
        if any(set(found) != set(names) for found, (_, names, _) in zip(experts, sides, strict=True)):
            continue
        tests = [
            mean_over(x, _rival(few, pair, names, factor, level))
            for x, (few, names, _) in zip(experts, sides, strict=True)
        ]
        if tests[0] is not None and tests[0][2] and tests[0][1] < 0.05:
            few, names, _ = sides[1]
            beyond = mean_over(experts[1], few.arm(pair, names, factor, level, "untrained"))
            found.append((factor, level, tests[0][0], tests[1], beyond))
    return [
        (
            factor,
            level,
            first,
            second and second[0],
            beyond and beyond[0],
            min(1.0, second[1] * len(found)) if second else 1.0,
        )
        for factor, level, first, second, beyond in found
    ]


def ahead_table(table: Table, pair: str) -> str:
    """`ahead` as a table, or a sentence."""
    body = [[factor, level, *map(told, rest), f"{p:.3f}"] for factor, level, *rest, p in ahead(table, pair)]
    if not body:
        return "None: at no level does the expert exceed native on every tuning concept and on their mean."
    return markdown(["factor", "level", "tuning", "reporting", "reporting, expert - untrained", "p, corrected"], body)


def above_table(table: Table, pair: str) -> str:
    """Whether the base's expert exceeds native: on the tuning concepts, and then on the reported ones."""
    body = []
    for title, names in (("tuning", TUNING), ("reported", REPORTING)):
        names = table.steerable(pair, names)
        expert, native = (table.arm(pair, names, *BASE, who) for who in ("expert", "native"))
        mean = mean_over(expert, native)
        if mean is None:
            continue
        gaps = {name: one(expert[name], native[name]) for name in names if name in expert}
        above, below = (
            [n for n, gap in gaps.items() if test(gap)] for test in (lambda g: g[1] > 0, lambda g: g[2] < 0)
        )
        body.append(
            [title, ", ".join(gaps), told(mean[0]), f"{mean[1]:.3f}", *(", ".join(x) or "none" for x in (above, below))]
        )
    return markdown(
        [
            "concepts",
            "which",
            "mean of expert - native, nats",
            "p (above 0)",
            "by its own interval above native",
            "below native",
        ],
        body,
    )


def judge_table(table: Table, pair: str, concepts: Sequence[str]) -> str:
    """What the sentence judge makes of steered continuations, and the mean of expert - native."""
    body = []
    level = ("judge", "rollouts")
    experts, natives = (table.arm(pair, concepts, *level, who) for who in ("expert", "native"))
    experts = {name: items for name, items in experts.items() if name in natives}
    for name, expert in experts.items():
        key = (pair, name, *level)
        first = {who: table.draws[(*key, who)][0] for who in ("native", "expert")}
        shown = [told(one(natives[name])), told(one(expert)), told(one(expert, natives[name]))]
        others = (table.items(*key, who) for who in ("untrained", "text_features", "prompted"))
        shown += ["" if x is None else f"{x.mean():.2f}" for x in others]
        costs = (
            " / ".join(f"{np.mean(line[cost]):.2f}" for line in first.values())
            for cost in ("rollout_nll", "repetition")
        )
        accuracy = f"{first['expert']['judge_accuracy']:.2f}"
        body.append([name, str(expert.shape[1]), accuracy, *shown, f"{table.null(*key, 'random'):.2f}", *costs])
    mean = mean_over(experts, natives)
    if mean is None:
        return "Not measured yet."
    body.append(["**mean**", "", "", "", "", f"{told(mean[0])}, p = {mean[1]:.4f}", *[""] * 6])
    return markdown(["concept", "n", "judge's accuracy", "native", "expert", "expert - native", "untrained", "text features",
                  "prompted", "random", "NLL, native / expert", "repetition, native / expert"], body)  # fmt: skip


def draw(table: Table, pair: str, concepts: Sequence[str], path: Path) -> None:
    """Expert, untrained and controls as shares of native, a row for each concept."""
    concepts = table.steerable(pair, concepts)
    fig, ax = figure(8, 0.5 * len(concepts) + 1.5)
    marks = {"expert": "o", "untrained": "s", "text_features": "^"}
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
            for level in (FEW, WIDENED):
                if table.arm(pair, concepts, BASE[0], level, "expert"):
                    found[f"{level} {pair} {title}"] = base_table(table, pair, concepts, level)
            if table.arm(pair, concepts, "judge", "rollouts", "expert"):
                found[f"judge {pair} {title}"] = judge_table(table, pair, concepts)
            if len(_varied(table, pair, concepts)[0].levels(pair)) > 1:
                found[f"factors {pair} {title}"] = factor_table(table, pair, concepts)
        if table.arm(pair, REPORTING, *BASE, "expert"):
            found[f"above {pair}"] = above_table(table, pair)
        if f"factors {pair} tuning" in found:
            found[f"ahead {pair}"] = ahead_table(table, pair)
    return found


def filled(text: str, table: Table, earlier: Table | None = None) -> str:
    """A page with its tables made anew: each stands between `<!-- table: NAME -->` and `<!-- end -->`.

    Args:
        text: of the page.
        table: effects.
        earlier: those of an earlier base; its tables have the names of the others after "earlier ".

    Raises:
        KeyError: the page names a table that the results do not give.
    """
    made = tables(table)
    if earlier is not None:
        made |= {f"earlier {name}": text for name, text in tables(earlier).items()}

    return filled_with(text, made)


def filled_with(text: str, made: Mapping[str, str]) -> str:
    """A page with the tables of `made`, by name.

    Raises:
        KeyError: the page names a table that is not there.
    """

    def put(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{made[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", put, text, flags=re.DOTALL)


def publish(lines: Iterable[Line], page: Path) -> None:
    """Writes a page's tables, its figure and the lines that they are made of, to `results.jsonl` and `.png` beside it.

    Lines of an earlier base are read from `earlier.jsonl` there, if there is one.
    """
    lines = list(lines)
    table, folder = Table(lines), page.with_suffix("")
    before = folder / "earlier.jsonl"
    earlier = Table(map(json.loads, before.read_text().splitlines())) if before.exists() else None
    text = filled(page.read_text(), table, earlier)  # before anything is written
    known = {line["pair"] for line in lines}
    pair = next((name for name in PAIRS if name in known), lines[0]["pair"])
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(table, pair, [*REPORTING, *TUNING], folder / "base.png")
    page.write_text(text)


def summary(table: Table) -> str:
    """What `python -m evidence` prints at the end."""
    found = [f"{name}\n\n{text}" for name, text in tables(table).items()]
    found += [f"{table.unmet} arms met no KL budget and are left out."] if table.unmet else []
    return "\n\n".join(found)
