"""One forward of some texts: the states of some layers at chosen positions, picked and measured inside the trace.

Everything here may run on a server: torch and nnsight are all that it may need.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from ..models.residual import Residual, hidden


def batches(
    items: Sequence[int], size: int, lengths: Sequence[int] | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Runs of at most `size` items, and of at most `tokens` tokens, padded to the longest."""
    found: list[list[int]] = []
    for i in items:
        last = found[-1] if found else []
        longest = max((lengths[j] for j in (*last, i)), default=0) if lengths else 0
        if last and len(last) < size and (tokens is None or (len(last) + 1) * longest <= tokens):
            last.append(i)
        else:
            found.append([i])
    return found


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids `[row, position]`, padded with 0 on the right, where no real token sees it."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def in_rows(cache: Any, rows: int) -> Any:
    """A copy of a cache of keys and values of one row in as many rows."""
    several = copy.deepcopy(cache)
    several.batch_repeat_interleave(rows)
    return several


def forward(
    model: Any, residual: Residual, batch: list, layers: tuple[int, ...], dtype: Any, pad: int, backend: Any
) -> dict[str, Tensor]:
    """States and norms of a batch of (ids, number of prepended ones, columns to keep), which ends after the last layer.

    Returns:
        `layer.i` `[row, hidden]` and `norm.i` `[row]` of each layer, a row for each column that is kept.
    """
    # padded on the right: no real token can see the padding, and columns are token numbers
    width = max(len(ids) for ids, _, _ in batch)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in batch])
    own = torch.stack(
        [((torch.arange(width) >= prefix) & (torch.arange(width) < len(ids))) for ids, prefix, _ in batch]
    )
    column = torch.tensor([at or 0 for *_, columns in batch for at in columns])
    row = torch.tensor([n for n, (*_, columns) in enumerate(batch) for _ in columns])
    mean = batch[0][2][0] is None
    bridge = type(model._module).__name__ == "TransformerBridge"
    call = (ids,) if bridge else ()
    extra = {} if bridge else {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if backend is not None:
        extra["backend"] = backend
    blocks = [residual.layers[i] for i in layers]
    with torch.no_grad(), model.trace(*call, **extra) as tracer:
        states, norms = [], []
        for block in blocks:
            state, norm = pick(hidden(block.output), own, row, column, mean)
            # one tensor for all layers, which may lie on several devices: half the bytes of a result would be headers
            states.append((state if dtype is None else state.to(dtype)).cpu())
            norms.append(norm.cpu())
        kept = nnsight.save(torch.stack(states))
        sizes = nnsight.save(torch.stack(norms))
        tracer.stop()
    found = {f"layer.{i}": s for i, s in zip(layers, kept, strict=True)}
    return found | {f"norm.{i}": n for i, n in zip(layers, sizes, strict=True)}


def pick(h: Tensor, own: Tensor, row: Tensor, column: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """From one layer's `[text, position, hidden]`: the kept states `[row, hidden]`, and the median norm of each text's tokens.

    Runs inside the trace, on a server too. Sums are taken in float32 or wider.
    """
    own, row, column = own.to(h.device), row.to(h.device), column.to(h.device)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    norms = wide.norm(dim=-1).masked_fill(~own, float("nan")).nanmedian(dim=1).values
    if mean:
        weight = own.to(wide.dtype) / own.sum(1, keepdim=True)
        # no product of matrices: a server's autocast would round it, and it has no einops
        return (wide * weight[..., None]).sum(1).to(h.dtype), norms
    # a copy: a view would keep the whole layer alive
    return h[row, column].clone(), norms[row]
