"""One text in as many rows as there are plans: the forward, and what is made of its logits before they are dropped.

Everything here may run on a server: torch and nnsight are all that it may need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import nnsight
import torch
from torch import Tensor

from ..models.positions import Positions
from ..models.residual import Residual
from ..steering.plan import SteeringPlan

# from logits [row, token, vocabulary] and ids [token] to tensors with one entry a row
Reduce = Callable[[Tensor, Tensor], list[Tensor]]


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


def row_costs(logits: Tensor, ids: Tensor) -> list[Tensor]:
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


def row_likelihoods(logits: Tensor, ids: Tensor) -> list[Tensor]:
    """Sum of the log-probabilities of the next tokens, `[row]`, nats. Runs inside the trace."""
    found = []
    for row in logits:
        found.append(torch.log_softmax(row[:-1].float(), -1).gather(-1, ids[1:, None]).sum())
    return [torch.stack(found)]


def log_odds(up: list[int], down: list[int]) -> Reduce:
    """A reduction to the log-odds of the tokens `up` over `down` after the last token, `[row]`, nats."""

    def reduce(logits: Tensor, ids: Tensor) -> list[Tensor]:
        last = logits[:, -1].float()
        return [last[:, up].logsumexp(-1) - last[:, down].logsumexp(-1)]

    return reduce


def entropies(logits: Tensor, ids: Tensor) -> list[Tensor]:
    """Entropy of what comes after the last token, `[row]`, nats. Runs inside the trace."""
    told = torch.log_softmax(logits[:, -1].float(), -1)
    return [-(told.exp() * told).sum(-1)]


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


def one_text(
    model: Any,
    steered: SteeringPlan | None,
    text: Encoded,
    keep: int,
    rows: int,
    reduce: Reduce,
    can_keep: bool,
    stop: bool,
) -> list[Tensor]:
    """What `reduce(logits, ids)` makes of the last `keep` tokens of one text in `rows` rows, which `steered` has if there is one.

    Runs on a server as a whole.
    """
    residual, first = Residual(model), 0 if steered is None else steered.layers[0]
    tokens = torch.tensor([text.ids] * rows)
    state = _shared_states(model, residual, text.ids, first - 1, stop) if first > 0 else None
    skipped = [] if state is None else [(residual.layers[i], state) for i in range(first)]
    border = steered is not None and any(v.where in ("completion", "last_prompt") for v in steered.vectors)
    lengths = [text.prompt] * rows if border else None
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    if can_keep:
        call["logits_to_keep"] = keep
    with torch.no_grad(), model.trace(**call):
        if steered is not None:
            positions = Positions.read(model).without_row(0)
            for block, output in skipped:
                block.skip(output.expand(rows, -1, -1))
            steered.apply(model, positions, lengths)
        logits = model.output.logits[:, -keep:]
        values = nnsight.save(reduce(logits, tokens[0, -keep:].to(logits.device)))
    return [v.cpu() for v in values]


def job(
    model: Any,
    backend: Any,
    steered: list[SteeringPlan | None],
    texts: list[Encoded],
    keeps: list[int],
    rows: int,
    reduce: Reduce,
    can_keep: bool,
) -> list[list[Tensor]]:
    """`one_text` of every text with its plan, in one remote job."""
    with model.session(backend=backend):
        found = nnsight.save([])
        for plan, text, keep in zip(steered, texts, keeps, strict=True):
            found.append(one_text(model, plan, text, keep, rows, reduce, can_keep, False))
    return found
