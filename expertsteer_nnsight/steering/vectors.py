"""Steering vectors: what is done to the residual stream after one layer, at which tokens, how strongly.

This module also runs on servers: torch and nnsight are all that it may need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numeric import unit
from .header import VectorHeader


def _add(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return h + size * v


def _add_keep_norm(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    moved = h + size * v
    return moved * (h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-30))


def _project_out(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return h - size * (h * v).sum(-1, keepdim=True) * v


def _clamp(h: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return h + (size - (h * v).sum(-1, keepdim=True)) * v


# h [row, position, hidden], v unit [row or 1, 1, hidden], size [row or 1, 1, 1] in the stream's own units
OPS = {"add": _add, "add_keep_norm": _add_keep_norm, "project_out": _project_out, "clamp": _clamp}


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction with a layer and a strength.

    With h the residual stream at a position, v the direction, s = strength x residual_norm:

    - `add`: h + s v
    - `add_keep_norm`: (h + s v) scaled back to the norm of h (arXiv 2606.06735)
    - `clamp`: h with its component along v set to s
    - `project_out`: h - strength (h·v) v; strength 1 takes the component away, and residual_norm plays no part
      (arXiv 2406.11717)

    Attributes:
        layer: decoder layer of the target, counted from 0; its output is edited.
        direction: `[hidden]`, or `[row, hidden]` for one a row of the batch; stored as unit vectors, float32.
        strength: in residual norms if `residual_norm` is given, else in the stream's own units; a number, or one a row.
        residual_norm: median norm of the target's residual stream at this layer (`Activations.norm`).
        op: one of `add`, `add_keep_norm`, `project_out`, `clamp`.
        where: `all`, `prompt` or `completion` (see `positions`).
        from_step: with `completion`: the first new token whose prediction is steered.
        skip_special: leave special tokens that the tokenizer prepends (`<bos>`) as they are.

    Raises:
        ValueError: zero, NaN or infinite directions or strengths, unknown op or where, a negative layer.
    """

    layer: int
    direction: Tensor
    strength: float | int | Tensor = 1.0
    residual_norm: float | int | None = None
    op: str = "add"
    where: str = "all"
    from_step: int = 0
    skip_special: bool = True

    def __post_init__(self) -> None:
        direction = torch.as_tensor(self.direction).detach()
        if direction.ndim not in (1, 2):
            raise ValueError(f"direction must be [hidden] or [row, hidden], but has shape {tuple(direction.shape)}.")
        set_ = object.__setattr__
        for name, kind in (("layer", int), ("from_step", int), ("residual_norm", float)):
            if getattr(self, name) is not None:
                set_(self, name, kind(getattr(self, name)))  # numpy and torch scalars would not go into a file's header
        set_(self, "direction", unit(direction.to(torch.float64), f"The direction of layer {self.layer}").float())
        strength = self.strength
        if not isinstance(strength, (int, float)):
            strength = torch.as_tensor(strength, dtype=torch.float32).detach()
            strength = strength.item() if strength.ndim == 0 else strength
        set_(self, "strength", strength if isinstance(strength, Tensor) else float(strength))
        if self.rows == -1:
            raise ValueError(
                f"{len(self.direction)} directions but {torch.as_tensor(self.strength).numel()} strengths at layer {self.layer}."
            )
        _ = self.header  # which checks the rest

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
        )

    @property
    def rows(self) -> int | None:
        """How many rows a batch must have, or None where every row gets the same (-1: contradictory)."""
        sizes = {
            len(t)
            for t in (self.direction if self.direction.ndim == 2 else None, self.strength)
            if isinstance(t, Tensor)
        }
        return None if not sizes else sizes.pop() if len(sizes) == 1 else -1

    @property
    def length(self) -> float | Tensor:
        """The s of the formulas above, a number or `[row]`: strength x residual_norm, in the stream's own units.

        For `project_out` it is the strength alone.
        """
        return self.strength if self.op == "project_out" else self.strength * (self.residual_norm or 1.0)

    def edit(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """`h` `[row, position, hidden]` steered where `mask` `[row, position]` is true; sums in float32 or wider.

        Raises:
            ValueError: strengths or directions for another number of rows.
        """
        if self.rows not in (None, len(h)):
            raise ValueError(f"The plan has vectors or strengths for {self.rows} rows, but the batch has {len(h)}.")
        dtype = torch.promote_types(h.dtype, torch.float32)
        wide = h.to(dtype)
        v = self.direction.to(wide.device, dtype)
        v = v[:, None] if v.ndim == 2 else v[None, None]
        size = torch.as_tensor(self.length, dtype=dtype, device=wide.device).reshape(-1, 1, 1)
        new = OPS[self.op](wide, v, size).to(h.dtype)
        return new if mask is None else torch.where(mask[..., None], new, h)


def needs_positions(vector: SteeringVector, prefix: tuple[int, ...]) -> bool:
    """Whether a vector's positions must be read from the model's inputs."""
    # a vector at every position reads nothing from the root: padding cannot be seen by any real token
    return vector.where != "all" or (vector.skip_special and bool(prefix))
