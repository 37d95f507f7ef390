"""Shared numerical conventions: float64 statistics, torch in gives torch out, errors that say what was found."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_matrix(x: Any, name: str = "X", flat: bool = False) -> Tensor:
    """`x` (a tensor, or what numpy takes for an array of numbers) as a float64 `[rows, columns]` tensor on its device.

    Args:
        x: the numbers.
        name: what errors call it.
        flat: take `[rows]` for one column, as scikit-learn does for a target.

    Raises:
        TypeError: `x` is sparse, or holds objects that are no numbers.
        ValueError: `x` is complex, not two-dimensional, empty, or holds NaN or infinity.
    """
    # a sparse matrix of scipy's is told by its toarray: plans and vectors need no scipy
    if hasattr(x, "toarray") or (isinstance(x, Tensor) and x.layout != torch.strided):
        raise TypeError(f"{name} is sparse: hidden states are dense; pass its toarray() or to_dense().")
    array = x if isinstance(x, Tensor) else np.asarray(x)
    if torch.is_complex(array) if isinstance(array, Tensor) else np.iscomplexobj(array):
        raise ValueError(f"Complex data not supported: {name} is complex.")
    if isinstance(array, Tensor):
        t = array.detach().to(torch.float64)
    else:  # contiguous and writeable: torch takes no negative strides, and warns of read-only memory
        t = torch.as_tensor(np.require(array, np.float64, ["C", "W"]))
    if flat and t.ndim == 1:
        t = t[:, None]
    if t.ndim != 2:
        raise ValueError(
            f"Expected 2D array: {name} must be [rows, columns], but has shape {tuple(t.shape)}. Reshape your data."
        )
    if 0 in t.shape:
        raise ValueError(
            f"{name} has {len(t)} sample(s) and {t.shape[1]} feature(s) (shape={tuple(t.shape)}) while a minimum of 1 "
            "is required."
        )
    if not torch.isfinite(t).all():
        raise ValueError(f"{name} has NaN or infinity in {int((~torch.isfinite(t)).any(1).sum())} of {len(t)} rows.")
    return t


def like(out: Tensor, reference: Any) -> Any:
    """`out` in the container of `reference`: a tensor of its dtype and device, or a float64 numpy array."""
    if isinstance(reference, Tensor):
        dtype = reference.dtype if reference.dtype.is_floating_point else torch.float32
        return out.to(reference.device, dtype)
    return out.cpu().numpy()


def finite(v: Tensor, name: str) -> Tensor:
    """`v` itself.

    Raises:
        ValueError: NaN or infinity in it.
    """
    if not torch.isfinite(v).all():
        raise ValueError(f"{name} has NaN or infinity.")
    return v


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
