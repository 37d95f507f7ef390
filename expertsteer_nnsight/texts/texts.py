"""What models read: texts, chat messages, and the token positions that are kept.

A text is a string, or a list of chat messages (`{"role": ..., "content": ...}`), which goes through the model's own
template and gets no special token besides those the template writes.
"""

from __future__ import annotations

import hashlib
import json
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.positions import affixes

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
            rows = json_lines(Path(texts))
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


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; empty lines are left out."""
    rows = []
    # not splitlines(): a JSON string may hold other line separators
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path.name} is no JSON ({error}).") from None
    return rows


def plain(text: Text) -> str:
    """A text's words as one string: of chat messages, their contents."""
    return text if isinstance(text, str) else "\n".join(str(m["content"]) for m in text)


def texts_hash(texts: Iterable[Text]) -> str:
    """Hash of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()[:16]


def copies(texts: Iterable[Text]) -> list[int]:
    """For each text the number of the first one that is equal to it, which is its own where none is."""
    first: dict[str, int] = {}
    return [first.setdefault(json.dumps(text), i) for i, text in enumerate(texts)]


def once(texts: Sequence[Text], what: str | None = None) -> list[Text]:
    """Each text once, in their order.

    Args:
        texts: strings or chat messages.
        what: they are, for the warning; None for none.

    Warns:
        UserWarning: some are there several times.
    """
    first = copies(texts)
    repeated = [i for i, number in enumerate(first) if i != number]
    if repeated and what is not None:
        warnings.warn(
            f"{len(repeated)} of the {len(texts)} {what} repeat another one (such as {plain(texts[repeated[0]])[:60]!r}): each is "
            "read once.",
            UserWarning,
            stacklevel=3,
        )
    return [text for i, text in enumerate(texts) if first[i] == i]


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a wrapped model.

    Raises:
        ValueError: it has none, as a bare `NNsight(module)` has not.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"The wrapped {type(model._module).__name__} has no tokenizer, which reading texts needs: "
            f'load it as TransformersModel(module, tokenizer=..., task="text-generation").'
        )
    return tokenizer


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


def encode_continued(
    tokenizer: Any, prompt: Text, continuation: str, known: tuple[Any, Any] | None = None
) -> tuple[list[int], int, int]:
    """Token ids of a prompt with its continuation, how many special ones stand before, and how many belong to the prompt.

    Tokens are those of the whole text where they begin with the prompt's; else the continuation's follow by themselves.

    Args:
        tokenizer: the model's.
        prompt: a string or chat messages, as in `encode`.
        continuation: what follows it.
        known: `affixes(tokenizer)`, where many texts are encoded.

    Raises:
        ValueError: as `encode`.
    """
    start, prefix = encode(tokenizer, prompt, known)
    whole = encode(tokenizer, prompt + continuation, known)[0] if isinstance(prompt, str) else start
    if continuation and (len(whole) == len(start) or whole[: len(start)] != start):
        whole = [*start, *tokenizer(continuation, add_special_tokens=False)["input_ids"]]
    return whole, prefix, len(start)


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
