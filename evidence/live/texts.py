"""Any text: how many bits a character an expert that reads along saves, beside what the target's own activations save.

The map goes from the expert's activation at a shared token end to the target's negative loss gradient there, a ridge: what is added
lowers the loss to first order. The same map from the target's own activation is an adapter to the domain without any expert, so
only what a map of both has beyond one of the own and of an untrained expert's activations is the expert's. Layers, penalty and size
are chosen on validation texts; the test texts are read once.
"""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import torch
from torch import Tensor

import expertsteer_nnsight as es
from evidence.live.results import Line, Results
from evidence.models import PAIRS, model
from evidence.report import markdown
from expertsteer_nnsight.align.aligner import massive_coordinates, ordinary_rows
from expertsteer_nnsight.measure.rows import Encoded
from expertsteer_nnsight.measure.scoring import likelihoods
from expertsteer_nnsight.models.identity import ModelIdentity
from expertsteer_nnsight.models.positions import prefix_ids
from expertsteer_nnsight.states.forward import batches
from expertsteer_nnsight.texts.texts import texts_hash, tokenizer_of
from expertsteer_nnsight.texts.word_ends import shared_ends, token_ends
from recipes.tasks.readers import read

KINDS = ("code", "medicine", "finance", "science", "mathematics")
TRAIN, VALIDATION, TEST, LENGTH = 600, 30, 100, 300  # texts, texts, texts, characters
EXPERT_DEPTHS, TARGET_DEPTHS = (0.59, 0.88), (0.41, 0.62, 0.76, 0.9, 1.0)
ARMS = ("expert", "own", "both", "untrained", "own and untrained", "mean")
ALPHAS, SIZES = (0.1, 1.0, 10.0, 100.0), (0.05, 0.1, 0.2, 0.4)  # relative penalties; shares of the residual norm
FIRST = (10.0, 0.1)  # of both, while layers are chosen
VERSION = 1


# -- texts -------------------------------------------------------------------------------------------------------------


def documents(kind: str, data: Path) -> list[str]:
    """Texts of a kind by document; all pieces of a document land in one split."""
    if kind == "code":  # Python's own library, which is there on every machine
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return [path.read_text(encoding="utf-8", errors="ignore") for path in files if path.stat().st_size > 2000]
    if kind == "medicine":
        found = json.loads((data / "pubmedqa" / "ori_pqal.json").read_text())
        return [" ".join(one["CONTEXTS"]) for one in found.values()]
    if kind == "finance":
        found = json.loads((data / "tatqa" / "tatqa_dataset_dev.json").read_text())
        return [" ".join(p["text"] for p in one["paragraphs"]) for one in found]
    if kind == "mathematics":
        lines = (data / "gsm8k" / "train.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [f"{row['question']}\n{row['answer'].split('####')[0]}" for row in rows]
    rows = [row for split in read("arc_challenge", data).values() for row in split]
    return [f"{row['question']} {row['choices'][row['answer']]}." for row in rows]


def pieces(text: str, length: int = LENGTH) -> list[str]:
    """A text in pieces of at most so many characters, which begin and end with a word; short ones are left out."""
    found, rest = [], text.strip()
    while len(rest) >= length // 3:
        end = length if len(rest) > length else len(rest)
        if end < len(rest):
            end = max(rest.rfind(" ", 0, end), rest.rfind("\n", 0, end))
            end = end if end > length // 2 else length
        found.append(rest[:end].strip())
        rest = rest[end:].strip()
    return [piece for piece in found if len(piece) >= length // 3]


def splits(kind: str, data: Path) -> dict[str, list[str]]:
    """Training, validation and test texts, from different documents."""
    cut = {hashlib.sha256(text.encode()).hexdigest(): pieces(text) for text in documents(kind, data)}
    order = sorted(key for key, mine in cut.items() if mine)
    shares = {"test": 0.25, "validation": 0.35, "train": 1.0}
    wanted, found, start = {"test": TEST, "validation": VALIDATION, "train": TRAIN}, {}, 0
    for name, share in shares.items():
        end = round(share * len(order))
        mine, start = [cut[key] for key in order[start:end]], end
        # the first piece of every document, then the second
        rounds = (some[k] for k in range(max(map(len, mine))) for some in mine if k < len(some))
        found[name] = [text for text, _ in zip(rounds, range(wanted[name]), strict=False)]
    return found


# -- activations, gradients and maps -----------------------------------------------------------------------------------


@dataclass
class Texts:
    """Texts with the shared token ends of two models, at which both are read and the target is steered.

    Args:
        texts: strings.
        expert, target: wrapped models, of the tokens.
    """

    texts: list[str]
    expert: Any
    target: Any

    @cached_property
    def ends(self) -> list[list[int]]:
        """Characters, without the end of the text, after which nothing is predicted."""
        known = [(t, len(prefix_ids(t))) for t in map(tokenizer_of, (self.expert, self.target))]
        return shared_ends(self.texts, known, 10**6)

    def columns(self, who: Any) -> list[list[int]]:
        """The tokens that end there, in a model's numbering."""
        tokenizer = tokenizer_of(who)
        prefix = len(prefix_ids(tokenizer))
        every = (token_ends(tokenizer, text, prefix) for text in self.texts)
        return [[ends[e] for e in mine] for ends, mine in zip(every, self.ends, strict=True)]

    def encoded(self, who: Any) -> list[Encoded]:
        """Ids; what comes after the first shared end counts as a completion, the same characters for both models."""
        tokenizer = tokenizer_of(who)
        prefix = len(prefix_ids(tokenizer))
        ids = [list(tokenizer(text)["input_ids"]) for text in self.texts]
        return [Encoded(row, prefix, mine[0] + 1) for row, mine in zip(ids, self.columns(who), strict=True)]

    @property
    def characters(self) -> np.ndarray:
        """How many are predicted of each text."""
        return np.array([len(text) - mine[0] for text, mine in zip(self.texts, self.ends, strict=True)])

    def states(self, who: Any, layers: Sequence[int], cache: Path) -> dict[int, Tensor]:
        """Activations of a model at all shared ends, layer -> `[place, hidden]`."""
        found = es.collect(who, self.texts, list(layers), ends=self.ends, cache=cache, progress=False)
        of = list(found.text_of or ())
        inner = [i for i, (text, after) in enumerate(pairwise(of)) if text == after]  # all rows of a text but its end
        return {layer: found[layer][inner].float() for layer in layers}

    def gradients(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Negative gradient of the target's loss (sum over tokens, nats) with respect to its residual stream at the ends."""
        residual, parts, columns = es.Residual(self.target), [], self.columns(self.target)
        encoded = self.encoded(self.target)
        for some in batches(range(len(self.texts)), 4):
            rows = [encoded[i].ids for i in some]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            at = [(n, column) for n, i in enumerate(some) for column in columns[i]]
            row, column = (torch.tensor(side) for side in zip(*at, strict=True))
            call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            with torch.enable_grad(), self.target.trace(**call):
                added = []
                for layer in layers:
                    h = residual.read(layer)
                    zero = torch.zeros_like(h, requires_grad=True)
                    residual.write(layer, h + zero)
                    added.append(zero)
                logits = self.target.output.logits[:, :-1]
                nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
                slopes = torch.autograd.grad((nll * mask[:, 1:]).sum(), added)
                found = nnsight.save(torch.stack([-slope[row, column] for slope in slopes]))
            parts.append(found.detach())
        return dict(zip(layers, torch.cat(parts, 1), strict=True))


@dataclass
class Map:
    """What is added at a layer of the target: x W + h V + b, scaled.

    Attributes:
        layer: of the target.
        expert: `[d_expert, hidden]`, or None.
        own: `[hidden, hidden]`, or None.
        bias: `[hidden]`.
        size: of the root mean square of what is added on the training texts, in units of the residual stream.
    """

    layer: int
    expert: Tensor | None
    own: Tensor | None
    bias: Tensor
    size: float

    def vectors(self, x: Tensor | None, at: list[int], share: float) -> es.SteeringVector:
        """Of one text: `x` `[place, d_expert]` at the target's tokens `at`, `share` residual norms in the root mean square."""
        z = self.bias.expand(len(at), -1) if self.expert is None or x is None else x @ self.expert + self.bias
        return es.SteeringVector(
            self.layer, z, share * self.size, op="innovation", where="given", at=[at], predictor=self.predictor
        )

    @cached_property
    def predictor(self) -> Tensor:
        """The same object for all texts: h + a (z - p(h)) adds h V where p(h) is -h V."""
        width = len(self.bias)
        if self.own is None:
            return torch.zeros(1, width)
        return torch.cat([-self.own, torch.zeros(1, width)]).float()


def fitted(x: Tensor | None, h: Tensor | None, slope: Tensor, norm: float, layer: int, alpha: float) -> Map:
    """Ridge on standardised activations of the expert (`x`), of the target (`h`), or of both, to the negative gradient."""
    parts = [side for side in (x, h) if side is not None]
    if not parts:
        mean = slope.mean(0)
        return Map(layer, None, None, mean, norm / float(mean.norm()))
    both = torch.cat(parts, 1).double()
    spread = both.std(0).clamp_min(1e-6)
    ridge = es.RidgeAligner(alpha=alpha).fit(both / spread, slope.double())
    coef, bias = ridge.coef_ / spread[:, None], ridge.intercept_
    made = both @ coef + bias
    width = 0 if x is None else x.shape[1]
    size = norm / float(made.square().sum(1).mean().sqrt())
    return Map(
        layer, coef[:width].float() if x is not None else None, coef[width:].float() if h is not None else None, bias.float(), size
    )  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------------------------------


class Domain:
    """One kind of text and one pair of models.

    Args:
        pair: name in `PAIRS`.
        kind: of text.
        data: folder of the data sets.
        folder: where activations are kept.
    """

    def __init__(self, pair: str, kind: str, data: Path, folder: Path) -> None:
        self.expert, self.target = (model(name) for name in PAIRS[pair])
        self.others = {"untrained": model(f"{PAIRS[pair][0]}~1")}
        self.folder = folder / f"{pair}-{kind}"
        self.texts = {name: Texts(some, self.expert, self.target) for name, some in splits(kind, data).items()}
        depths = [ModelIdentity.of(m).n_layers - 1 for m in (self.expert, self.target)]
        self.expert_layers = sorted({round(d * depths[0]) for d in EXPERT_DEPTHS})
        self.target_layers = sorted({round(d * depths[1]) for d in TARGET_DEPTHS})
        self.kept: dict[Any, Any] = {}

    def states(self, who: str, split: str) -> dict[int, Tensor]:
        """Activations of "expert", "target" or an untrained expert."""
        if (who, split) not in self.kept:
            texts = self.texts[split]
            reader = {"expert": self.expert, "target": self.target, **self.others}[who]
            layers = self.target_layers if who == "target" else self.expert_layers
            where = self.folder / f"{who}-{texts_hash(texts.texts)[:12]}"
            self.kept[who, split] = texts.states(reader, layers, where)
        return self.kept[who, split]

    @cached_property
    def slopes(self) -> dict[int, Tensor]:
        """Of the training texts."""
        return self.texts["train"].gradients(self.target_layers)

    def map(self, arm: str, e: int, t: int, alpha: float) -> Map:
        """An arm's map at one pair of layers. Each is fitted once."""
        key = (arm, 0 if arm in ("own", "mean") else e, t, alpha)
        if key not in self.kept:
            who = "untrained" if "untrained" in arm else "expert"
            x = None if arm in ("own", "mean") else self.states(who, "train")[e]
            own = self.states("target", "train")[t]
            h = own if arm in ("own", "both", "own and untrained") else None
            slope, norm = self.slopes[t], float(own.norm(dim=1).median())
            x, h = (None if side is None else side.masked_fill(massive_coordinates(side), 0.0) for side in (x, h))
            keep = ordinary_rows(own if x is None else x, own)
            x, h = (None if side is None else side[keep] for side in (x, h))
            self.kept[key] = fitted(x, h, slope[keep], norm, t, alpha)
        return self.kept[key]

    def steering(self, arm: str, split: str, setting: Sequence[Any], shift: int = 0) -> list[es.SteeringPlan]:
        """A plan for each text of a split; with `shift` the expert reads the text that stands so many places further."""
        layers, alpha, share = setting
        columns, found = self.texts[split].columns(self.target), []
        starts = np.cumsum([0, *map(len, columns)])
        maps = [self.map(arm, e, t, alpha) for e, t in layers]
        xs = self.states("untrained" if "untrained" in arm else "expert", split)
        for i, at in enumerate(columns):
            j = (i + shift) % len(columns)
            rows = np.arange(len(at)) % len(columns[j]) + starts[j]  # begins again where the other text is shorter
            vectors = [
                one.vectors(xs[e][rows], at, share / math.sqrt(len(maps)))
                for one, (e, _) in zip(maps, layers, strict=True)
            ]
            found.append(es.SteeringPlan(vectors, self.target))
        return found

    def bits(self, split: str, arms: Sequence[list[es.SteeringPlan]], who: Any = None) -> np.ndarray:
        """Bits `[1 + arm, text]` of what is predicted."""
        texts = self.texts[split]
        who = self.target if who is None else who
        return -likelihoods(who, list(arms), texts.encoded(who)).double().numpy() / math.log(2)

    def chosen(self, arm: str) -> list[Any]:
        """Layers, penalty and size with the fewest bits on the validation texts: the layers first, one pair or all targets'."""
        every = [[(e, t)] for e, t in product(self.expert_layers, self.target_layers)]
        every += [[(e, t) for t in self.target_layers] for e in self.expert_layers]
        if arm in ("own", "mean"):
            every = [layers for layers in every if layers[0][0] == self.expert_layers[0]]
        alphas = (1.0,) if arm == "mean" else ALPHAS

        def best(settings: list[list[Any]]) -> list[Any]:
            found = self.bits("validation", [self.steering(arm, "validation", s) for s in settings])[1:].sum(1)
            return settings[int(found.argmin())]

        layers = best([[some, *FIRST] for some in every])[0]
        return best([[layers, alpha, share] for alpha in alphas for share in SIZES])


def measure(pair: str, kind: str, data: Path, results: Results, folder: Path) -> None:
    """One line of bits a text and arm."""
    place = {"version": VERSION, "pair": pair, "kind": kind, "stage": "text"}
    if results.find(**place) is not None:
        return
    domain = Domain(pair, kind, data, folder)
    settings = {arm: domain.chosen(arm) for arm in ARMS}
    arms = {arm: domain.steering(arm, "test", setting) for arm, setting in settings.items()}
    # the same maps, the expert reading another text
    arms |= {f"{arm}, another text": domain.steering(arm, "test", settings[arm], shift=7) for arm in ("expert", "both")}
    found = domain.bits("test", list(arms.values()))
    bits = dict(zip(("unsteered", *arms), found.round(3).tolist(), strict=True))
    bits["expert alone"] = domain.bits("test", [], domain.expert)[0].round(3).tolist()
    counts = {name: len(texts.texts) for name, texts in domain.texts.items()}
    pairs = len(domain.slopes[domain.target_layers[0]])
    results.add({**place, "texts": counts, "pairs": pairs, "settings": settings, "bits": bits,
                 "characters": domain.texts["test"].characters.tolist()})  # fmt: skip


# -- tables ------------------------------------------------------------------------------------------------------------


def rate(line: Line, arm: str, pick: Any = slice(None)) -> float:
    """Bits a character of an arm."""
    return float(np.array(line["bits"][arm])[pick].sum() / np.array(line["characters"])[pick].sum())


def with_interval(line: Line, value: Any, resamples: int = 2000) -> str:
    """A value of (line, picked texts) with its 95 % bootstrap interval over texts."""
    rng, n = np.random.default_rng(0), len(line["characters"])
    found = [value(line, rng.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{value(line, slice(None)):.2f} [{low:.2f}, {high:.2f}]"


def share(line: Line, arm: str, pick: Any = slice(None), below: str = "unsteered") -> float:
    """Bits that an arm saves below another one, as a share of the expert's lead."""
    lead = rate(line, "unsteered", pick) - rate(line, "expert alone", pick)
    return (rate(line, below, pick) - rate(line, arm, pick)) / lead


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Every table by its name."""
    order = (
        "unsteered",
        "expert alone",
        "expert",
        "expert, another text",
        "untrained",
        "own",
        "both",
        "both, another text",
        "own and untrained",
        "mean",
    )
    body, shares = [], []
    for line in _texts(lines):
        body.append([line["pair"], line["kind"], *(f"{rate(line, arm):.4f}" for arm in order)])
        if rate(line, "expert alone") < rate(line, "unsteered"):
            shown = [with_interval(line, lambda x, p, a=arm: share(x, a, p)) for arm in ("expert", "own", "both")]
            # further features help a map a little, whosever they are
            beyond = [
                with_interval(line, lambda x, p, a=arm: share(x, "both", p, a)) for arm in ("own", "own and untrained")
            ]
            shares.append([line["pair"], line["kind"], *shown, *beyond])
    return {
        "text": markdown(["models", "text", *order], body),
        "text shares": markdown(
            ["models", "text", "expert", "own", "both", "both - own", "both - (own and untrained)"], shares
        ),
    }


def _texts(lines: Sequence[Line]) -> Iterator[Line]:
    return (line for line in lines if line.get("stage") == "text")
