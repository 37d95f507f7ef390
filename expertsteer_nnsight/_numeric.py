"""Shared numerical conventions: float64 statistics, torch in gives torch out, errors that say what was found."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_matrix(x: Any, name: str = "X") -> Tensor:
    """`x` as a float64 `[rows, columns]` tensor on its own device.

    Raises:
        ValueError: `x` is not two-dimensional, is empty, or holds NaN or infinity.
    """
    t = x.detach() if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
    if t.is_complex():
        raise ValueError(f"Complex data not supported: {name} is complex.")
    t = t.to(torch.float64)
    if t.ndim != 2:
        raise ValueError(
            f"Expected 2D array: {name} must be [rows, columns], but has shape {tuple(t.shape)}. Reshape your data."
        )
    if 0 in t.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: it needs at least one row and one column.")
    if not torch.isfinite(t).all():
        raise ValueError(f"{name} has NaN or infinity in {int((~torch.isfinite(t)).any(1).sum())} of {len(t)} rows.")
    return t


def like(out: Tensor, reference: Any) -> Any:
    """`out` in the container of `reference`: a tensor of its dtype and device, or a float64 numpy array."""
    if isinstance(reference, Tensor):
        dtype = reference.dtype if reference.dtype.is_floating_point else torch.float32
        return out.to(reference.device, dtype)
    return out.cpu().numpy()


def unit(v: Tensor, name: str = "direction") -> Tensor:
    """`v` divided by its norm along the last dimension.

    Raises:
        ValueError: a zero or non-finite vector, which has no direction.
    """
    norm = v.norm(dim=-1, keepdim=True)
    if not torch.isfinite(v).all() or bool((norm == 0).any()):
        found = "NaN or infinity" if not torch.isfinite(v).all() else "a zero vector"
        raise ValueError(f"{name} holds {found}, which has no direction.")
    return v / norm
