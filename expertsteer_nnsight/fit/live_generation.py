"""Generation while the expert reads on: its activation at what the target has written goes into the target's next step.

At each step the newest token of the target ends a text. The expert reads that text in its own tokens. Its activation at the
end pairs with the target's activation there, as at a shared token end of an anchor. Both models keep what they have read in
caches. The expert's tokens of a text may change when more is written ("exp", "expert"), so stale columns of its cache are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor

from ..models.positions import affixes
from ..models.residual import Residual, config_of, hidden
from ..ndif.argument import host_of
from ..states.forward import forward
from ..steering.plan import SteeringPlan
from ..steering.vectors import SteeringVector
from ..texts.texts import Text, encode, tokenizer_of

if TYPE_CHECKING:
    from .live_expert import _Setting

_ATTENTION = ("DynamicLayer", "DynamicSlidingWindowLayer")  # kinds of cache whose columns can be masked


class Reader:
    """Reads texts that grow, at their last token.

    Args:
        model: the expert, wrapped by nnsight.
        layers: which are read.
        remote: where it runs; elsewhere nothing is kept between steps.
        cached: keep keys and values, where the model allows it.
    """

    def __init__(self, model: Any, layers: Sequence[int], remote: Any = False, cached: bool = True) -> None:
        self.model, self.layers, self.host = model, tuple(sorted(layers)), host_of(remote)
        self.residual = Residual(model)
        self.cache = _cache_of(model) if cached and self.host is None else None
        self.ids: list[list[int]] = []
        self.columns: list[list[int]] = []
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    def __call__(self, ids: list[list[int]]) -> dict[int, Tensor]:
        """Activations `[row, hidden]` of each layer at the last of a row's tokens."""
        kept = self._kept(ids)
        if self.cache is not None:
            fed = max(len(row) - count for row, count in zip(ids, kept, strict=True))
            window = getattr(config_of(self.model), "sliding_window", None)
            if window and self.mask.shape[1] + fed > window:
                self.cache = None  # a window counts columns, and masked ones are among them
        if self.cache is None:
            batch = [(row, 0, [len(row) - 1]) for row in ids]
            backend = None if self.host is None else self.host.backend(self.model)
            found = forward(self.model, self.residual, batch, self.layers, None, 0, backend)
            return {layer: found[f"layer.{layer}"] for layer in self.layers}
        return self._onwards(ids, kept)

    def _kept(self, ids: list[list[int]]) -> list[int]:
        """How many first tokens of each row are in the cache; its last token is run in any case."""
        if not self.ids:
            return [0] * len(ids)
        same = [sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False)))
                for a, b in zip(self.ids, ids, strict=True)]  # fmt: skip
        return [min(count, len(mine) - 1) for count, mine in zip(same, ids, strict=True)]

    def _onwards(self, ids: list[list[int]], kept: list[int]) -> dict[int, Tensor]:
        """Activations where only what is new of each row is run."""
        if not self.ids:
            self.columns, self.mask = [[] for _ in ids], torch.zeros(len(ids), 0, dtype=torch.long)
        for row, count in enumerate(kept):
            self.mask[row, self.columns[row][count:]] = 0
            self.columns[row] = self.columns[row][:count]
        new = [mine[count:] for mine, count in zip(ids, kept, strict=True)]
        width, past = max(map(len, new)), self.mask.shape[1]
        block = torch.tensor([row + [0] * (width - len(row)) for row in new])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in new])
        self.mask = torch.cat([self.mask, real], 1)
        for row, mine in enumerate(new):
            self.columns[row] += range(past, past + len(mine))
        self.ids = [list(mine) for mine in ids]
        position = torch.tensor(kept)[:, None] + torch.arange(width)
        call = _call(self.model, block, self.mask, position, self.cache)
        rows, last = torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in new])
        with torch.no_grad(), self.model.trace(**call) as tracer:
            states = []
            for layer in self.layers:
                h = hidden(self.residual.layers[layer].output)
                states.append(h[rows.to(h.device), last.to(h.device)].cpu())
            found = nnsight.save(torch.stack(states))
            tracer.stop()
        return dict(zip(self.layers, found, strict=True))


class Writer:
    """Writes on, one token a step, steered at the prompt and at each token that was written.

    Args:
        model: the target, wrapped by nnsight.
        plan: of its prompts.
        prompts: token ids of each.
        remote: where it runs; elsewhere nothing is kept between steps.
        cached: keep keys and values, where the model allows it.
    """

    def __init__(
        self, model: Any, plan: SteeringPlan, prompts: list[list[int]], remote: Any = False, cached: bool = True
    ) -> None:
        self.model, self.plan, self.prompts, self.host = model, plan, prompts, host_of(remote)
        self.cache = _cache_of(model) if cached and self.host is None else None
        self.written: list[list[int]] = [[] for _ in prompts]
        self.steps: list[list[SteeringVector]] = []
        width = max(map(len, prompts))
        self.pad = torch.tensor([width - len(row) for row in prompts])

    def __call__(self, vectors: list[SteeringVector]) -> list[int]:
        """The likeliest next token of each row.

        Args:
            vectors: with a row for each prompt, at the token that was written last; none in the first step.
        """
        if self.written[0]:
            self.steps.append(vectors)
        ids = [[0] * int(gap) + row + more for gap, row, more in zip(self.pad, self.prompts, self.written, strict=True)]
        tokens = torch.tensor(ids)
        columns = torch.arange(tokens.shape[1])
        mask = (columns >= self.pad[:, None]).long()
        position = (columns - self.pad[:, None]).clamp_min(0)
        if self.cache is not None and self.written[0]:
            call = _call(self.model, tokens[:, -1:], mask, position[:, -1:], self.cache)
            plan = SteeringPlan(vectors, self.plan.target)
        else:
            call = _call(self.model, tokens, mask, position, self.cache)
            plan = self.plan if not self.steps else self._whole()
        if self.host is not None:
            call["backend"] = self.host.backend(self.model)
        with torch.no_grad(), self.model.trace(**call):
            plan.apply(self.model)
            logits = nnsight.save(self.model.output.logits[:, -1])
        chosen = logits.argmax(-1).tolist()
        for row, token in zip(self.written, chosen, strict=True):
            row.append(token)
        return chosen

    def _whole(self) -> SteeringPlan:
        """The prompts' plan, and what every step put in since, at its place."""
        added = []
        for k in range(len(self.steps[0])):
            one = self.steps[0][k]
            rows = range(len(self.prompts))
            zs = torch.stack([step[k].direction for step in self.steps], 1)  # [row, step, hidden]
            strengths = torch.stack([torch.as_tensor(step[k].strength) for step in self.steps], 1)
            on = [[s for s in range(len(self.steps)) if strengths[row, s] != 0] for row in rows]
            at = [[len(self.prompts[row]) + s for s in on[row]] for row in rows]
            full = max((float(strengths[row, s]) for row in rows for s in on[row]), default=0.0)
            direction = torch.cat([zs[row, on[row]] for row in rows])
            added.append(
                SteeringVector(one.layer, direction, full, None, one.op, "given", at=at, predictor=one.predictor)
            )
        return SteeringPlan([*self.plan.vectors, *added], self.plan.target, {}, self.plan.prompts)


def _cache_of(model: Any) -> Any:
    """An empty cache whose columns can be masked, or None where the model keeps another kind."""
    from transformers import DynamicCache

    module = model._module
    if type(module).__name__ == "TransformerBridge" or "past_key_values" not in signature(module.forward).parameters:
        return None
    cache = DynamicCache(config=module.config)
    kinds = {type(layer).__name__ for layer in cache.layers}
    return cache if kinds <= set(_ATTENTION) else None


def _call(model: Any, ids: Tensor, mask: Tensor, position: Tensor, cache: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
    known = signature(model._module.forward).parameters
    if cache is not None:
        call["past_key_values"] = cache
    if "position_ids" in known:
        call["position_ids"] = position
    return call


class Story:
    """What the expert reads of a prompt and what was written after it, in its own tokens.

    Args:
        expert: its tokenizer.
        target: the tokenizer of what is written.
        prompt: as the expert reads it.
        ids: of the prompt, in the target's tokens.
    """

    def __init__(self, expert: Any, target: Any, prompt: Text, ids: list[int]) -> None:
        self.expert, self.target, self.prompt, self.ids = expert, target, prompt, ids
        self.known = affixes(expert)
        self.start = target.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def text(self, written: list[int]) -> str:
        """What the written tokens say."""
        whole = self.target.decode([*self.ids, *written], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if whole.startswith(self.start):
            return whole[len(self.start) :]
        return self.target.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def read(self, written: list[int]) -> tuple[list[int], bool]:
        """The expert's tokens of all that there is, and whether the last of them ends where the target's ends."""
        more = self.text(written)
        whole = not more.endswith("\ufffd")  # a character of which the last bytes are not written yet
        more = more.rstrip("\ufffd")
        if isinstance(self.prompt, str):
            return encode(self.expert, self.prompt + more, self.known)[0], whole and bool(more)
        ids, _ = encode(self.expert, self.prompt, self.known)
        return [*ids, *self.expert(more, add_special_tokens=False)["input_ids"]], whole and bool(more)


def follow(
    setting: _Setting,
    prompts: Sequence[Text],
    max_new_tokens: int,
    reads: Sequence[Text] | None = None,
    heard: Sequence[bool] | None = None,
    cached: bool = True,
) -> list[list[int]]:
    """Greedy continuations of prompts, which the expert reads as they are written: new token ids, without an end token.

    Args:
        setting: of a fitted live expert.
        prompts: strings or chat messages.
        max_new_tokens: of each.
        reads: what the expert reads in the prompts' place, before what is written.
        heard: which prompts it steers; as the gate says if None.
        cached: keep keys and values of both models; without, every step reads everything again.
    """
    live, reads = setting.live, prompts if reads is None else reads
    tokenizer, module = tokenizer_of(live.target_), live.target_._module
    known = affixes(tokenizer)
    ids = [encode(tokenizer, prompt, known)[0] for prompt in prompts]
    stories = [Story(tokenizer_of(live.expert_), tokenizer, r, row) for r, row in zip(reads, ids, strict=True)]
    ends = module.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, (list, tuple)) else [ends])} - {None}
    reader = Reader(live.expert_, [m.expert for m in setting.maps], live.remote_, cached)
    heard = setting.heard(prompts, reads) if heard is None else heard
    writer = Writer(live.target_, setting.plan(prompts, reads, heard), ids, live.remote_target_, cached)
    found: list[list[int]] = [[] for _ in prompts]
    open_rows, vectors = set(range(len(prompts))), []
    for _ in range(max_new_tokens):
        for row, token in enumerate(writer(vectors)):
            if row in open_rows and token in ends:
                open_rows.discard(row)
            elif row in open_rows:
                found[row].append(token)
        if not open_rows:
            break
        texts = [story.read(mine) for story, mine in zip(stories, found, strict=True)]
        states = reader([text for text, _ in texts])
        on = torch.tensor([row in open_rows and shared and heard[row] for row, (_, shared) in enumerate(texts)]).float()
        vectors = [setting.onwards(m, states[m.expert], on) for m in setting.maps]
    return found
