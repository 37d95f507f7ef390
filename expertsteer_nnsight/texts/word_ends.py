"""Many anchors from one text: the places where two models have read the same characters.

A causal model's state at a token is the last-token state of the text up to there. Wherever the tokenizers of both models end a
token at the same character, both have read the same prefix, so that place is a pair of states for an aligner as good as a text
of its own, and costs no forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..models.positions import prefix_ids
from .texts import Text, encode_continued


def token_ends(tokenizer: Any, text: Text, prefix: int) -> dict[int, int]:
    """For each character offset of a string where a token ends, that token's column; none for chat messages.

    Args:
        tokenizer: a fast one.
        text: as it is encoded.
        prefix: number of prepended special tokens, which end nowhere.
    """
    if not isinstance(text, str):
        return {}
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    # of several tokens of one character the last has read all of it; appended special tokens have empty spans
    return {end: column for column, (start, end) in enumerate(offsets) if column >= prefix and end > start}


class Continued(NamedTuple):
    """Where an expert's tokens and a target's end at the same character of a prompt with its continuation.

    Attributes:
        places: (number of the target's token, prepended ones counted; character at which the expert's token ends in what it
            reads), ascending.
        prompt: how many of the target's tokens belong to the prompt.
    """

    places: list[tuple[int, int]]
    prompt: int


def continued_ends(expert: Any, target: Any, prompt: Text, continuation: str, read: Text | None = None) -> Continued:
    """The shared ends of a prompt and its continuation, without what ends within the first token of either model.

    Args:
        expert: tokenizer of the model that reads the whole text.
        target: the tokenizer whose tokens are numbered; the continuation's are those of `encode_continued`.
        prompt: a string.
        continuation: what follows it; may be empty.
        read: what the expert reads in the prompt's place, before the same continuation. Its places count back from its end.

    Raises:
        ValueError: chat messages, whose templates differ, or a tokenizer that tells no character offsets.
    """
    read = prompt if read is None else read
    if not isinstance(prompt, str) or not isinstance(read, str):
        raise ValueError("Shared token ends need strings, but a prompt has chat messages, whose templates differ.")
    if not all(getattr(tokenizer, "is_fast", False) for tokenizer in (expert, target)):
        raise ValueError(
            "A tokenizer tells no character offsets (it is not a fast one), so no token ends can be compared."
        )
    ids, prefix, border = encode_continued(target, prompt, continuation)
    if list(target(prompt + continuation)["input_ids"])[: len(ids)] == ids:
        mine = token_ends(target, prompt + continuation, prefix)
    else:  # the continuation's tokens by themselves
        offsets = target(continuation, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        mine = token_ends(target, prompt, prefix)
        mine |= {len(prompt) + end: border + n for n, (start, end) in enumerate(offsets) if end > start}
    mine = {end: column for end, column in mine.items() if column > prefix}
    other = len(prefix_ids(expert))

    def ends(text: str) -> list[int]:
        return [end for end, column in token_ends(expert, text, other).items() if column > other]

    own = sorted(set(ends(prompt + continuation)) & set(mine))
    within, after = ([e for e in own if (e <= len(prompt)) == inside] for inside in (True, False))
    if read == prompt:
        return Continued([(mine[end], end) for end in own], border)
    theirs = ends(read + continuation)
    back = sorted((end for end in theirs if end <= len(read)), reverse=True)
    places = [(mine[end], at) for end, at in zip(reversed(within), back, strict=False)][::-1]
    shift = len(read) - len(prompt)
    return Continued(places + [(mine[end], end + shift) for end in after if end + shift in set(theirs)], border)


def prefixes(texts: Sequence[Text], ends: Sequence[Sequence[int]] | None) -> list[Text]:
    """What a model has read at each row of its states: each text up to each of its `ends`, and then the whole text.

    Args:
        texts: as they were read.
        ends: what `shared_ends` gives; None where each text has one row.
    """
    if ends is None:
        return list(texts)
    return [
        text if end is None else text[:end] for text, mine in zip(texts, ends, strict=True) for end in (*mine, None)
    ]


def shared_ends(
    texts: Sequence[Text], tokenizers: Sequence[tuple[Any, int]], k: int, random_state: int = 0
) -> list[list[int]]:
    """Up to `k` character offsets of each text at which every tokenizer ends a token, in ascending order.

    The end of the text is not among them, nor what ends within the first token of any model, whose state is an outlier.

    Args:
        texts: strings; chat messages have none, since templates differ.
        tokenizers: each with the number of special tokens that it prepends.
        k: how many are drawn of a text that has more.
        random_state: seed of the draws.

    Warns:
        UserWarning: a tokenizer tells no offsets (it is not a fast one), so there are none.
    """
    if k < 1:
        return [[] for _ in texts]
    if not all(getattr(tokenizer, "is_fast", False) for tokenizer, _ in tokenizers):
        warnings.warn("A tokenizer tells no character offsets (it is not a fast one): anchors are read at their ends only.",
                      stacklevel=2)  # fmt: skip
        return [[] for _ in texts]
    found = []
    for number, text in enumerate(texts):
        common: set[int] | None = None
        for tokenizer, prefix in tokenizers:
            ends = {end for end, column in token_ends(tokenizer, text, prefix).items() if column > prefix}
            common = ends if common is None else common & ends
        inner = sorted(end for end in common or () if isinstance(text, str) and end < len(text.rstrip()))
        if len(inner) > k:
            inner = sorted(np.random.default_rng([random_state, number]).choice(inner, k, replace=False).tolist())
        found.append(inner)
    return found
