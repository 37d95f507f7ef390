"""What the experiment on four domains found: paired statistics, the table and the figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expertsteer_nnsight.measure.answers import compared, holm
from expertsteer_nnsight.plotting import figure
from recipes.domain_settings import Domain

Line = dict[str, Any]
METRICS = ("acc", "acc_norm", "acc_mutual_info")
OWN = ("expert", "expert_rfm", "paper")  # arms that the expert has a part in
CONTROLS = ("text_features", "untrained", "permuted", "random")
RESAMPLES = 2000


def read_lines(path: Path) -> list[Line]:
    """Lines of results; one that was cut off while it was written is taken out of the file."""
    text = path.read_text() if path.exists() else ""
    whole, _, cut = text.rpartition("\n")
    if cut:
        path.write_text(whole + "\n" if whole else "")
    return [json.loads(line) for line in whole.splitlines()]


def place(domain: Domain, args: Any) -> dict[str, str]:
    """What lines of one experiment share: the domain, and what else their numbers depend on."""
    names = (domain.expert, domain.target, domain.fit)
    told = (
        f"seed {args.seed} kl {args.kl} doses {args.doses} limits {args.limit} {args.validation} anchors {args.anchors}"
    )
    return {"domain": domain.name, "settings": " ".join((*names, told))}


def answers_of(lines: list[Line], domain: Domain, task: str, args: Any) -> dict[tuple[str, int], Line]:
    """The evaluations of a task's test items by arm and draw, of the same items as the unsteered model's; the last ones count."""
    mine = [line for line in lines if (place(domain, args) | {"task": task, "split": "test"}).items() <= line.items()]
    of = {(line["arm"], line["draw"]): line for line in mine}
    base = of.get(("unsteered", 0))
    if base is None:
        return {}
    same = [line for line in mine if (line["items"], line["n"]) == (base["items"], base["n"])]
    return {(line["arm"], line["draw"]): line for line in same}


def summary(lines: list[Line], domains: Sequence[Domain], args: Any) -> list[Line]:
    """A row for each task and arm: accuracies, and the difference to the unsteered model by the task's metric.

    Draws of an arm are rows by themselves. `holm` is p after Holm's correction over the expert's arms of all tasks that were
    measured with these settings.
    """
    rows = []
    for domain in domains:
        for task, metric in domain.tasks.items():
            of = answers_of(lines, domain, task, args)
            for line in of.values():
                accuracies = {m: float(np.mean(line[m])) for m in METRICS if m in line}
                about = {k: line[k] for k in ("domain", "task", "arm", "draw", "dose", "n")}
                base = of["unsteered", 0][metric]
                rows.append({**about, "metric": metric, **accuracies, **compared(line[metric], base)})
    own = [row for row in rows if row["arm"] in OWN]
    for row, p in zip(own, holm([row["p"] for row in own]), strict=True):
        row["holm"] = p
    return rows


def pooled(lines: list[Line], domains: Sequence[Domain], args: Any) -> tuple[list[str], list[Line]]:
    """The tasks that every plan was measured on; and for each arm, and for the expert's arms less a control, a mean over them.

    What is averaged is the difference to the unsteered model. The 95 % interval is a percentile bootstrap of the draws of an
    arm and of the items of each task.
    """
    found: dict[str, dict[str, np.ndarray]] = {}  # arm -> task -> [draw, item]
    for domain in domains:
        for task, metric in domain.tasks.items():
            of = answers_of(lines, domain, task, args)
            for arm in {arm for arm, _ in of} - {"unsteered"}:
                draws = [np.array(line[metric], float) for (name, _), line in sorted(of.items()) if name == arm]
                found.setdefault(arm, {})[task] = np.stack(draws) - np.array(of["unsteered", 0][metric])
    plans = [{*of} for arm, of in found.items() if arm not in ("prompted", "expert_itself")]
    shared = sorted(set.intersection(*plans)) if plans else []
    arms = {arm: [of[task] for task in shared] for arm, of in found.items() if shared and {*shared} <= {*of}}
    made = [{"arm": arm, **_mean(data)} for arm, data in arms.items()]
    made.sort(key=lambda row: -row["difference"])
    pairs = [(own, other) for own in OWN for other in ("untrained", "permuted") if own in arms and other in arms]
    return shared, [*made, *({"arm": f"{a} less {b}", **_mean(arms[a], arms[b])} for a, b in pairs)]


def _mean(data: list[np.ndarray], less: list[np.ndarray] | None = None) -> Line:
    """Mean over tasks of `[draw, item]`, less that of another arm on the same items, with its interval."""
    rng = np.random.default_rng(0)
    arms = [data] if less is None else [data, less]

    def once(resampled: bool) -> float:
        drawn = [rng.integers(len(arm[0]), size=len(arm[0])) if resampled else range(len(arm[0])) for arm in arms]
        total = 0.0
        for task in range(len(data)):
            n = data[task].shape[1]
            items = rng.integers(n, size=n) if resampled else range(n)
            first, *second = (
                arm[task].take(d, 0).mean(0).take(items).mean() for arm, d in zip(arms, drawn, strict=True)
            )
            total += first - sum(second)
        return float(total) / len(data)

    low, high = np.quantile([once(True) for _ in range(RESAMPLES)], [0.025, 0.975])
    return {"difference": once(False), "low": float(low), "high": float(high)}


def overview(rows: list[Line], shared: list[str], means: list[Line]) -> str:
    """In Markdown: the tasks, a row each, with the span of the controls; and each arm's mean over tasks."""
    head = [
        "task",
        "n",
        "unsteered",
        "expert itself",
        "prompted",
        "native",
        "expert",
        "expert, RFM",
        "paper",
        "controls",
    ]
    out = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        of = {row["arm"]: row for row in mine}
        span = [row["difference"] for row in mine if row["arm"] in CONTROLS]
        metric, n = of["unsteered"]["metric"], of["unsteered"]["n"]
        stars = {arm: " *" if row.get("holm", 1.0) < 0.05 else "" for arm, row in of.items()}
        cells = [f"{task.removeprefix('local_')}, {metric}", str(n)]
        cells += [f"{of[arm][metric]:.3f}" if arm in of else "" for arm in ("unsteered", "expert_itself", "prompted")]
        cells += [told(of[arm]) + stars[arm] if arm in of else "" for arm in ("native", *OWN)]
        whole = {*CONTROLS} <= {*of}
        cells.append(f"{min(span):+.3f} to {max(span):+.3f} ({len(span)})" if whole else "")
        out.append("| " + " | ".join(cells) + " |")
    out += [
        "",
        "*: p < 0.05 by McNemar's test after Holm's correction. Controls: the lowest and the highest of so many plans.",
    ]
    if means:
        names = ", ".join(task.removeprefix("local_") for task in shared)
        out += ["", f"| arm | mean difference to unsteered over {len(shared)} tasks: {names} |", "| --- | --- |"]
        out += [f"| {row['arm']} | {told(row)} |" for row in means]
    return "\n".join(out)


def told(row: Line) -> str:
    """A difference with its interval."""
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def _name(row: Line) -> str:
    return row["arm"] + (f" {row['draw'] + 1}" if row["arm"] in ("untrained", "permuted", "random") else "")


def table(rows: list[Line]) -> str:
    """Every row, in Markdown."""
    head = ["task", "arm", "n", "dose", *METRICS, "difference", "McNemar p", "Holm"]
    out = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        seen = [f"{row[m]:.3f}" + ("*" if m == row["metric"] else "") if m in row else "" for m in METRICS]
        gap = told(row) if row["arm"] != "unsteered" else ""
        p = f"{row['p']:.3f}" if row["arm"] != "unsteered" else ""
        cells = [
            row["task"],
            _name(row),
            str(row["n"]),
            f"{row['dose']:g}",
            *seen,
            gap,
            p,
            f"{row['holm']:.3f}" if "holm" in row else "",
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, "", "*: the metric that decides, in which differences to the unsteered model are told."])


def draw(rows: list[Line]) -> Any:
    """Differences to the unsteered model with their intervals, a panel for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    fig, axes = figure(4 * columns, 4 * lines, columns=columns, rows=lines)
    for ax in np.ravel(axes)[len(tasks) :]:
        ax.set_axis_off()
    for ax, task in zip(np.ravel(axes), tasks, strict=False):
        mine = [row for row in rows if row["task"] == task and row["arm"] not in ("unsteered", "expert_itself")]
        for y, row in enumerate(reversed(mine)):
            error = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
            color = "C3" if row["arm"].startswith(("expert", "paper")) else "0.4"
            ax.errorbar(row["difference"], y, xerr=np.clip(error, 0, None), fmt="o", ms=4, capsize=2, color=color)
        ax.set_yticks(range(len(mine)), [_name(row) for row in reversed(mine)], fontsize=7)
        ax.locator_params(axis="x", nbins=5)
        ax.axvline(0, color="0.7", lw=0.8)
        ax.set_title(f"{task.removeprefix('local_')}, {mine[0]['metric'] if mine else ''}", fontsize=9)
        ax.set_xlabel("accuracy less that of the unsteered model", fontsize=8)
    return fig


def report(domains: Sequence[Domain], args: Any) -> None:
    """Writes the tables and the figure of the results in a folder, and prints the short table.

    Raises:
        ValueError: there are no results of these domains with these settings.
    """
    lines = read_lines(args.out / "results.jsonl")
    rows = summary(lines, domains, args)
    if not rows:
        raise ValueError(f"{args.out} holds no results with these settings: measure first, or name another --out.")
    short = overview(rows, *pooled(lines, domains, args))
    (args.out / "table.md").write_text(f"{short}\n\n{table(rows)}\n")
    draw(rows).savefig(args.out / "differences.png", dpi=110)
    print(short)
