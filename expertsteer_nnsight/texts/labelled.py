"""Texts with labels: contrast pairs, labelled texts of every other source, and example data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .texts import Text, as_texts, copies, json_lines


@dataclass(frozen=True)
class ContrastPairs(Sequence):
    """Pairs of a positive and a negative text about the same thing.

    Attributes:
        positive: texts of the positive class.
        negative: texts of the negative class; `negative[i]` belongs to `positive[i]`.
        splits: a name a pair (`train`, `validation`, `test`), or empty.

    Raises:
        ValueError: other numbers of positives, negatives and splits, or something that is no text.
    """

    positive: Sequence[Any]
    negative: Sequence[Any]
    splits: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            object.__setattr__(self, name, tuple(as_texts(getattr(self, name))))
        object.__setattr__(self, "splits", tuple(self.splits))
        if len(self.positive) != len(self.negative) or len(self.splits) not in (0, len(self.positive)):
            raise ValueError(
                f"Contrast pairs need as many negatives as positives (and as many splits, if any): "
                f"found {len(self.positive)}, {len(self.negative)} and {len(self.splits)}."
            )

    @classmethod
    def of(cls, pairs: Any) -> ContrastPairs:
        """Pairs from `ContrastPairs`, (positive, negative) tuples, mappings with those keys, or a dataset or JSON-lines file.

        Raises:
            ValueError: none of these, or a row without one of the keys.
        """
        if isinstance(pairs, cls):
            return pairs
        if isinstance(pairs, (str, Path)):
            pairs = json_lines(Path(pairs))
        rows = list(pairs)
        if len(rows) == 2 and all(isinstance(r, list) and r and isinstance(r[0], str) for r in rows):
            raise ValueError(
                "Two lists of texts were given: write ContrastPairs(positive, negative), or a list of tuples."
            )
        if rows and isinstance(rows[0], Mapping):
            for i, row in enumerate(rows):
                if not {"positive", "negative"} <= set(row):
                    raise ValueError(
                        f"Contrast pairs need the keys positive and negative, but row {i} has {sorted(row)}."
                    )
            splits = [r["split"] for r in rows if "split" in r]
            return cls(tuple(r["positive"] for r in rows), tuple(r["negative"] for r in rows), tuple(splits))
        if not rows:
            raise ValueError("There are no contrast pairs: the list is empty.")
        if any(isinstance(r, str) or len(r) != 2 for r in rows):
            raise ValueError(
                "Contrast pairs must be (positive, negative) tuples, or rows with those keys; for two classes of single texts "
                "write LabelledTexts.of_classes(positive, negative)."
            )
        return cls(tuple(r[0] for r in rows), tuple(r[1] for r in rows))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> ContrastPairs:
        """Pairs from a file of JSON lines with `positive`, `negative` and perhaps `split`.

        Raises:
            ValueError: a line is no JSON, or lacks one of the keys.
        """
        return cls.of(Path(path))

    @classmethod
    def from_choices(cls, rows: Any) -> ContrastPairs:
        """A pair for each multiple-choice question: it with its right option, and with its first wrong one.

        `LabelledTexts.from_choices` takes all wrong options, and tells what `rows` may be.

        Raises:
            ValueError: as there.
        """
        rows = _choices(rows)
        splits = tuple(r["split"] for r in rows if "split" in r)
        return cls(tuple(r["right"] for r in rows), tuple(r["wrong"][0] for r in rows), splits)

    def split(self, name: str) -> ContrastPairs:
        """The pairs of one split.

        Raises:
            ValueError: no pair has it.
        """
        keep = [i for i, s in enumerate(self.splits) if s == name]
        if not keep:
            raise ValueError(f"No pair has the split {name!r}; there are {sorted(set(self.splits)) or 'no splits'}.")
        return self[keep]

    @property
    def texts(self) -> list[Text]:
        """All texts, pair by pair: positive 0, negative 0, positive 1, ..."""
        return [t for pair in zip(self.positive, self.negative, strict=True) for t in pair]

    @property
    def labels(self) -> list[int]:
        """1 for a positive and 0 for a negative text, in the order of `texts`."""
        return [1, 0] * len(self)

    @property
    def same(self) -> list[int]:
        """For each text the number of the first one that is equal to it, in the order of `texts`."""
        return copies(self.texts)

    @property
    def groups(self) -> list[int]:
        """Number of the pair that each text belongs to, in the order of `texts`."""
        return [i for i in range(len(self)) for _ in range(2)]

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, key: Any) -> Any:
        """Pair `key` as (positive, negative), or the pairs of a slice or list of indices."""
        if isinstance(key, int):
            return self.positive[key], self.negative[key]
        keep = range(len(self))[key] if isinstance(key, slice) else key
        return ContrastPairs(
            tuple(self.positive[i] for i in keep),
            tuple(self.negative[i] for i in keep),
            tuple(self.splits[i] for i in keep) if self.splits else (),
        )

    def __iter__(self) -> Iterator[tuple[Text, Text]]:
        return iter(zip(self.positive, self.negative, strict=True))

    def __repr__(self) -> str:
        counts = {s: self.splits.count(s) for s in dict.fromkeys(self.splits)}
        return f"ContrastPairs({len(self)} pairs{', ' + str(counts) if counts else ''})"


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with a number each: of two values the larger is the positive class, more are real-valued.

    Real values go with `rfm`, `mean_difference` and `pca` alone. They can be what the expert itself thinks, such as its
    log-probability of the right answer minus that of the best wrong one.

    Attributes:
        texts: strings or chat messages; this and the next two are kept as tuples.
        labels: one finite number a text, not all the same.
        groups: what texts have in common (a pair, a question): the texts of one group stay on one side of every split.
            One for each text if None.
        source: where the labels are from, for the record in a plan; "classes" or "real" if None.

    Raises:
        ValueError: other numbers of labels or groups than of texts, or labels that cannot be used.
    """

    texts: Sequence[Any]
    labels: Any
    groups: Any = None
    source: str | None = None

    def __post_init__(self) -> None:
        texts = tuple(as_texts(self.texts))
        labels = tuple(float(x) for x in self.labels)
        groups = tuple(range(len(texts)) if self.groups is None else self.groups)
        if not len(texts) == len(labels) == len(groups):
            raise ValueError(
                f"Labelled texts need one label and one group a text: found {len(texts)} texts, {len(labels)} labels and "
                f"{len(groups)} groups."
            )
        unusable = [i for i, x in enumerate(labels) if not math.isfinite(x)]
        if unusable:
            raise ValueError(
                f"Label {unusable[0]} is {labels[unusable[0]]}: labels must be finite, so leave that text out."
            )
        if len(set(labels)) < 2:
            raise ValueError(
                f"All {len(labels)} labels are {labels[0]:g}: a direction needs at least two different ones."
            )
        source = self.source or ("classes" if len(set(labels)) == 2 else "real")
        for name, value in (("texts", texts), ("labels", labels), ("groups", groups), ("source", source)):
            object.__setattr__(self, name, value)

    @property
    def same(self) -> list[int]:
        """For each text the number of the first one that is equal to it."""
        return copies(self.texts)

    @classmethod
    def of(cls, texts: Any) -> LabelledTexts:
        """`texts` itself if it is labelled, else the texts of what `ContrastPairs.of` takes."""
        if isinstance(texts, cls):
            return texts
        pairs = ContrastPairs.of(texts)
        return cls(pairs.texts, pairs.labels, pairs.groups, "pairs")

    @classmethod
    def of_classes(cls, positive: Any, negative: Any) -> LabelledTexts:
        """Two lists of texts that belong to no pairs, such as a domain's and generic ones; their numbers may differ."""
        one, other = as_texts(positive), as_texts(negative)
        return cls([*one, *other], [1] * len(one) + [0] * len(other))

    @classmethod
    def from_choices(cls, rows: Any) -> LabelledTexts:
        """Each multiple-choice question with its right option (1) and with each wrong one (0), grouped by question.

        Args:
            rows: mappings, a dataset or a JSON-lines file with `question`, `options` (a list) and `answer` (the right
                one's index, from 0). A text is question and option with a space between; an option is the assistant's
                answer where the question is chat messages.

        Raises:
            ValueError: a key is missing, there is no wrong option, or the answer is no index of an option.
        """
        rows = _choices(rows)
        texts = [t for r in rows for t in (r["right"], *r["wrong"])]
        labels = [x for r in rows for x in (1, *(0 for _ in r["wrong"]))]
        names = [r["question"] for r in rows for _ in range(1 + len(r["wrong"]))]
        first = {name: i for i, name in reversed(list(enumerate(names)))}  # a question that comes twice is one group
        return cls(texts, labels, [first[name] for name in names], "choices")

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        values = sorted(set(self.labels))
        what = {v: self.labels.count(v) for v in values} if len(values) == 2 else f"{values[0]:.3g} to {values[-1]:.3g}"
        return f"LabelledTexts({len(self)} texts in {len(set(self.groups))} groups, {self.source}, labels {what})"


def _choices(rows: Any) -> list[dict[str, Any]]:
    """For each question its texts with the right and the wrong options, its own text, and its split if it has one."""
    found = []
    for i, row in enumerate(json_lines(Path(rows)) if isinstance(rows, (str, Path)) else rows):
        if not isinstance(row, Mapping) or not {"question", "options", "answer"} <= set(row):
            keys = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"Multiple choice needs the keys question, options and answer, but row {i} has {keys}.")
        question, options, answer = row["question"], list(row["options"]), row["answer"]
        if isinstance(answer, bool) or not hasattr(answer, "__index__") or not 0 <= answer < len(options):
            raise ValueError(f"The answer of row {i} is {answer!r}: it must be an index of its {len(options)} options.")
        right = options.pop(answer)
        if not options or right in options:
            raise ValueError(f"Row {i} has no wrong option, or one that equals the right one: {row['options']!r:.80}.")
        made = [
            f"{question} {o}" if isinstance(question, str) else [*question, {"role": "assistant", "content": str(o)}]
            for o in (right, *options)
        ]
        found.append({"right": made[0], "wrong": made[1:], "question": json.dumps(question)})
        found[-1] |= {"split": row["split"]} if "split" in row else {}
    return found


def example(name: str) -> Any:
    """Data written for this project: `sentiment_pairs`, `general`, `sentiment_in_domain` or `sentiment_probe`.

    `sentiment_pairs` are `ContrastPairs` with splits; `general` and `sentiment_in_domain` lists of anchor texts, disjoint
    from the pairs; `sentiment_probe` a mapping of prompts, neutral texts and words to measure with.

    Raises:
        ValueError: no such data.
    """
    folder = resources.files("expertsteer_nnsight") / "data"
    for suffix in (".jsonl", ".txt", ".json"):
        file = folder / (name + suffix)
        if file.is_file():
            content = file.read_text(encoding="utf-8")
            if suffix == ".jsonl":
                return ContrastPairs.of([json.loads(line) for line in content.split("\n") if line])
            return [line for line in content.split("\n") if line] if suffix == ".txt" else json.loads(content)
    names = sorted(f.name.rsplit(".", 1)[0] for f in folder.iterdir() if not f.name.startswith("_"))
    raise ValueError(f"There is no example data {name!r}: choose one of {', '.join(names)}.")
