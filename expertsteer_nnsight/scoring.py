"""What plans do to a model's predictions; many plans share one forward.

A batch holds one text in as many rows as there are plans, and row 0 unsteered: nothing is padded, and every row is
compared with the unsteered one of its own forward. KL is KL(steered || unsteered) in nats, per token.

With a remote model all texts go in one job for each batch of plans, and what is asked of the logits is computed on the
server: it is one number a token, where the logits would be one for each entry of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import nnsight
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._hosts import host_of
from .positions import Positions, affixes
from .residual import Residual, config_of
from .steering import SteeringPlan
from .texts import as_texts, encode, tokenizer_of
from .vectors import SteeringVector

if TYPE_CHECKING:
    from .remote import Remote


class Encoded(NamedTuple):
    """Token ids of a text.

    Attributes:
        ids: all of them.
        prefix: how many special tokens the tokenizer prepended.
        prompt: how many belong to the prompt, with the prepended ones; what follows is a completion.
    """

    ids: list[int]
    prefix: int
    prompt: int


def encoded(model: Any, texts: Any) -> list[Encoded]:
    """Ids of texts, which count as completions after their first token; what is encoded already stays as it is."""
    if isinstance(texts, list) and texts and all(isinstance(t, Encoded) for t in texts):
        return texts
    tokenizer = tokenizer_of(model)
    known = affixes(tokenizer)
    rows = [encode(tokenizer, t, known) for t in as_texts(texts)]
    return [Encoded(ids, prefix, prefix + 1) for ids, prefix in rows]


def _kind(plan: SteeringPlan) -> tuple[Any, ...]:
    """What plans must have in common to share a forward; their directions, strengths and residual norms may differ."""
    return tuple((v.layer, v.op, v.where, v.from_step, v.skip_special) for v in plan.vectors)


def stack(plans: Sequence[SteeringPlan]) -> SteeringPlan:
    """One plan with a row for each of `plans`, and an unsteered row before them.

    Raises:
        ValueError: they differ in layer, op or place, or are themselves per row.
    """
    kinds = {_kind(p) for p in plans}
    if len(kinds) > 1 or any(v.rows is not None for p in plans for v in p.vectors):
        raise ValueError(f"Plans share a forward only with the same layers, ops and places, and none per row: {kinds}.")
    vectors = []
    for place in range(len(plans[0].vectors)):
        mine = [p.vectors[place] for p in plans]
        first = mine[0]
        # where norms differ, a row's strength is told in those of the first
        share = [1.0 if v.op == "project_out" else (v.residual_norm or 1) / (first.residual_norm or 1) for v in mine]
        strength = torch.tensor([0.0, *(float(v.strength) * s for v, s in zip(mine, share, strict=True))])
        direction = torch.stack([first.direction, *(v.direction for v in mine)])
        vectors.append(replace(first, direction=direction, strength=strength))
    return SteeringPlan(vectors, plans[0].target)


def _row_costs(logits: Tensor, ids: Tensor) -> list[Tensor]:
    """KL(row || row 0) `[row, token]` and NLL of the next token `[row, token - 1]`, in nats.

    Runs inside the trace: row by row, so that no second copy of the logits is made.
    """
    kl, nll = [], []
    base = torch.log_softmax(logits[0].float(), -1)
    for row in logits:
        mine = torch.log_softmax(row.float(), -1)
        nll.append(-mine[:-1].gather(-1, ids[1:, None])[:, 0])
        gap = mine - base
        kl.append(gap.mul_(mine.exp_()).sum(-1).clamp_min(0))  # in place: fresh memory costs more than the arithmetic
    return [torch.stack(kl), torch.stack(nll)]


def _likelihoods(logits: Tensor, ids: Tensor) -> list[Tensor]:
    """Sum of the log-probabilities of the next tokens, `[row]`, nats. Runs inside the trace."""
    found = []
    for row in logits:
        found.append(torch.log_softmax(row[:-1].float(), -1).gather(-1, ids[1:, None]).sum())
    return [torch.stack(found)]


def _shared_states(model: Any, residual: Residual, ids: list[int], layer: int, stop: bool) -> Tensor | None:
    """Output `[1, position, hidden]` of `layer` for one unsteered text, if later layers need nothing else of the earlier.

    None where a layer puts out no plain tensor, or where skipping layers changes the logits (layers that share keys and
    values, for one); a model is tried once and remembered. `stop`: end the forward after `layer`, which a session in
    NDIF's sandbox does not survive.
    """
    call = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    remembered: dict[str, bool] = model.__dict__.setdefault("_expertsteer_can_skip", {})
    block = residual.layers[layer]
    if remembered.get("ok") is False:
        return None
    with torch.no_grad(), model.trace(**call, use_cache=False) as tracer:
        output = nnsight.save(block.output)
        if remembered and stop:
            tracer.stop()
        logits = nnsight.save(model.output.logits)
    if not isinstance(output, Tensor):
        remembered["ok"] = False
    elif not remembered:
        with torch.no_grad(), model.trace(**call, use_cache=False):
            for i in range(layer + 1):
                residual.layers[i].skip(output)
            skipped = nnsight.save(model.output.logits)
        remembered["ok"] = bool(torch.allclose(skipped, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())))
    return output if remembered.get("ok") else None


def _rows_that_fit(model: Any, length: int, rows: int | None, memory: float) -> int:
    """How many rows of logits, with as much again for what is made of them, stay within so many bytes."""
    vocabulary = getattr(config_of(model), "vocab_size", None) or 50_000
    return rows or max(1, min(96, int(memory / (8 * length * vocabulary))))


def _one_text(
    model: Any,
    steered: SteeringPlan,
    text: Encoded,
    keep: int,
    rows: int,
    reduce: Callable[[Tensor, Tensor], list[Tensor]],
    can_keep: bool,
    stop: bool,
) -> list[Tensor]:
    """What `reduce(logits, ids)` makes of the last `keep` tokens of one text in `rows` rows. Runs on a server as a whole."""
    residual, first = Residual(model), steered.layers[0]
    tokens = torch.tensor([text.ids] * rows)
    state = _shared_states(model, residual, text.ids, first - 1, stop) if first > 0 else None
    skipped = [] if state is None else [(residual.layers[i], state) for i in range(first)]
    lengths = [text.prompt] * rows if any(v.where == "completion" for v in steered.vectors) else None
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    if can_keep:
        call["logits_to_keep"] = keep
    with torch.no_grad(), model.trace(**call):
        positions = Positions.read(model).without_row(0)
        for block, output in skipped:
            block.skip(output.expand(rows, -1, -1))
        steered.apply(model, positions, lengths)
        logits = model.output.logits[:, -keep:]
        values = nnsight.save(reduce(logits, tokens[0, -keep:].to(logits.device)))
    return [v.cpu() for v in values]


def _job(
    model: Any,
    backend: Any,
    steered: SteeringPlan,
    texts: list[Encoded],
    keeps: list[int],
    rows: int,
    reduce: Callable[[Tensor, Tensor], list[Tensor]],
    can_keep: bool,
) -> list[list[Tensor]]:
    """`_one_text` of every text, in one remote job."""
    with model.session(backend=backend):
        found = nnsight.save([])
        for text, keep in zip(texts, keeps, strict=True):
            found.append(_one_text(model, steered, text, keep, rows, reduce, can_keep, False))
    return found


def _batches(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def in_rows(
    model: Any,
    plans: Sequence[SteeringPlan],
    texts: list[Encoded],
    keeps: list[int],
    reduce: Callable[[Tensor, Tensor], list[Tensor]],
    *,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
    label: str = "",
) -> list[list[Tensor]]:
    """For each text, what `reduce(logits, ids)` makes of row 0 (unsteered) and of a row for each plan.

    Rows that share a forward differ from the first steered layer on, so the layers before it run once, for one row.

    Args:
        model: the target.
        plans: one a row; with none, only the unsteered row is measured.
        texts: one forward each, for as many plans as fit.
        keeps: how many of each text's last tokens `reduce` sees, `[row, keep, vocabulary]` and `[keep]`.
        reduce: gives tensors with one entry a row; runs on the server if remote.
        rows: plans a forward; as many as fit into about 4 GB (1 GB if remote) if not given.
        remote: True, "http://...", or a `Remote`: run on NDIF.
        progress: show a progress bar.
        label: what it says.
    """
    host = host_of(remote)
    alone = not plans
    if alone:  # a plan that does nothing, for a row that is dropped
        width = Residual(model).hidden_size or 1
        plans = [SteeringPlan([SteeringVector(0, torch.ones(width), 0.0)])]
    # the head over a large vocabulary is a third of a forward, and most models can leave out positions
    can_keep = "logits_to_keep" in signature(model._module.forward).parameters
    length = max(keeps) if can_keep else max(len(text.ids) for text in texts)
    size = _rows_that_fit(model, length, rows, 4e9 if host is None else 1e9)  # a server is shared
    order = sorted(range(len(plans)), key=lambda i: _kind(plans[i]))
    chunks = [c for _, g in groupby(order, key=lambda i: _kind(plans[i])) for c in _batches(list(g), size)]
    found: list[list[list[Tensor]]] = []
    with tqdm(total=len(chunks) * len(texts), desc=label, unit="forward", disable=not progress) as bar:
        for chunk in chunks:
            steered = stack([plans[i] for i in chunk])
            count = len(chunk) + 1
            if host is not None:
                with host.explained(f"Measuring {label}", "rows="):
                    backend = host.backend(model, bar.set_postfix_str)
                    mine = _job(model, backend, steered, texts, keeps, count, reduce, can_keep)
                bar.update(len(texts))
            else:
                mine = []
                for text, keep in zip(texts, keeps, strict=True):
                    mine.append(_one_text(model, steered, text, keep, count, reduce, can_keep, True))
                    bar.update()
            found.append(mine)
    place = [0, *(1 + torch.tensor([i for c in chunks for i in c]).argsort()).tolist()]
    joined = []
    for per_chunk in zip(*found, strict=True):
        parts = [
            torch.cat([c[k] if n == 0 else c[k][1:] for n, c in enumerate(per_chunk)]) for k in range(len(per_chunk[0]))
        ]
        joined.append([p[place[:1] if alone else place] for p in parts])
    return joined


def costs(
    model: Any,
    plans: Sequence[SteeringPlan],
    texts: Any,
    *,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """What plans do to a model on texts: KL `[1 + plan, token]` and NLL `[1 + plan, token]`, tokens of all texts joined.

    Args:
        model: the target.
        plans: one a row; row 0 of the results is unsteered.
        texts: strings or chat messages, or what `encoded` makes of them. Special tokens that the tokenizer prepends are
            not counted.
        rows: plans a forward (`in_rows`).
        remote: True, "http://...", or a `Remote`: run on NDIF.
        progress: show a progress bar.
    """
    known = encoded(model, texts)
    keeps = [len(text.ids) - text.prefix for text in known]
    label = "KL on neutral text"
    found = in_rows(model, plans, known, keeps, _row_costs, rows=rows, remote=remote, progress=progress, label=label)
    return torch.cat([kl for kl, _ in found], 1), torch.cat([nll for _, nll in found], 1)


def likelihoods(
    model: Any,
    plans: Sequence[SteeringPlan],
    texts: list[Encoded],
    *,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
) -> Tensor:
    """Log-likelihood of each text's completion, `[1 + plan, text]`, nats; row 0 unsteered. Arguments as in `costs`."""
    keeps = [len(text.ids) - text.prompt + 1 for text in texts]
    label = "log-likelihoods"
    found = in_rows(model, plans, texts, keeps, _likelihoods, rows=rows, remote=remote, progress=progress, label=label)
    return torch.stack([value for (value,) in found], 1)
