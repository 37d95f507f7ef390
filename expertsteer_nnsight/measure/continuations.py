"""Log-probabilities of continuations under one plan or a plan each, many texts a forward; what runs here also runs on a server.

Unlike `measure.scoring`, where many plans share one text, here thousands of texts share forwards. Texts are padded on the right,
where no real token sees it. Locally the continuations of one context share its keys and values where that saves enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import nnsight
import torch
from torch import Tensor

from ..states.forward import batches, in_rows, padded
from ..steering.plan import SteeringPlan, stack_plans

if TYPE_CHECKING:
    from ..ndif.host import Remote

JOB = 256  # texts a remote job
WORTH = {"cpu": 64}  # tokens that sharing a context must save, by device; a GPU is quicker with large batches
SHARED = 16  # continuations of one context a forward, at least


class Text(NamedTuple):
    """What the model reads for one or more continuations that differ in their last token.

    Attributes:
        ids: the context and the continuation without its last token.
        prompt: how many of them are the context.
        scored: how many of the last ones predict a token of the longest continuation.
        ends: the last tokens, one for each continuation.
    """

    ids: tuple[int, ...]
    prompt: int
    scored: int
    ends: tuple[int, ...]


def _found(logits: Tensor, lengths: list[int], width: int, texts: list[Text]) -> list[Tensor]:
    """For each text `[2, scored - 1 + ends]`: log-probabilities in nats, and whether each token is the likeliest.

    Args:
        logits: of the last columns of a batch that is `width` wide.
        lengths: real columns of each row.
        width: of the batch.
        texts: one a row.
    """
    found = []
    for row, length, text in zip(logits, lengths, texts, strict=True):
        last = length - width + row.shape[0]
        mine = torch.log_softmax(row[last - text.scored : last].float(), -1)
        said = torch.tensor(text.ids[len(text.ids) - text.scored + 1 :], device=mine.device, dtype=torch.long)
        ends = torch.tensor(text.ends, device=mine.device)
        values = torch.cat([mine[:-1].gather(-1, said[:, None])[:, 0], mine[-1, ends]])
        best = mine.argmax(-1)
        found.append(torch.stack([values, torch.cat([best[:-1] == said, best[-1] == ends]).to(values.dtype)]))
    return found


def has_border(plan: SteeringPlan | None) -> bool:
    """Whether a plan tells prompt and completion apart."""
    return plan is not None and any(v.where != "all" or v.from_step for v in plan.vectors)


def _steer(model: Any, plan: SteeringPlan | None, prompts: list[int]) -> None:
    if plan is not None:
        plan.apply(model, prompt_lengths=prompts if has_border(plan) else None)


def _forward(
    model: Any, plan: SteeringPlan | None, texts: list[Text], can_keep: bool, cache: Any = None
) -> list[Tensor]:
    """`_found` of texts in one batch, after the keys and values in `cache` of the tokens that they have in common."""
    past = 0 if cache is None else int(cache.get_seq_length())
    rows, prompts = [text.ids[past:] for text in texts], [text.prompt for text in texts]
    ids, lengths = padded(rows), [len(row) for row in rows]
    width = ids.shape[1]
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones(len(ids), past + width, dtype=torch.long)}
    if cache is None:
        call["use_cache"] = False
    else:
        call["past_key_values"] = cache
    if can_keep:
        call["logits_to_keep"] = max(width - length + text.scored for length, text in zip(lengths, texts, strict=True))
    with torch.no_grad(), model.trace(**call):
        _steer(model, plan, prompts)
        found = nnsight.save(_found(model.output.logits, lengths, width, texts))
    return [f.cpu() for f in found]


def _job(
    model: Any, backend: Any, plans: list[SteeringPlan | None], batches: list[list[Text]], can_keep: bool
) -> list[Tensor]:
    """`_forward` of batches, each with its plan, in one remote job."""
    with model.session(backend=backend):
        found = nnsight.save([])
        for plan, batch in zip(plans, batches, strict=True):
            found.extend(_forward(model, plan, batch, can_keep))
    return found


def _context(model: Any, plan: SteeringPlan | None, text: Text, length: int, can_keep: bool) -> Any:
    """Keys and values of a text's first tokens."""
    call: dict[str, Any] = {"input_ids": torch.tensor([text.ids[:length]]), "use_cache": True}
    call["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    if can_keep:
        call["logits_to_keep"] = 1
    with torch.no_grad(), model.trace(**call):
        _steer(model, plan, [text.prompt])
        cache = nnsight.save(model.output.past_key_values)
    return cache


def _in_common(texts: list[Text]) -> int:
    """How many first tokens all texts share, before the ones that predict a continuation."""
    most = min(len(text.ids) - text.scored for text in texts)
    first, last = min(text.ids for text in texts), max(text.ids for text in texts)
    return next((i for i in range(most) if first[i] != last[i]), most)


class Scorer:
    """Scores continuations.

    Args:
        model: the target.
        plan: steers it; None for none.
        host: where it runs; None for here.
        share: share the keys and values of a context where that pays; local models alone.
    """

    def __init__(self, model: Any, plan: SteeringPlan | None, host: Remote | None = None, share: bool = True) -> None:
        self.model, self.plan, self.host, self.share = model, plan, host, share and host is None
        self._can_keep = "logits_to_keep" in signature(model._module.forward).parameters
        self._tried = False
        self._own: Sequence[SteeringPlan] | None = None

    def __call__(
        self,
        texts: Sequence[Text],
        batch: int,
        done: Callable[[int, Tensor], None],
        own: Sequence[SteeringPlan] | None = None,
    ) -> None:
        """Scores texts in whichever order is quickest.

        Args:
            texts: what is scored.
            batch: texts a forward.
            done: called with a text's number and what `_found` gives for it, as soon as it is known.
            own: a plan for each text, in place of the one for all.
        """
        self._own = own
        alone: list[int] = []
        if self.share:
            by_context = sorted(range(len(texts)), key=lambda i: texts[i].ids[: texts[i].prompt])
            for _, group in groupby(by_context, key=lambda i: texts[i].ids[: texts[i].prompt]):
                numbers = list(group)
                if not self._shared([texts[i] for i in numbers], numbers, max(batch, SHARED), done):
                    alone += numbers
        else:
            alone = list(range(len(texts)))
        alone.sort(key=lambda i: -len(texts[i].ids))  # the longest first: what does not fit fails at once
        if self.host is None:
            for numbers in self._parts(alone, batch):
                plan = self._plan_of(numbers)
                self._report(numbers, _forward(self.model, plan, [texts[i] for i in numbers], self._can_keep), done)
            return
        for numbers in batches(alone, max(1, JOB // batch) * batch):
            parts = self._parts(numbers, batch)
            together, plans = [[texts[i] for i in some] for some in parts], [self._plan_of(some) for some in parts]
            with self.host.explained("Scoring continuations", "batch_size="):
                found = _job(self.model, self.host.backend(self.model), plans, together, self._can_keep)
            self._report([i for some in parts for i in some], found, done)

    def _parts(self, numbers: Sequence[int], most: int) -> list[list[int]]:
        """Runs of at most so many texts whose plans can share a forward."""
        if self._own is None:
            return batches(numbers, most)
        kinds: dict[Any, list[int]] = {}
        for i in numbers:
            kinds.setdefault(tuple(v.kind for v in self._own[i].vectors), []).append(i)
        return [part for some in kinds.values() for part in batches(some, most)]

    def _plan_of(self, numbers: Sequence[int]) -> SteeringPlan | None:
        """The plan of a batch of texts."""
        return self.plan if self._own is None else stack_plans([self._own[i] for i in numbers])

    @staticmethod
    def _report(numbers: list[int], found: list[Tensor], done: Callable[[int, Tensor], None]) -> None:
        for number, values in zip(numbers, found, strict=True):
            done(number, values)

    def _shared(self, texts: list[Text], numbers: list[int], rows: int, done: Callable[[int, Tensor], None]) -> bool:
        """Scores texts of one context together, if that pays and the model can; whether it did."""
        if len(texts) < 2:
            return False
        common = _in_common(texts)
        worth = WORTH.get(self.model.device.type, 2048)
        if common * (len(texts) - 1) < worth or not self.share:
            return False
        by_number, context = dict(zip(numbers, texts, strict=True)), None
        for part in self._parts(numbers, rows):
            some, plan = [by_number[i] for i in part], self._plan_of(part)
            try:
                if context is None:  # of one context, every row's plan does the same there
                    context = _context(self.model, self._plan_of(part[:1]), some[0], common, self._can_keep)
                found = _forward(self.model, plan, some, self._can_keep, in_rows(context, len(some)))
            except (AttributeError, TypeError, ValueError):  # a cache of another kind, as recurrent models have
                if self._tried:
                    raise
                self.share = False
                return False
            if not self._tried:  # a model is tried once
                self._tried = True
                plain = _forward(self.model, plan, some, self._can_keep)
                if not all(torch.allclose(a[0], b[0], rtol=1e-3, atol=1e-2) for a, b in zip(found, plain, strict=True)):
                    self.share = False
                    return False
            self._report(part, found, done)
        return True
