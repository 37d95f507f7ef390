"""Steering vectors: what is done to the residual stream after one layer, at which tokens, how strongly.

This module also runs on servers: torch and nnsight are all that it may need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..numeric import finite, unit
from .header import BLENDS, VectorHeader

if TYPE_CHECKING:
    from ..models.positions import Positions


def _add(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return h + size * v


def _add_keep_norm(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    moved = h + size * v
    return moved * (h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-30))


def _project_out(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return h - size * (h * v).sum(-1, keepdim=True) * v


def _clamp(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return h + (size - (h * v).sum(-1, keepdim=True)) * v


def _blend(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return h + size * (v - h)


# h [..., hidden], v and size of shapes that broadcast to it; size in the stream's own units, or a share
OPS = {
    "add": _add,
    "add_keep_norm": _add_keep_norm,
    "project_out": _project_out,
    "clamp": _clamp,
    "blend": _blend,
    "innovation": _blend,
}


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction, or an activation, with a layer and a strength.

    With h the residual stream at a position, v the direction, s = strength x residual_norm:

    - `add`: h + s v
    - `add_keep_norm`: (h + s v) scaled back to the norm of h (arXiv 2606.06735)
    - `clamp`: h with its component along v set to s
    - `project_out`: h - strength (h·v) v; strength 1 takes the component away, and residual_norm plays no part
      (arXiv 2406.11717)

    With z an activation in place of a direction, at its own length, and a the strength, a share (1 replaces h by z):

    - `blend`: h + a (z - h)
    - `innovation`: h + a (z - p(h)), where the affine map p tells what h itself predicts of z, so that only what z adds counts

    Attributes:
        layer: decoder layer of the target, counted from 0; its output is edited.
        direction: `[hidden]`, or `[row, hidden]` for one a row of the batch; stored as unit vectors, float32. With `blend` and
            `innovation` the activations z, stored as they are. With `given` places `[place, hidden]`, row after row.
        strength: in residual norms if `residual_norm` is given, else in the stream's own units; a number, or one a row.
        residual_norm: median norm of the target's residual stream at this layer (`Activations.norm`).
        op: one of `add`, `add_keep_norm`, `project_out`, `clamp`, `blend`, `innovation`.
        where: `all`, `prompt`, `completion`, `last_prompt` or `given` (see `Positions.mask`).
        from_step: with `completion`: the first new token whose prediction is steered.
        skip_special: leave special tokens that the tokenizer prepends (`<bos>`) as they are.
        at: with `given`: for each row, which of its tokens are edited, counted from 0 with the prepended ones.
        predictor: with `innovation`: p as a matrix `[hidden + 1, hidden]`, whose last row is the constant; `[1, hidden]` for a
            constant alone.

    Raises:
        ValueError: zero, NaN or infinite directions or strengths, unknown op or where, a negative layer, places or a predictor
            that are missing or that nothing asks for, or of another number or shape than the direction.
    """

    layer: int
    direction: Tensor
    strength: float | int | Tensor = 1.0
    residual_norm: float | int | None = None
    op: str = "add"
    where: str = "all"
    from_step: int = 0
    skip_special: bool = True
    at: Sequence[Sequence[int]] | None = None
    predictor: Tensor | None = None

    def __post_init__(self) -> None:
        direction = torch.as_tensor(self.direction).detach()
        if direction.ndim not in (1, 2):
            raise ValueError(f"direction must be [hidden] or [row, hidden], but has shape {tuple(direction.shape)}.")
        set_ = object.__setattr__
        if self.at is not None:
            set_(self, "at", tuple(tuple(map(int, row)) for row in self.at))
        for name, kind in (("layer", int), ("from_step", int), ("residual_norm", float)):
            if getattr(self, name) is not None:
                set_(self, name, kind(getattr(self, name)))  # numpy and torch scalars would not go into a file's header
        checked = finite if self.op in BLENDS else unit
        set_(self, "direction", checked(direction.to(torch.float64), f"The direction of layer {self.layer}").float())
        strength = self.strength
        if not isinstance(strength, (int, float)):
            strength = torch.as_tensor(strength, dtype=torch.float32).detach()
            strength = strength.item() if strength.ndim == 0 else strength
        set_(self, "strength", strength if isinstance(strength, Tensor) else float(strength))
        if self.at is not None and direction.ndim == 2 and len(direction) != sum(map(len, self.at)):
            raise ValueError(
                f"{len(direction)} directions but {sum(map(len, self.at))} places at layer {self.layer}: give one a place."
            )
        if self.rows == -1:
            rows = len(self.direction) if self.at is None else len(self.at)
            of = "directions" if self.at is None else "rows of places"
            raise ValueError(
                f"{rows} {of} but {torch.as_tensor(self.strength).numel()} strengths at layer {self.layer}."
            )
        _ = self.header  # which checks the rest
        self._check_predictor()

    def _check_predictor(self) -> None:
        if (self.predictor is None) == (self.op == "innovation"):
            raise ValueError('op="innovation" needs a predictor, and no other op takes one.')
        if self.predictor is None:
            return
        width = self.direction.shape[-1]
        predictor = torch.as_tensor(self.predictor)
        if predictor.shape not in ((width + 1, width), (1, width)):
            raise ValueError(
                f"The predictor must be [hidden + 1, hidden], here ({width + 1}, {width}), or [1, hidden], but has "
                f"{tuple(predictor.shape)}."
            )
        finite(predictor, f"The predictor of layer {self.layer}")
        if predictor.requires_grad or predictor.dtype != torch.float32:
            predictor = predictor.detach().float()
        object.__setattr__(self, "predictor", predictor)  # the same object for many vectors travels once

    @property
    def header(self) -> VectorHeader:
        """All but the direction, in plain values."""
        strength = self.strength
        return VectorHeader(
            layer=self.layer,
            strength=tuple(strength.tolist()) if isinstance(strength, Tensor) else float(strength),
            residual_norm=self.residual_norm,
            op=self.op,
            where=self.where,
            from_step=self.from_step,
            skip_special=self.skip_special,
            rows=self.rows,
            at=None if self.at is None else tuple(tuple(row) for row in self.at),
        )

    @property
    def rows(self) -> int | None:
        """How many rows a batch must have, or None where every row gets the same (-1: contradictory)."""
        by_row = self.at if self.at is not None else self.direction if self.direction.ndim == 2 else None
        sizes = {len(t) for t in (by_row, self.strength) if isinstance(t, (Tensor, tuple))}
        return None if not sizes else sizes.pop() if len(sizes) == 1 else -1

    def take(self, rows: Sequence[int]) -> SteeringVector:
        """The vector of some rows; itself where every row gets the same.

        Raises:
            IndexError: a row that it does not have.
        """
        if self.rows is None:
            return self
        wrong = [i for i in rows if not 0 <= i < self.rows]
        if wrong:
            raise IndexError(f"Row {wrong[0]} was asked for, but the vector has {self.rows} rows.")
        kept, direction = list(rows), self.direction
        at = None if self.at is None else tuple(self.at[i] for i in kept)
        if direction.ndim == 2 and self.at is not None:
            first = [0, *accumulate(map(len, self.at))]
            direction = direction[[place for i in kept for place in range(first[i], first[i + 1])]]
        elif direction.ndim == 2:
            direction = direction[kept]
        strength = self.strength[kept] if isinstance(self.strength, Tensor) else self.strength
        return replace(self, direction=direction, strength=strength, at=at)

    @property
    def kind(self) -> tuple[int | str | bool, ...]:
        """What vectors have in common that can be rows of one (`stack`)."""
        predictor = 0 if self.predictor is None else self.predictor.data_ptr()  # shared, not copied
        return (self.layer, self.op, self.where, self.from_step, self.skip_special, predictor)

    @property
    def length(self) -> float | Tensor:
        """The s of the formulas above, a number or `[row]`: strength x residual_norm, in the stream's own units.

        For `project_out`, `blend` and `innovation` it is the strength alone.
        """
        return self.strength * (self.residual_norm or 1.0) if self.in_norms else self.strength

    @property
    def in_norms(self) -> bool:
        """Whether the strength is in residual norms; it is a share otherwise."""
        return self.op not in ("project_out", *BLENDS)

    def edit(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """`h` `[row, position, hidden]` steered where `mask` `[row, position]` is true; sums in float32 or wider.

        Raises:
            ValueError: strengths or directions for another number of rows, or places that only `edit_at` knows.
        """
        self._check_rows(h)
        if self.at is not None:
            raise ValueError(
                "The vector has places of its own, which a mask does not tell: call edit_at(h, positions) instead."
            )
        if mask is not None and self.predictor is not None and len(self.predictor) > 1:  # a product, at few positions
            row, column = mask.nonzero(as_tuple=True)
            return self._edited_at(h, row, column, row)
        wide, v, size = self._wide(h)
        v = v[:, None] if v.ndim == 2 else v[None, None]
        new = self._edited(wide, v, size.reshape(-1, 1, 1)).to(h.dtype)
        return new if mask is None else torch.where(mask[..., None], new, h)

    def edit_at(self, h: Tensor, positions: Positions, prompt_lengths: Any = None) -> Tensor:
        """`h` `[row, position, hidden]` steered at the positions that the vector names, of the running forward.

        Args:
            h: output of the layer.
            positions: of this forward.
            prompt_lengths: one a row, in real tokens: where a teacher-forced completion starts.

        Raises:
            ValueError: strengths, directions or places for another number of rows.
        """
        if self.at is None:
            mask = positions.mask(self.where, self.from_step, self.skip_special, prompt_lengths)
            return self.edit(h, mask.to(h.device))
        self._check_rows(h)
        row, column, place = (found.to(h.device) for found in positions.columns(self.at))
        return self._edited_at(h, row, column, place)

    def _edited_at(self, h: Tensor, row: Tensor, column: Tensor, direction: Tensor) -> Tensor:
        """`h` steered at some (row, column), each with the direction of that number where there are several."""
        if len(row) == 0:
            return h
        wide, v, size = self._wide(h[row, column])
        size = size.reshape(-1, 1)
        new = h.clone()
        edited = self._edited(wide, v[direction] if v.ndim == 2 else v, size[row] if len(size) > 1 else size)
        new[row, column] = edited.to(h.dtype)
        return new

    def _check_rows(self, h: Tensor) -> None:
        if self.rows not in (None, len(h)):
            raise ValueError(f"The plan has vectors or strengths for {self.rows} rows, but the batch has {len(h)}.")

    def _wide(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h, the direction and the length, in float32 or wider and on one device."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        size = torch.as_tensor(self.length, dtype=dtype, device=h.device)
        return h.to(dtype), self.direction.to(h.device, dtype), size

    def _edited(self, h: Tensor, v: Tensor, size: Tensor) -> Tensor:
        if self.predictor is not None:
            known = self.predictor.to(h)
            told = known[-1]
            if len(known) > 1:
                with torch.autocast(h.device.type, enabled=False):  # a server's would round the product
                    told = told + h @ known[:-1]
            v = v + h - told
        return OPS[self.op](h, v, size)


def stack(vectors: Sequence[SteeringVector], unsteered: bool = False) -> SteeringVector:
    """One vector with a row for each of `vectors`, which may differ in direction, strength, residual norm and places alone.

    Args:
        vectors: without rows; with `given` places, of one row.
        unsteered: put a row of strength 0 before them.

    Raises:
        ValueError: they differ in more, or have rows themselves.
    """
    first = vectors[0]
    kinds = {v.kind for v in vectors}
    if len(kinds) > 1 or any(v.rows != (None if v.at is None else 1) for v in vectors):
        raise ValueError(
            f"Plans share a forward only with the same layers, ops and places, and none per row: {sorted(kinds)}."
        )
    # where norms differ, a row's strength is told in those of the first
    share = [(v.residual_norm or 1) / (first.residual_norm or 1) if v.in_norms else 1.0 for v in vectors]
    strength = [float(v.strength) * s for v, s in zip(vectors, share, strict=True)]
    if first.at is None:
        direction, at = torch.stack([first.direction] * unsteered + [v.direction for v in vectors]), None
    else:
        rows = [v.at[0] for v in vectors if v.at is not None]
        at = [()] * unsteered + rows
        direction = torch.cat([v.direction.expand(len(row), -1) for v, row in zip(vectors, rows, strict=True)])
    return replace(first, direction=direction, strength=torch.tensor([0.0] * unsteered + strength), at=at)


def needs_positions(vector: SteeringVector, prefix: tuple[int, ...]) -> bool:
    """Whether a vector's positions must be read from the model's inputs."""
    # a vector at every position reads nothing from the root: padding cannot be seen by any real token
    return vector.where != "all" or (vector.skip_special and bool(prefix))
