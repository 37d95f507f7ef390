"""What plans do to a model's predictions; many plans share one forward.

A batch holds one text in as many rows as there are plans, and row 0 unsteered: nothing is padded, and every row is
compared with the unsteered one of its own forward. KL is KL(steered || unsteered) in nats, per token.

With a remote model all texts go in one job for each batch of plans, and what is asked of the logits is computed on the
server: it is one number a token, where the logits would be one for each entry of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.positions import affixes
from ..models.residual import config_of
from ..ndif.argument import host_of
from ..states.forward import batches
from ..steering.plan import SteeringPlan, stack_plans
from ..texts.texts import Text, as_texts, encode, tokenizer_of
from .rows import Encoded, Reduce, job, one_text, row_costs, row_likelihoods

if TYPE_CHECKING:
    from ..ndif.host import Remote

Steering: TypeAlias = SteeringPlan | Sequence[SteeringPlan]  # the same for all texts, or one for each


def encoded(model: Any, texts: Any) -> list[Encoded]:
    """Ids of texts, which count as completions after their first token; what is encoded already stays as it is."""
    if isinstance(texts, list) and texts and all(isinstance(t, Encoded) for t in texts):
        return texts
    tokenizer = tokenizer_of(model)
    known = affixes(tokenizer)
    rows = [encode(tokenizer, t, known) for t in as_texts(texts)]
    return [Encoded(ids, prefix, prefix + 1) for ids, prefix in rows]


@runtime_checkable
class ByText(Protocol):
    """What steers each text in its own way, such as a `LiveExpert`."""

    def for_texts(self, prompts: Sequence[Text], continuations: Sequence[str] | None = None) -> list[SteeringPlan]:
        """A plan for each prompt with its continuation, without rows and prompts of its own; `given` places have one row."""
        ...

    def generate(self, prompts: Sequence[Text], max_new_tokens: int) -> list[str]:
        """What the target says after each prompt."""
        ...


def by_text(
    plans: Sequence[SteeringPlan | ByText], prompts: Sequence[Text], continuations: Sequence[str] | None = None
) -> list[Steering]:
    """Plans as they are, and of what steers each text in its own way a list of plans, one a text."""
    return [plan if isinstance(plan, SteeringPlan) else plan.for_texts(prompts, continuations) for plan in plans]


def _kind(plan: Steering) -> tuple[Any, ...]:
    """What plans must have in common to share a forward; their directions, strengths and residual norms may differ."""
    first = plan if isinstance(plan, SteeringPlan) else plan[0]
    return tuple(v.kind for v in first.vectors)


def _of_text(plan: Steering, text: int) -> SteeringPlan:
    return plan if isinstance(plan, SteeringPlan) else plan[text]


def _rows_that_fit(model: Any, length: int, rows: int | None, memory: float) -> int:
    """How many rows of logits, with as much again for what is made of them, stay within so many bytes."""
    vocabulary = getattr(config_of(model), "vocab_size", None) or 50_000
    return rows or max(1, min(96, int(memory / (8 * length * vocabulary))))


def in_rows(
    model: Any,
    plans: Sequence[Steering],
    texts: list[Encoded],
    keeps: list[int],
    reduce: Reduce,
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
        plans: one a row, the same for all texts or a list of one a text; with none, only the unsteered row is measured.
        texts: one forward each, for as many plans as fit.
        keeps: how many of each text's last tokens `reduce` sees, `[row, keep, vocabulary]` and `[keep]`.
        reduce: gives tensors with one entry a row; runs on the server if remote.
        rows: plans a forward; as many as fit into about 4 GB (1 GB if remote) if not given.
        remote: True, "http://...", or a `Remote`: run on NDIF.
        progress: show a progress bar.
        label: what it says.
    """
    host = host_of(remote)
    # the head over a large vocabulary is a third of a forward, and most models can leave out positions
    can_keep = "logits_to_keep" in signature(model._module.forward).parameters
    length = max(keeps) if can_keep else max(len(text.ids) for text in texts)
    size = _rows_that_fit(model, length, rows, 4e9 if host is None else 1e9)  # a server is shared
    order = sorted(range(len(plans)), key=lambda i: _kind(plans[i]))
    chunks = [c for _, g in groupby(order, key=lambda i: _kind(plans[i])) for c in batches(list(g), size)] or [[]]
    found: list[list[list[Tensor]]] = []
    with tqdm(total=len(chunks) * len(texts), desc=label, unit="forward", disable=not progress) as bar:
        for chunk in chunks:
            steered: list[SteeringPlan | None] = [None] * len(texts)
            if chunk and all(isinstance(plans[i], SteeringPlan) for i in chunk):  # one object, which travels once
                steered = [stack_plans([_of_text(plans[i], 0) for i in chunk], True)] * len(texts)
            elif chunk:
                steered = [stack_plans([_of_text(plans[i], k) for i in chunk], True) for k in range(len(texts))]
            count = len(chunk) + 1
            if host is not None:
                with host.explained(f"Measuring {label}", "rows="):
                    backend = host.backend(model, bar.set_postfix_str)
                    mine = job(model, backend, steered, texts, keeps, count, reduce, can_keep)
                bar.update(len(texts))
            else:
                mine = []
                for plan, text, keep in zip(steered, texts, keeps, strict=True):
                    mine.append(one_text(model, plan, text, keep, count, reduce, can_keep, True))
                    bar.update()
            found.append(mine)
    place = [0, *(1 + torch.tensor([i for c in chunks for i in c], dtype=torch.long).argsort()).tolist()]
    joined = []
    for per_chunk in zip(*found, strict=True):
        parts = [
            torch.cat([c[k] if n == 0 else c[k][1:] for n, c in enumerate(per_chunk)]) for k in range(len(per_chunk[0]))
        ]
        joined.append([p[place] for p in parts])
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
    found = in_rows(model, plans, known, keeps, row_costs, rows=rows, remote=remote, progress=progress, label=label)
    return torch.cat([kl for kl, _ in found], 1), torch.cat([nll for _, nll in found], 1)


def likelihoods(
    model: Any,
    plans: Sequence[Steering],
    texts: list[Encoded],
    *,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
) -> Tensor:
    """Log-likelihood of each text's completion, `[1 + plan, text]`, nats; row 0 unsteered. Arguments as in `costs`."""
    keeps = [len(text.ids) - text.prompt + 1 for text in texts]
    label = "log-likelihoods"
    found = in_rows(
        model, plans, texts, keeps, row_likelihoods, rows=rows, remote=remote, progress=progress, label=label
    )
    return torch.stack([value for (value,) in found], 1)
