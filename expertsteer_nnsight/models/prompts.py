"""Which prompts the rows of a batch must begin with, told by the checksums of their tokens.

This module also runs on servers: torch is all that it may need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .positions import Positions

_PRIME, _BASE = (
    2**31 - 1,
    48271,
)  # products of a token id and a power of the base stay within 64 bits, and so do their sums


@dataclass(frozen=True)
class Prompts:
    """Prompts, one a row, by length and checksum.

    Attributes:
        lengths: tokens of each, with those that the tokenizer prepends.
        checksums: of their tokens.

    Raises:
        ValueError: not as many checksums as lengths, or a prompt of no tokens.
    """

    lengths: tuple[int, ...]
    checksums: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = all(type(x) is int for x in (*self.lengths, *self.checksums))
        fits = whole and min(self.lengths, default=0) > 0 and all(0 <= x < _PRIME for x in self.checksums)
        if len(self.lengths) != len(self.checksums) or not fits:
            raise ValueError(
                f"Prompts need a positive length and a checksum each, got {self.lengths} and {self.checksums}."
            )

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]]) -> Prompts:
        """From the token ids of each prompt."""
        return cls(tuple(map(len, ids)), tuple(int(_checksums(torch.tensor([row]), len(row))[0]) for row in ids))

    def take(self, rows: Sequence[int]) -> Prompts:
        """Some of them."""
        return Prompts(tuple(self.lengths[i] for i in rows), tuple(self.checksums[i] for i in rows))

    def check(self, positions: Positions) -> None:
        """Compares them with what a forward begins with; a decode step begins with nothing.

        Rows that `Positions.only_rows` leaves out are not compared.

        Raises:
            ValueError: another number of rows, a row that begins with other tokens, a prompt that comes in several forwards or
                after a cache of the caller's, or embeddings in place of tokens.
        """
        if positions.chunked or (positions.past > 0 and positions.step == 0):
            raise ValueError(
                "The plan was made for certain prompts, but a prompt comes in several forwards (prefill_chunk_size, or a cache "
                "that was passed in), so they cannot be compared: run whole prompts."
            )
        if positions.past > 0:
            return
        if len(positions.real) != len(self.lengths):
            raise ValueError(
                f"The plan was made for {len(self.lengths)} prompts, but the batch has {len(positions.real)} rows: make one for "
                "these prompts, or take(rows) of it."
            )
        if positions.ids is None:
            raise ValueError(
                "The plan was made for certain prompts, but the model was called with embeddings, which cannot be compared with "
                "them: call it with text or token ids."
            )
        seen = positions.real.any(1)
        lengths = torch.tensor(self.lengths, device=seen.device)
        most = min(max(self.lengths), positions.ids.shape[1])  # a longer prompt is another one
        mine = positions.real & (positions.index < lengths[:, None])
        found = _checksums(positions.ids, most, positions.index.clamp(0, most - 1), mine)
        other = seen & (found != torch.tensor(self.checksums, device=found.device))  # of a shorter row too
        if bool(other.any()):
            rows = other.nonzero()[:, 0].tolist()
            raise ValueError(
                f"The plan was made for other prompts: {len(rows)} of {len(other)} rows, the first of them row {rows[0]}, begin "
                "with other tokens. Make a plan for these prompts, or give them in the order that it was made for."
            )


def _checksums(ids: Tensor, length: int, index: Tensor | None = None, mine: Tensor | None = None) -> Tensor:
    """Of each row of `ids`: of the tokens that are `mine`, which have the numbers `index`; all in their order if None."""
    powers = [1]
    for _ in range(length - 1):
        powers.append(powers[-1] * _BASE % _PRIME)
    weights = torch.tensor(powers, device=ids.device)
    weights = weights if index is None else weights[index]
    each = (ids.long() + 1) * weights % _PRIME
    return (each if mine is None else each.masked_fill(~mine, 0)).sum(1) % _PRIME
