"""What anchors must not share with labelled texts: the texts themselves, or near copies of them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from .texts import Text, plain

Words = tuple[str, ...]


def overlap(anchors: Iterable[Text], labelled: Iterable[Text]) -> list[int]:
    """Numbers of the anchors that are a labelled text, or nearly so.

    With them a map carries the labels over, whatever the expert: an untrained one then does as well. Found are texts that
    are equal up to case, white space and punctuation, and texts of at least four words that are whole in the other one.
    """
    first, other = [words_of(t) for t in anchors], [words_of(t) for t in labelled]
    known = {"".join(w) for w in other}
    found = {i for i, w in enumerate(first) if "".join(w) in known}
    found |= {i for i, _ in _inside(first, other)} | {i for _, i in _inside(other, first)}
    return sorted(found)


def _inside(longer: list[Words], shorter: list[Words], least: int = 4) -> Iterator[tuple[int, int]]:
    """(i, j) where `shorter[j]`, of `least` words or more, is a run of words of `longer[i]`."""
    # looked up by their first words, then by length: each against each would take as long as both numbers multiplied
    starts: dict[Words, dict[int, dict[Words, list[int]]]] = {}
    for j, words in enumerate(shorter):
        if len(words) >= least:
            starts.setdefault(words[:least], {}).setdefault(len(words), {}).setdefault(words, []).append(j)
    for i, words in enumerate(longer):
        for at in range(len(words) - least + 1):
            for size, wholes in starts.get(words[at : at + least], {}).items():
                for j in wholes.get(words[at : at + size], ()):
                    yield i, j


def check_disjoint(anchors: Iterable[Text], labelled: Iterable[Text]) -> None:
    """Refuses anchors that `overlap` with the labelled texts.

    Raises:
        ValueError: some do.
    """
    anchors = list(anchors)
    shared = overlap(anchors, labelled)
    if shared:
        raise ValueError(f"{overlap_message(anchors, shared)}: take them out.")


def overlap_message(anchors: Sequence[Text], shared: Sequence[int]) -> str:
    """What is to be said of the anchors that `overlap` found, without a full stop."""
    return (
        f"{len(shared)} of the {len(anchors)} anchors are labelled texts too, or nearly (such as "
        f"{plain(anchors[shared[0]])[:60]!r}), so that the map carries labels over for any expert, even an untrained one"
    )


def words_of(text: Text) -> Words:
    """The words of a text, case-folded, without punctuation."""
    folded = unicodedata.normalize("NFKC", plain(text)).casefold()
    words = re.findall(r"[^\W_]+", re.sub(r"['’`´]", "", folded))
    return tuple(words or folded.split())  # a text of punctuation alone equals only itself
