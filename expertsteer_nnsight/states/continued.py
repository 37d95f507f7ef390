"""Activations of texts that begin alike, such as the options of a question: what they have in common is read once.

`collect` reads each text whole. Here the beginning that texts share goes through the model once, and its keys and values serve all
of them. A model whose keys and values cannot be used so (recurrent ones) is read by `collect`; each model is tried once.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import nnsight
import torch
from torch import Tensor

from ..models.positions import affixes
from ..models.residual import Residual, hidden
from ..texts.texts import Text, encode, token_index, tokenizer_of
from .collecting import collect, columns_at_ends
from .forward import batches, in_rows, padded

WORTH = (
    256  # tokens that sharing a beginning must save: two small forwards in place of a large one cost as much on a CPU
)
KNOWN = "_expertsteer_can_continue"  # whether a model was found to be able to


def continued_states(
    model: Any,
    texts: Sequence[Text],
    layers: Sequence[int],
    ends: Sequence[Sequence[int]],
    batch_size: int | None = None,
) -> dict[int, Tensor]:
    """Activations by layer, `[row, hidden]`: of each text those at its `ends`, and that at its last token.

    Args:
        model: a wrapped one, on this machine.
        texts: strings, or chat messages without ends.
        layers: decoder layers.
        ends: character offsets at which a token ends, for each text.
        batch_size: texts a forward; 32 if None.

    Raises:
        ValueError: as `collect`.
    """
    tokenizer, residual = tokenizer_of(model), Residual(model)
    known = affixes(tokenizer)
    encoded = [encode(tokenizer, text, known) for text in texts]
    at = columns_at_ends(tokenizer, texts, encoded, ends, [[token_index("last", *one)] for one in encoded])
    chosen = sorted({residual.index(i) for i in layers})
    ids = [tuple(one) for one, _ in encoded]
    groups = _groups(ids) if _may_share(model) else []
    found: list[Tensor | None] = [None] * len(texts)  # [layer, row, hidden] of each text
    for common, members in groups:
        for some in batches(members, batch_size or 32):
            made = _after(model, residual, chosen, ids, common, some, at)
            if made is None or not _right(model, residual, chosen, ids, some, at, made):
                model.__dict__[KNOWN] = False
                return _whole(model, texts, chosen, ends, batch_size)
            for i, states in zip(some, made, strict=True):
                found[i] = states
    rest = [i for i, states in enumerate(found) if states is None]
    if rest:
        alone = _whole(model, [texts[i] for i in rest], chosen, [ends[i] for i in rest], batch_size)
        start = 0
        for i in rest:
            found[i] = torch.stack([alone[layer][start : start + len(at[i])] for layer in chosen])
            start += len(at[i])
    joined = torch.cat([states for states in found if states is not None], 1)
    return dict(zip(chosen, joined, strict=True))


def _whole(
    model: Any, texts: Sequence[Text], layers: Sequence[int], ends: Sequence[Sequence[int]], batch_size: int | None
) -> dict[int, Tensor]:
    found = collect(model, list(texts), layers, ends=ends, batch_size=batch_size, progress=False)
    return {layer: found[layer] for layer in layers}


def _may_share(model: Any) -> bool:
    """Whether a model was not found unable to; an edited one and a bridge read each text whole."""
    bridge = type(model._module).__name__ == "TransformerBridge"
    return not bridge and not getattr(model, "_edits", None) and model.__dict__.get(KNOWN, True)


def _groups(ids: Sequence[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """Texts that share a beginning which is worth it: its length, and their numbers. Each text has a token of its own after it."""
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    found: list[tuple[int, list[int]]] = []
    for i in order:
        if found:
            common, members = found[-1]
            shared = _shared(ids[members[0]], ids[i], common)
            # a text that shares less than half of the beginning starts a group of its own
            if 2 * shared >= common:
                found[-1] = shared, [*members, i]
                continue
        found.append((len(ids[i]) - 1, [i]))
    return [(common, members) for common, members in found if common * (len(members) - 1) >= WORTH]


def _shared(first: tuple[int, ...], other: tuple[int, ...], most: int) -> int:
    most = min(most, len(other) - 1)
    return next((i for i in range(most) if first[i] != other[i]), most)


def _after(
    model: Any,
    residual: Residual,
    layers: list[int],
    ids: Sequence[tuple[int, ...]],
    common: int,
    some: list[int],
    at: Any,
) -> list[Tensor] | None:
    """`[layer, row, hidden]` of each of some texts that share their first tokens; None where the model keeps no keys and values."""
    try:
        before, cache = _read(model, residual, layers, torch.tensor([ids[some[0]][:common]]), None)
        rests = padded([ids[i][common:] for i in some])
        after, _ = _read(model, residual, layers, rests, in_rows(cache, len(some)), common)
    except (AttributeError, TypeError, ValueError):  # a cache of another kind, as recurrent models have
        if model.__dict__.get(KNOWN):
            raise
        return None
    found = []
    for row, i in enumerate(some):
        whole = torch.cat([before[:, 0], after[:, row]], 1)
        found.append(whole[:, torch.tensor(at[i])])
    return found


def _read(
    model: Any, residual: Residual, layers: list[int], rows: Tensor, cache: Any, past: int = 0
) -> tuple[Tensor, Any]:
    """Activations `[layer, text, position, hidden]` after what a cache holds, and the cache with them."""
    call: dict[str, Any] = {"input_ids": rows, "use_cache": True}
    call["attention_mask"] = torch.ones(len(rows), past + rows.shape[1], dtype=torch.long)
    if cache is not None:
        call["past_key_values"] = cache
    elif "logits_to_keep" in signature(model._module.forward).parameters:
        call["logits_to_keep"] = 1
    blocks, made = [residual.layers[i] for i in layers], None
    with torch.no_grad(), model.trace(**call) as tracer:
        states = []
        for block in blocks:
            states.append(hidden(block.output).cpu())
        kept = nnsight.save(torch.stack(states))
        if cache is None:
            made = nnsight.save(model.output.past_key_values)
        else:
            tracer.stop()
    return kept, made


def _right(
    model: Any, residual: Residual, layers: list[int], ids: Sequence[tuple[int, ...]], some: list[int], at: Any,
    made: list[Tensor],
) -> bool:  # fmt: skip
    """Whether activations are those of a text that is read whole; a model is tried once."""
    if model.__dict__.get(KNOWN):
        return True
    longest = max(range(len(some)), key=lambda k: len(ids[some[k]]))
    whole, _ = _read(model, residual, layers, torch.tensor([ids[some[longest]]]), None)
    expected = whole[:, 0, torch.tensor(at[some[longest]])]
    same = torch.allclose(made[longest], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    model.__dict__[KNOWN] = same
    return same
