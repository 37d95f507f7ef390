"""TransformerLens: plans as its hooks, and its vectors as plans.

A plan runs in traces of `nnsight.NNsight(bridge)` as in those of any other model. TransformerLens' own `generate` and
`run_with_hooks` are no traces: there a plan is a list of hooks.

    with bridge.hooks(fwd_hooks=plan.to_transformer_lens(bridge)):
        bridge.generate("The weekend was", max_new_tokens=20)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.positions import Positions, bridge_mask, prefix_of
from ..steering.plan import SteeringPlan
from ..steering.vectors import SteeringVector
from .formats import plan_from

Hook = tuple[str, Callable[..., Any]]
_NAME = re.compile(r"(?:blocks\.)?(\d+)\.hook_(resid_post|out|resid_pre|in)")


def hooks(plan: SteeringPlan, bridge: Any, any_id: bool = False) -> list[Hook]:
    """A plan as hooks for `bridge.hooks(fwd_hooks=...)` and `bridge.run_with_hooks(..., fwd_hooks=...)`.

    The hooks of a plan that tells positions apart (`where`, or a tokenizer that prepends special tokens) read the tokens at the
    embedding, where padding is told by its token, whatever attention mask the call has. They count decode steps: a forward that
    continues the last one by one token is a step, any other begins a new text. A prompt of one token, or one that continues the
    last prompt by a token, cannot be told from a step, so make new hooks for it.

    Args:
        plan: the plan.
        bridge: a `TransformerBridge`, or `nnsight.NNsight(bridge)`.
        any_id: take a model of another id (width and depth must fit).

    Raises:
        ValueError: the plan does not fit the model.
        TypeError: the model is none of TransformerLens'.
    """
    module = getattr(bridge, "_module", bridge)
    if not hasattr(module, "hook_dict"):
        raise TypeError(
            f"Asked for TransformerLens hooks of a {type(module).__name__}, which has no hook_dict: pass a TransformerBridge."
        )
    plan.check(_wrapped(bridge), any_id)
    prefix = prefix_of(module)
    followed = _Followed(module.tokenizer, prefix) if plan.needs_positions(prefix) else None
    made: list[Hook] = [] if followed is None else [("embed.hook_in", followed)]
    return made + [
        (f"blocks.{v.layer}.hook_out", partial(_edit, plan=plan, vector=v, followed=followed)) for v in plan.vectors
    ]


def _edit(h: Tensor, hook: Any, plan: SteeringPlan, vector: SteeringVector, followed: _Followed | None) -> Tensor:
    return plan.steered(vector, h, None if followed is None else followed.positions)


class _Followed:
    """The hook at the embedding: which tokens the running forward holds."""

    def __init__(self, tokenizer: Any, prefix: tuple[int, ...]) -> None:
        self.tokenizer, self.prefix = tokenizer, prefix
        self.positions: Positions | None = None
        self.ids = self.mask = torch.zeros(0, 0, dtype=torch.long)

    def __call__(self, tokens: Tensor, hook: Any) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point():
            self.positions = None
            raise ValueError("The plan tells positions apart, which takes token ids: pass text or ids, no embeddings.")
        rows, new = tokens.shape
        seen = self.ids.shape[1]
        cached = self.positions is not None and new == 1 and len(self.ids) == rows
        whole = not cached and self.ids.shape == (rows, new - 1) and bool((self.ids == tokens[:, :-1]).all())
        step = self.positions.step + 1 if self.positions is not None and (cached or whole) else 0
        ids = torch.cat([self.ids, tokens], 1) if cached else tokens
        one = torch.ones(rows, 1, dtype=torch.long, device=tokens.device)
        self.mask = torch.cat([self.mask, one], 1) if step else bridge_mask(self.tokenizer, tokens, bool(self.prefix))
        self.ids = ids
        self.positions = Positions.of(tokens, self.mask, new, self.prefix, step, past=seen if cached else 0)


def plan_of(vectors: Mapping[str, Tensor], bridge: Any = None, **settings: Any) -> SteeringPlan:
    """Vectors made from TransformerLens activations, such as differences of means over an `ActivationCache`, as a plan.

    Args:
        vectors: `[hidden]` by hook name: `blocks.14.hook_resid_post`, `blocks.14.hook_out`; what goes into block L,
            `blocks.L.hook_resid_pre`, is what block L - 1 puts out.
        bridge: the model that they are for, whose identity the plan keeps.
        settings: `strength`, `residual_norms` and fields of every `SteeringVector`, as in `interop.formats.plan_from`.

    Raises:
        ValueError: a name that is no residual stream after a block.
    """
    by_layer = {_layer_of(name): v for name, v in vectors.items()}
    model = None if bridge is None else _wrapped(bridge)
    return plan_from(by_layer, model, info={"imported": "transformer_lens"}, **settings)


def _wrapped(bridge: Any) -> Any:
    from nnsight import NNsight

    return bridge if hasattr(bridge, "_module") else NNsight(bridge)


def _layer_of(name: str) -> int:
    found = _NAME.fullmatch(name)
    layer = -1 if found is None else int(found[1]) - (found[2] in ("resid_pre", "in"))
    if layer < 0:
        raise ValueError(
            f"{name!r} is not the residual stream after a block: give blocks.L.hook_resid_post, or blocks.L.hook_resid_pre "
            "for what block L - 1 puts out (L from 1)."
        )
    return layer
