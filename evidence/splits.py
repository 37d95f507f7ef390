"""A concept's texts in places that hold no near copies of one another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from expertsteer_nnsight.texts.overlap import words_of

NEAR = 0.6  # share of common words from which on two texts are near copies


class Apart:
    """Texts none of which is a near copy of another: takes a text, or tells that one like it is there already.

    Near copies share `NEAR` of their words, or one is whole in the other and has four words or more.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[frozenset[str], str]] = []

    def near(self, text: str) -> bool:
        """Whether a near copy of the text is there."""
        words, run = _read(text)
        return any(
            len(words & other) >= NEAR * len(words | other)
            or (len(min(words, other, key=len)) >= 4 and _in(run, whole))
            for other, whole in self.kept
        )

    def take(self, text: str) -> bool:
        """Takes the text unless a near copy of it is there; whether it was taken."""
        if self.near(text):
            return False
        self.kept.append(_read(text))
        return True

    def pairs(self, up: Iterable[str], down: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Pairs of a text of either side, as long as there are any that can be taken."""
        sides = iter(up), iter(down)
        while True:
            a, b = (next((t for t in side if self.take(t)), None) for side in sides)
            if a is None or b is None:
                return
            yield a, b


def _read(text: str) -> tuple[frozenset[str], str]:
    found = words_of(text)
    return frozenset(found), f" {' '.join(found)} "


def _in(a: str, b: str) -> bool:
    return a in b or b in a
