"""How many anchors, read at how many places: the share of the native effect, and the cosine that predicts it.

    python -m evidence.anchor_grid --data FOLDER                              # goes on where it stopped
    python -m evidence.anchor_grid --redraw --publish docs/anchors.md         # the page again, without a model

Concepts are those that settings are tuned on. Maps are fitted on the project's own anchors. Layer pairs, labels, items and the KL
budget are the same for all, so that the map alone differs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.base import clone
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from evidence.cell import Arm
from evidence.concepts import TUNING, WRITTEN, Data, concept
from evidence.models import PAIRS, model
from evidence.report import filled_with, markdown, told
from evidence.shares import Table, over
from evidence.study import Measuring, Results
from expertsteer_nnsight.align.aligner import massive_coordinates, ordinary_rows
from expertsteer_nnsight.align.closed_form import ProcrustesAligner
from expertsteer_nnsight.match.layer_matching import LayerPair, match_layers
from expertsteer_nnsight.models.identity import ModelIdentity
from expertsteer_nnsight.models.positions import prefix_ids
from expertsteer_nnsight.plotting import figure
from expertsteer_nnsight.states.shards import VERSION as STATES
from expertsteer_nnsight.steering.plan import SteeringPlan
from expertsteer_nnsight.steering.vectors import SteeringVector
from expertsteer_nnsight.texts.word_ends import shared_ends

CONCEPTS = (*(name for name in TUNING if name != "truth"), *WRITTEN)  # native steers no facts
ANCHORS = (150, 300, 600, 1200)
PLACES = (0, 2, 4, 6, 8, 16)
ALIGNERS = {
    "ridge": es.RidgeAligner(),
    "procrustes, a tenth": ProcrustesAligner(whiten=True),
    "procrustes, 200": ProcrustesAligner(200),
}
# ridge with the labelled texts of the other concepts, unlabelled, among the anchors: statements, reviews, options
REGISTERS = "ridge, other registers"
KINDS = (*ALIGNERS, REGISTERS)
MIXED = ((300, 6), (1200, 0), (1200, 6))
UNTRAINED = {"ridge": MIXED, REGISTERS: MIXED}  # where experts of random weights are measured too
SEEDS = (1, 2)
ITEMS, LABELLED = 32, 100
VERSION = 1
Setting = tuple[str, int, int]  # aligner, anchors, further places


def settings() -> list[Setting]:
    """Every setting that has as many rows as its map has dimensions."""
    every = [(name, n, k) for name in ALIGNERS for n in ANCHORS for k in PLACES]
    enough = [s for s in every if s[0] != "procrustes, 200" or s[1] * (1 + s[2]) > 450]
    return [*enough, *((REGISTERS, *size) for size in MIXED)]


def level(anchors: int, places: int) -> str:
    """A setting's name in the lines."""
    return f"{anchors} anchors, {places} places"


class Grid:
    """Activations of one pair of models at every shared token end of the anchors, and the plans of every setting.

    Args:
        pair: name in `PAIRS`.
        texts: the anchors.
        concepts: by name.
        folder: where activations are kept.
    """

    def __init__(self, pair: str, texts: list[str], concepts: dict[str, Any], folder: Path) -> None:
        self.pair, self.texts, self.concepts, self.folder = pair, texts, concepts, folder
        self.expert, self.target = PAIRS[pair]
        self.known = [(t, len(prefix_ids(t))) for t in (model(name).tokenizer for name in PAIRS[pair])]
        self.ends = shared_ends(texts, self.known, 10**6)
        self.kept: dict[Any, Any] = {}
        usual = es.ExpertSteer.recommended()
        scores = match_layers(self.anchors(self.expert).whole, self.anchors(self.target).whole, usual.score)
        self.pairs = scores.pairs(usual.n_pairs, "highest", "target", usual.band)

    def anchors(self, who: str) -> es.Activations:
        """Activations of all anchors at all places."""
        return self._read(who, "anchors", self.texts, self.ends)

    def labelled(self, who: str, name: str) -> es.Activations:
        """Activations of a concept's labelled texts, which come in pairs."""
        return self._read(who, name, [t for both in self.concepts[name].pairs[:LABELLED] for t in both], None)

    def _read(self, who: str, what: str, texts: list[str], ends: Any) -> es.Activations:
        if (who, what) not in self.kept:
            identity = ModelIdentity.of(model(who))
            layers, _ = es.ExpertSteer.recommended().wanted_layers(identity, identity)
            where = self.folder / f"{self.pair}-{who}-{what}"
            found = es.collect(model(who), texts, layers, ends=ends, cache=where, progress=False)
            self.kept[who, what] = found.take(slice(None))  # from the disk once, not for every setting
        return self.kept[who, what]

    def rows(self, anchors: int, places: int) -> list[int]:
        """Rows of the first so many anchors of a random order, each at up to `places` of its shared ends and at its own end."""
        chosen = set(np.random.default_rng(0).permutation(len(self.texts))[:anchors].tolist())
        drawn = shared_ends(self.texts, self.known, places)
        rows, row = [], 0
        for number, (every, some) in enumerate(zip(self.ends, drawn, strict=True)):
            if number in chosen:
                wanted = set(some)
                rows += [row + i for i, end in enumerate(every) if end in wanted] + [row + len(every)]
            row += len(every) + 1
        return rows

    def difference(self, who: str, name: str, layer: int) -> torch.Tensor:
        """Mean difference of a concept's labelled texts, a unit vector."""
        return self._read_once(who, name, layer)[1]

    def _read_once(self, who: str, name: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The massive coordinates of a concept's texts and of the anchors, and the mean difference without them."""
        if (who, name, layer) not in self.kept:
            states = self.labelled(who, name)[layer]
            massive = massive_coordinates(self.anchors(who)[layer], states)
            labels = [1, 0] * (len(states) // 2)
            found = es.find_direction(states.masked_fill(massive, 0.0), labels, "mean_difference", folds=0)
            self.kept[who, name, layer] = massive, found.vector
        return self.kept[who, name, layer]

    def plans(self, who: str, setting: Setting) -> dict[str, SteeringPlan]:
        """A plan for each concept, of `who` in the expert's place."""
        aligner, rows = setting[0], self.rows(*setting[1:])
        vectors, steps = defaultdict(list), defaultdict(list)
        for pair in self.pairs:
            x, y = self.anchors(who)[pair.expert][rows], self.anchors(self.target)[pair.target][rows]
            maps: dict[Any, Any] = {}  # the same for all concepts, but for what their texts hide of the anchors
            for name in self.concepts:
                hidden, difference = self._read_once(who, name, pair.expert)
                key = name if aligner == REGISTERS else tuple(hidden.tolist())
                if key not in maps:
                    mixed = self._with_others(who, name, pair, x, y) if aligner == REGISTERS else (x, y)
                    maps[key] = _fitted(
                        ALIGNERS.get(aligner, ALIGNERS["ridge"]), mixed[0].masked_fill(hidden, 0.0), mixed[1]
                    )
                v = maps[key].map_direction(difference, "displacement")
                self._add(vectors[name], steps[name], pair, name, v)
        return {name: SteeringPlan(tuple(vectors[name]), None, {"pairs": steps[name]}) for name in self.concepts}

    def _with_others(
        self, who: str, name: str, pair: LayerPair, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` and `y` followed by the activations of all concepts' labelled texts but those of `name`."""
        others = [other for other in self.concepts if other != name]
        theirs = (self.labelled(who, other)[pair.expert] for other in others)
        own = (self.labelled(self.target, other)[pair.target] for other in others)
        return torch.cat([x, *theirs]), torch.cat([y, *own])

    def native(self) -> dict[str, SteeringPlan]:
        """The target's own directions at the same layers."""
        found = {}
        for name in self.concepts:
            vectors, steps = [], []
            for pair in self.pairs:
                self._add(vectors, steps, pair, name, self.difference(self.target, name, pair.target))
            found[name] = SteeringPlan(tuple(vectors), None, {"pairs": steps})
        return found

    def _add(self, vectors: list[Any], steps: list[Any], pair: Any, name: str, v: torch.Tensor) -> None:
        own = self.difference(self.target, name, pair.target)
        norm = self.anchors(self.target).norm(pair.target)
        vectors.append(SteeringVector(pair.target, v, 0.1, norm))
        steps.append({
            "expert_layer": pair.expert, "target_layer": pair.target, "held_out_r2": None,
            "native_cosine": float(torch.cosine_similarity(v.double(), own.double(), dim=0)),
        })  # fmt: skip


def _fitted(aligner: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    """A new aligner like `aligner`, fitted on the rows without massive activations."""
    ordinary = ordinary_rows(x, y)
    made: Any = clone(aligner)
    return made.fit(x[ordinary], y[ordinary])


def run(
    data: Data, out: Path, pairs: Sequence[str], concepts: Sequence[str], aligners: Sequence[str] = KINDS
) -> Results:
    """Measures what is missing of the grid, of some kinds of map."""
    # all of them, because the others are a setting's anchors
    results, known = Results(out / "anchors.jsonl"), {name: concept(name, data) for name in CONCEPTS}
    for pair in pairs:
        measure(Grid(pair, es.example("general"), known, out / f"anchor_states-{STATES}"), results, concepts, aligners)
    return results


def measure(grid: Grid, results: Results, concepts: Sequence[str], aligners: Sequence[str] = KINDS) -> None:
    """Fits every map once, for all concepts, and then measures the plans of one concept after another."""
    measuring = {name: Measuring(grid.pair, name, results, f"version {VERSION}") for name in concepts}
    waiting: dict[str, list[Arm]] = {name: [] for name in concepts}

    def add(factor: str, where: str, who: str, draw: int, make: Callable[[], dict[str, SteeringPlan]]) -> None:
        missing = [name for name, one in measuring.items() if not one.has(factor, where, who, draw)]
        made = make() if missing else {}
        for name in missing:
            waiting[name].append(Arm(factor, where, who, draw, made[name], ITEMS))

    add("native", "native", "native", 0, grid.native)
    for setting in tqdm([s for s in settings() if s[0] in aligners], desc=f"maps, {grid.pair}"):
        aligner, *size = setting
        add(aligner, level(*size), "expert", 0, partial(grid.plans, grid.expert, setting))
        if tuple(size) in UNTRAINED.get(aligner, ()):
            for seed in SEEDS:
                add(aligner, level(*size), "untrained", seed, partial(grid.plans, f"{grid.expert}~{seed}", setting))
    for name, arms in tqdm(waiting.items(), desc=f"effects, {grid.pair}"):
        measuring[name].arms(arms, es.Choices(grid.concepts[name].test))


def tables(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Every table by its name, such as `ridge gemma-smol`."""
    table, found = Table(lines), {}
    for pair in dict.fromkeys(line["pair"] for line in lines):
        native = table.arm(pair, CONCEPTS, "native", "native", "native")
        for who, names in (("expert", KINDS), ("untrained", UNTRAINED)):
            for name in names:
                body = []
                for n in ANCHORS:
                    cells = [over(table.arm(pair, CONCEPTS, name, level(n, k), who), native) for k in PLACES]
                    if any(cells):
                        body.append([str(n), *map(told, cells)])
                title = name if who == "expert" else f"untrained, {name}"
                found[f"{title} {pair}"] = markdown(["anchors", *(f"{k} further places" for k in PLACES)], body)
        found[f"cosine {pair}"] = _cosines([line for line in lines if line["pair"] == pair])
    return found


def points(lines: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Who, mean cosine with the native direction, and share of the native effect, for every plan."""
    own = {line["concept"]: line["effect"] for line in lines if line["who"] == "native"}
    return [
        (line["who"], float(np.mean(line["cosine"])), line["effect"] / own[line["concept"]])
        for line in lines
        if line["who"] in ("expert", "untrained") and line["concept"] in own and line.get("met", True)
    ]


def _cosines(lines: Sequence[dict[str, Any]]) -> str:
    """How many plans of each range of the cosine have less than half of the native effect."""
    found = points(lines)
    cosine, share = (np.array([p[i] for p in found]) for i in (1, 2))
    edges, body = (-1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0), []
    for low, high in pairwise(edges):
        mine = share[(cosine >= low) & (cosine < high)]
        if len(mine):
            middle = f"{np.median(mine):.2f} [{np.quantile(mine, 0.1):.2f}, {np.quantile(mine, 0.9):.2f}]"
            body.append([f"{low:g} to {high:g}", str(len(mine)), middle, f"{np.mean(mine < 0.5):.0%}"])
    rank = float(spearmanr(cosine, share)[0])  # type: ignore[arg-type]
    header = ["cosine", "plans", f"share of native, median [10 %, 90 %] (rank correlation {rank:.2f})", "below half"]
    return markdown(header, body)


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of native against anchors, a line for each number of places, and share against cosine."""
    table, pairs = Table(lines), list(dict.fromkeys(line["pair"] for line in lines))
    fig, axes = figure(16, 3.4 * len(pairs), columns=3, rows=len(pairs))
    for row, pair in zip(np.atleast_2d(axes), pairs, strict=True):
        native = table.arm(pair, CONCEPTS, "native", "native", "native")
        for ax, name in zip(row, ("ridge", "procrustes, a tenth"), strict=False):
            if not any(line["pair"] == pair and line["factor"] == name for line in lines):
                ax.axis("off")
                continue
            for shade, k in zip(np.linspace(0.85, 0.1, len(PLACES)), PLACES, strict=True):
                found = {n: over(table.arm(pair, CONCEPTS, name, level(n, k), "expert"), native) for n in ANCHORS}
                shown = {n: value[0] for n, value in found.items() if value}
                ax.plot(list(shown), list(shown.values()), "o-", ms=4, color=str(shade), label=f"{k} further places")  # fmt: skip
            ax.axhline(1, color="0.6", lw=0.8, ls=":")
            ax.set_xlim(0.9 * ANCHORS[0], 1.1 * ANCHORS[-1])
            ax.set_xscale("log")
            ax.set_xticks(ANCHORS, labels=map(str, ANCHORS))
            ax.set_xticks([], minor=True)
            ax.set_ylim(0, 1.3)
            ax.set_title(f"{pair}: {name}", fontsize=10)
            ax.set_xlabel("anchors")
            ax.set_ylabel("share of the native effect, median")
        found = points([line for line in lines if line["pair"] == pair])
        for who, color in (("expert", "C0"), ("untrained", "0.6")):
            mine = [p for p in found if p[0] == who]
            row[-1].plot([p[1] for p in mine], [p[2] for p in mine], ".", ms=4, alpha=0.5, color=color, label=who)
        row[-1].axhline(1, color="0.6", lw=0.8, ls=":")
        row[-1].axhline(0, color="0.6", lw=0.8)
        row[-1].set_title(f"{pair}: every plan", fontsize=10)
        row[-1].set_xlabel("cosine with the target's own direction")
        row[-1].set_ylabel("share of the native effect")
        for ax in (row[0], row[-1]):
            ax.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets; left out, they are fetched")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="results and states (%(default)s)")
    parser.add_argument("--pairs", nargs="*", choices=list(PAIRS), default=["gemma-smol", "smol-gemma"], help="models")
    parser.add_argument("--concepts", nargs="*", choices=CONCEPTS, default=list(CONCEPTS))
    parser.add_argument("--aligners", nargs="*", choices=KINDS, default=list(KINDS), help="kinds of map (default: all)")
    parser.add_argument("--publish", type=Path, metavar="PAGE", help="write the tables and the figure into a page")
    parser.add_argument("--redraw", action="store_true", help="measure nothing, take the results that are there")
    args = parser.parse_args(argv)
    if args.redraw:
        lines = Results(args.out / "anchors.jsonl").lines
        if not lines:
            parser.error(f"there are no results in {args.out} to draw: measure first, or name another --out.")
    else:
        lines = run(Data(args.data), args.out, args.pairs, args.concepts, args.aligners).lines
    made = tables(lines)
    print("\n\n".join(f"{name}\n\n{text}" for name, text in made.items()))
    if args.publish:
        text = filled_with(args.publish.read_text(), made)
        folder = args.publish.with_suffix("")
        draw(lines, folder / "anchors.png")
        # anew: lines of an earlier grid must not stay beside these
        (folder / "anchors.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        args.publish.write_text(text)


if __name__ == "__main__":
    main()
