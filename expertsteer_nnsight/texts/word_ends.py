"""Many anchors from one text: the places where two models have read the same characters.

A causal model's state at a token is the last-token state of the text up to there. Wherever the tokenizers of both models end a
token at the same character, both have read the same prefix, so that place is a pair of states for an aligner as good as a text
of its own, and costs no forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .texts import Text


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
