"""What models read: contrast pairs, anchors, chat messages, and the token positions that are kept.

A text is a string, or a list of chat messages (`{"role": ..., "content": ...}`), which goes through the model's own
template and gets no special token besides those the template writes.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .positions import affixes

Text = str | list[dict[str, str]]
Position = str | int | Callable[[list[int]], int]


def as_texts(texts: Any, column: str = "text") -> list[Text]:
    """A list of texts from an iterable of texts, a Hugging Face dataset with `column`, or the path of a file.

    Files: `.jsonl` with `column` on each line, anything else one text a line.

    Raises:
        ValueError: no texts, or something that is neither a string nor chat messages.
    """
    if isinstance(texts, Path) or (
        isinstance(texts, str) and "\n" not in texts and Path(texts).suffix in (".txt", ".jsonl")
    ):
        if Path(texts).suffix == ".jsonl":
            rows = _json_lines(Path(texts))
            if any(column not in row for row in rows):
                raise ValueError(f"Some lines of {Path(texts).name} have no {column!r}.")
            texts = [row[column] for row in rows]
        else:
            texts = [line for line in Path(texts).read_text(encoding="utf-8").split("\n") if line.strip()]
    if isinstance(texts, str):
        raise ValueError("One string was given where a list of texts is needed: write [text].")
    if hasattr(texts, "column_names"):
        names = texts.column_names
        if names is not None and column not in names:
            raise ValueError(
                f"The dataset has no column {column!r}, only {names}: pass dataset[{names[0]!r}], or rename it."
            )
        texts = [row[column] for row in texts]
    found = [list(t) if isinstance(t, (list, tuple)) else t for t in texts]
    for i, text in enumerate(found):
        chat = isinstance(text, list) and text and all(isinstance(m, Mapping) and "content" in m for m in text)
        if not chat and not (isinstance(text, str) and text.strip()):
            raise ValueError(f"Text {i} is neither a non-empty string nor a list of chat messages: {text!r:.80}.")
    if not found:
        raise ValueError("There are no texts.")
    return found


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # not splitlines(): a JSON string may hold other line separators
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path.name} is no JSON ({error}).") from None
    return rows


@dataclass(frozen=True)
class ContrastPairs(Sequence):
    """Pairs of a positive and a negative text about the same thing.

    Attributes:
        positive: texts of the positive class.
        negative: texts of the negative class; `negative[i]` belongs to `positive[i]`.
        splits: a name a pair (`train`, `validation`, `test`), or empty.
    """

    positive: tuple[Any, ...]
    negative: tuple[Any, ...]
    splits: tuple[str, ...] = ()

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
        """Pairs from `ContrastPairs`, (positive, negative) tuples, mappings with those keys, or a dataset or JSON-lines file."""
        if isinstance(pairs, cls):
            return pairs
        if isinstance(pairs, (str, Path)):
            pairs = _json_lines(Path(pairs))
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
        if not rows or any(isinstance(r, str) or len(r) != 2 for r in rows):
            raise ValueError("Contrast pairs must be (positive, negative) tuples, or rows with those keys.")
        return cls(tuple(r[0] for r in rows), tuple(r[1] for r in rows))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> ContrastPairs:
        """Pairs from a file of JSON lines with `positive`, `negative` and perhaps `split`."""
        return cls.of(Path(path))

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


def check_disjoint(anchors: Iterable[Text], labelled: Iterable[Text]) -> None:
    """Refuses anchors that are among the labelled texts.

    With them a map carries the labels over, whatever the expert: an untrained one then does as well. Only texts that are
    equal up to case and white space are found.

    Raises:
        ValueError: some text is in both.
    """
    shared = {_key(t) for t in anchors} & {_key(t) for t in labelled}
    if shared:
        raise ValueError(
            f"{len(shared)} of the anchors are labelled texts too (such as {next(iter(shared))[:60]!r}): "
            f"take them out, because a map fitted on them carries the labels over for any expert, even an untrained one."
        )


def _key(text: Text) -> str:
    return " ".join((text if isinstance(text, str) else json.dumps(text)).lower().split())


def texts_hash(texts: Iterable[Text]) -> str:
    """Hash of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()[:16]


def encode(tokenizer: Any, text: Text, known: tuple[Any, Any] | None = None) -> tuple[list[int], int]:
    """Token ids of a text, and how many special tokens stand before it.

    Strings get what the tokenizer prepends, and not what it may append. Chats get what their template writes: a chat that
    ends in an assistant's message as it is, any other with the assistant's turn opened.

    Args:
        tokenizer: the model's.
        text: a string or chat messages.
        known: `affixes(tokenizer)`, where many texts are encoded.

    Raises:
        ValueError: chat messages without a template, a string that brings its own `<bos>`, or a text of no tokens.
    """
    before, after = known or affixes(tokenizer)
    if isinstance(text, str):
        ids = list(tokenizer(text)["input_ids"])
        ids = ids[: len(ids) - len(after)]
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("Chat messages were given, but this model's tokenizer has no chat template: pass strings.")
        opened = text[-1].get("role") != "assistant"
        made = tokenizer.apply_chat_template(text, add_generation_prompt=opened, tokenize=True, return_dict=True)
        ids = list(made["input_ids"])
    count = len(before) if before and tuple(ids[: len(before)]) == before else 0
    if len(ids) == count:
        raise ValueError(f"A text has no tokens of its own: {text!r:.80}.")
    if count and tuple(ids[count : 2 * count]) == before:
        raise ValueError(
            f"A text begins with the special token that the tokenizer prepends, and would have it twice ({text!r:.60}): "
            f"leave it out, or pass chat messages instead of a filled template."
        )
    return ids, count


def token_index(position: Position, ids: list[int], prefix: int) -> int | None:
    """Which token of `ids` a position rule means, counted from 0; None for the mean over all.

    Rules count the text's own tokens: never padding, never a special token that the tokenizer prepends.

    Args:
        position: `"last"`, `"mean"`, an index (negative from the end), or a function of the text's own ids to an index.
        ids: all ids of the text.
        prefix: number of prepended special tokens.

    Raises:
        ValueError: an unknown rule, or an index that the text does not have.
    """
    own = len(ids) - prefix
    if position == "mean":
        return None
    index = -1 if position == "last" else position(ids[prefix:]) if callable(position) else position
    try:
        index = operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f'position must be "last", "mean", an index or a function to an index, got {position!r}.'
        ) from None
    if not -own <= index < own:
        raise ValueError(f"Position {index} was asked for, but a text has only {own} tokens of its own.")
    return prefix + index % own


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
