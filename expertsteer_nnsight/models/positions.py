"""Which tokens a running forward holds: real ones, prepended special ones, prompt and completion.

A position belongs to the *completion* if its output predicts a new token, and to the *prompt* otherwise. The last
prompt token, whose output predicts the first new one, is therefore the completion's first position, and every real
position belongs to exactly one of the two. `from_step=k` keeps the completion from the position that predicts new
token k on (0: the last prompt token; 1: the first generated token). *last_prompt* is that last prompt token alone.

This module also runs on servers: torch and nnsight are all that it may need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .tracing import current_step, in_step, passed, run_option


def prefix_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that `tokenizer` puts before every text, such as Gemma's `<bos>`; often none.

    Found by what the tokenizer does, never by an id's name: SmolLM2's "bos" id is `<|im_start|>`, which it does not
    prepend and which a chat holds several times.
    """
    return affixes(tokenizer)[0]


def affixes(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that `tokenizer` puts before and after every text."""
    if tokenizer is None:
        return (), ()
    with_special = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return tuple(with_special[:start]), tuple(with_special[start + len(plain) :])
    return (), ()


def prefix_of(model: Any) -> tuple[int, ...]:
    """The special tokens that a model's texts begin with: its tokenizer's, or what a TransformerBridge prepends by itself."""
    module = getattr(model, "_module", model)
    tokenizer = getattr(model, "tokenizer", None)
    if not hasattr(module, "to_tokens") or tokenizer is None:
        return prefix_ids(tokenizer)
    ids, plain = module.to_tokens("a")[0].tolist(), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    return tuple(ids[: len(ids) - len(plain)])


def real_columns(mask: Any, rows: int, length: int) -> Tensor | None:
    """`[row, column]` long, 1 for a real token, from what a model was called with as its attention mask.

    That is a 2-D mask; or, with static caches, a 4-D one (bool, or 0 and a large negative number) or a mapping of them
    by kind of layer, whose last query sees every real column. None where there is no mask.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if mask.ndim == 4:
        last = mask[:, 0, -1, :length]
        mask = (last if last.dtype == torch.bool else last == 0).expand(rows, -1)
    return mask[:, :length].long()


@dataclass(frozen=True, eq=False)
class Positions:
    """The tokens of one forward pass of a traced model; read it at the top of a step, before any layer.

    Attributes:
        real: `[row, position]` bool: not padding.
        prefix: `[row, position]` bool: a special token that the tokenizer put before the text.
        index: `[row, position]` long: which real token of its row a position is, counted from 0 over the whole run.
        step: 0 for the prompt's forward, s for the s-th decode step.
        past: number of cached positions before this forward.
        chunked: the prompt may come in several forwards.
        ids: `[row, position]` token ids; None where the model was called with embeddings.
    """

    real: Tensor
    prefix: Tensor
    index: Tensor
    step: int
    past: int
    chunked: bool = False
    ids: Tensor | None = None

    @classmethod
    def read(cls, model: Any, prefix: tuple[int, ...] | None = None) -> Positions:
        """Reads the root's inputs inside a trace. Works in the prompt's forward and in every decode step.

        Args:
            model: the traced model.
            prefix: ids that the tokenizer prepends; found (`prefix_of`) if not given.

        Raises:
            RuntimeError: outside a trace, or after the model has read its inputs in this step.
        """
        what = "Positions.read(model)"
        step = current_step(model, what)
        late = (
            "The positions come from the model's inputs, which are before every layer, and this block has already "
            "read a later value in this step: read positions = Positions.read(model) at the top of the step."
        )
        if passed(model, "input", step, what):
            raise RuntimeError(late)
        with in_step(step, False, late):
            args, kwargs = model.inputs
        prefix = prefix_of(model) if prefix is None else prefix
        tokens = kwargs.get("input_ids", kwargs.get("input", args[0] if args else None))
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        if isinstance(tokens, (str, list)):
            tokens, mask = _bridge_tokens(model, tokens, kwargs)
        elif mask is None and hasattr(model._module, "to_tokens") and isinstance(tokens, Tensor) and tokens.ndim == 2:
            mask = bridge_mask(model._module.tokenizer, tokens, bool(prefix))
        if not isinstance(tokens, Tensor):
            raise RuntimeError(
                f"The model was called without input_ids or text, so its positions are unknown: {list(kwargs)}."
            )
        ids = tokens if tokens.ndim == 2 else None
        rows, q = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = real_columns(mask, rows, past + q)
        if mask is None:
            mask = torch.ones(rows, past + q, dtype=torch.long, device=tokens.device)
        chunked = run_option("prefill_chunk_size", what) is not None
        return cls.of(ids, mask, q, prefix, step, past, chunked)

    @classmethod
    def of(
        cls,
        ids: Tensor | None,
        mask: Tensor,
        new: int,
        prefix: tuple[int, ...] = (),
        step: int = 0,
        past: int = 0,
        chunked: bool = False,
    ) -> Positions:
        """From the tokens and the mask of a forward.

        Args:
            ids: `[row, position]` tokens of this forward; None if unknown, and the prefix is then taken to be there.
            mask: `[row, past + position]`, 1 for a real token.
            new: how many positions this forward has, the last ones of the mask.
            prefix: ids that the tokenizer prepends.
            step: decode step, 0 for the prompt.
            past: cached positions before this forward.
            chunked: the prompt may come in several forwards.
        """
        real = mask[:, -new:].bool()
        index = (mask.long().cumsum(1) - 1)[:, -new:]
        special = torch.zeros_like(real)
        for k, token in enumerate(prefix):
            at = real & (index == k)
            special |= at if ids is None else at & (ids == token)
        return cls(real, special, index, step, past, chunked, ids)

    def only_rows(self, rows: Tensor) -> Positions:
        """The same with the rows alone that `rows` `[row]` (bool) names: no mask chooses the others, so they stay unsteered.

        `plan.apply(model, positions.only_rows(fires))` steers where a probe fires, whatever the plan does there.
        """
        return replace(self, real=self.real & rows.to(self.real.device)[:, None])

    def without_row(self, row: int) -> Positions:
        """The same with one row that no mask chooses: it stays unsteered."""
        return self.only_rows(torch.arange(len(self.real)) != row)

    def _completion_step(self, prompt_lengths: Any) -> Tensor:
        """`[row, position]`: which new token a position's output predicts (negative: a prompt token)."""
        if prompt_lengths is not None:
            lengths = torch.as_tensor(prompt_lengths, device=self.real.device)
            if lengths.ndim != 1 or len(lengths) != len(self.real):
                raise ValueError(
                    f"prompt_lengths needs one number a row: {len(self.real)} rows, got {tuple(lengths.shape)}."
                )
            return self.index - (lengths[:, None] - 1)
        q = self.real.shape[1]
        if self.chunked or (self.step > 0 and self.past > 0 and q > 1):
            raise ValueError(
                "The prompt comes in several forwards, or several tokens in one decode step (chunked prefill, assisted "
                "generation), so prompt and completion cannot be told apart: steer all positions, or pass prompt_lengths=."
            )
        if self.step > 0 and self.past > 0:
            return torch.full_like(self.index, self.step)
        # the prompt's own forward, or a decode step that runs everything again for want of a cache
        return self.index - (self.index.amax(1, keepdim=True) - self.step)

    def mask(
        self, where: str = "all", from_step: int = 0, skip_special: bool = True, prompt_lengths: Any = None
    ) -> Tensor:
        """`[row, position]` bool: the positions that `where` names; never padding.

        Args:
            where: "all", "prompt", "completion", or "last_prompt": the last prompt token alone, in the prompt's forward.
            from_step: of the completion, the first new token whose prediction counts.
            skip_special: leave out what the tokenizer prepends.
            prompt_lengths: `[row]`, in real tokens: where the completion of a teacher-forced row starts.

        Raises:
            ValueError: not one length a row, prompt and completion cannot be told apart (chunked prefill, assisted generation),
                or "given", whose places `columns` finds.
        """
        if where == "given":
            raise ValueError('The places of where="given" are a vector\'s own: find them with positions.columns(at).')
        chosen = self.real & ~self.prefix if skip_special else self.real
        if where == "all" and from_step == 0:
            return chosen
        step = self._completion_step(prompt_lengths)
        if where == "prompt":
            return chosen & (step < 0)
        return chosen & (step == 0 if where == "last_prompt" else step >= from_step)

    def columns(self, at: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Where this forward holds given tokens: row, column, and which of the places it is, all `[found]`.

        Args:
            at: for each row, token numbers counted from 0 over the row's real tokens, prepended ones too. What lies in another
                forward (an earlier or later decode step) is left out.
        """
        row, token = (
            torch.tensor([pair[k] for pair in ((n, t) for n, mine in enumerate(at) for t in mine)], dtype=torch.long,
                         device=self.index.device)
            for k in (0, 1)
        )  # fmt: skip
        here = (self.index[row] == token[:, None]) & self.real[row]
        place, column = here.nonzero(as_tuple=True)
        return row[place], column, place


def bridge_mask(tokenizer: Any, tokens: Tensor, prepend_bos: bool) -> Tensor:
    """`[row, position]`, 1 for a real token, as TransformerLens sees it where it is given tokens alone."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return torch.ones_like(tokens)
    from transformer_lens.utilities.tokenize_utils import get_attention_mask

    # one row alone may well end in the token that pads
    right = len(tokens) > 1 and bool((tokens[:, -1] == pad).any())
    return get_attention_mask(tokenizer, tokens, prepend_bos, "right" if right else "left").to(tokens.device).long()


def _bridge_tokens(model: Any, texts: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens and mask of the strings that a TransformerBridge was called with (it pads on the tokenizer's side)."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    module = model._module
    bos, side = options.get("prepend_bos"), options.get("padding_side")
    tokens = module.to_tokens(texts, prepend_bos=bos, padding_side=side)
    lengths = torch.tensor([module.to_tokens(t, prepend_bos=bos).shape[1] for t in texts], device=tokens.device)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    left = (side or getattr(module.tokenizer, "padding_side", "right")) == "left"
    real = columns >= tokens.shape[1] - lengths[:, None] if left else columns < lengths[:, None]
    return tokens, real.long()
