"""Strength under a KL budget, and what a strength does and costs; many plans share one forward.

A batch holds one text in as many rows as there are plans, and row 0 unsteered: nothing is padded, and every row is
compared with the unsteered one of its own forward. KL is KL(steered || unsteered) in nats, per token.

With a remote model all texts go in one job for each batch of plans, and KL, NLL and log-odds are computed on the server:
they are one number a token, where the logits would be one for each entry of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .activations import host_of, tokenizer_of
from .positions import Positions, affixes
from .residual import Residual, config_of
from .steering import SteeringPlan
from .texts import as_texts, encode

if TYPE_CHECKING:
    from .remote import Remote


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


def row_costs(logits: Tensor, ids: Tensor, start: int) -> list[Tensor]:
    """KL(row || row 0) `[row, token]` and NLL of the next token `[row, token - 1]`, from position `start` on, in nats.

    Runs inside the trace: row by row, so that no second copy of the logits is made.
    """
    kl, nll = [], []
    base = torch.log_softmax(logits[0, start:].float(), -1)
    for row in logits:
        mine = torch.log_softmax(row[start:].float(), -1)
        kl.append((mine.exp() * (mine - base)).sum(-1).clamp_min(0))
        nll.append(-mine[:-1].gather(-1, ids[start + 1 :, None])[:, 0])
    return [torch.stack(kl), torch.stack(nll)]


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
    ids: list[int],
    prefix: int,
    rows: int,
    options: Mapping[str, Any],
    border: bool,
    reduce: Callable[[Tensor, Tensor, int], list[Tensor]],
    stop: bool,
) -> list[Tensor]:
    """What `reduce(logits, ids, prefix)` makes of one text in `rows` rows. Runs on a server as a whole."""
    residual, first = Residual(model), steered.layers[0]
    tokens = torch.tensor([ids] * rows)
    state = _shared_states(model, residual, ids, first - 1, stop) if first > 0 else None
    skipped = [] if state is None else [(residual.layers[i], state) for i in range(first)]
    lengths = [prefix + 1] * rows if border else None
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False, **options}
    with torch.no_grad(), model.trace(**call):
        positions = Positions.read(model).without_row(0)
        for block, output in skipped:
            block.skip(output.expand(rows, -1, -1))
        steered.apply(model, positions, lengths)
        logits = model.output.logits
        values = nnsight.save(reduce(logits, tokens[0].to(logits.device), prefix))
    return [v.cpu() for v in values]


def _rows(
    model: Any,
    plans: Sequence[SteeringPlan],
    texts: Any,
    reduce: Callable[[Tensor, Tensor, int], list[Tensor]],
    *,
    forced: bool,
    rows: int | None,
    remote: bool | str | Remote,
    progress: bool,
    label: str,
) -> list[list[Tensor]]:
    """For each text, what `reduce(logits, ids, prefix)` makes of row 0 (unsteered) and of a row for each plan.

    Rows that share a forward differ from the first steered layer on, so the layers before it run once, for one row.
    `forced` texts count as completions after their first token, others as prompts of which only the last logits matter.
    """
    tokenizer, host = tokenizer_of(model), host_of(remote)
    known = affixes(tokenizer)
    encoded = [encode(tokenizer, t, known) for t in as_texts(texts)]
    # the head over a large vocabulary is a third of a forward, and most models can leave out all but the last position
    can_keep = not forced and "logits_to_keep" in signature(model._module.forward).parameters
    options = {"logits_to_keep": 1} if can_keep else {}
    length = 1 if can_keep else max(len(ids) for ids, _ in encoded)
    size = _rows_that_fit(model, length, rows, 4e9 if host is None else 1e9)  # a server is shared
    order = sorted(range(len(plans)), key=lambda i: _kind(plans[i]))
    chunks = [c for _, g in groupby(order, key=lambda i: _kind(plans[i])) for c in _batches(list(g), size)]
    found: list[list[list[Tensor]]] = []
    with tqdm(total=len(chunks) * len(encoded), desc=label, unit="forward", disable=not progress) as bar:
        for chunk in chunks:
            steered = stack([plans[i] for i in chunk])
            count = len(chunk) + 1
            border = forced and any(v.where == "completion" for v in steered.vectors)
            if host is not None:
                with host.explained(f"Measuring {label}", "rows="):
                    backend = host.backend(model, bar.set_postfix_str)
                    mine = _job(model, backend, steered, encoded, count, options, border, reduce)
                bar.update(len(encoded))
            else:
                mine = []
                for ids, prefix in encoded:
                    mine.append(_one_text(model, steered, ids, prefix, count, options, border, reduce, True))
                    bar.update()
            found.append(mine)
    place = [0, *(1 + torch.tensor([i for c in chunks for i in c]).argsort()).tolist()]
    joined = []
    for per_chunk in zip(*found, strict=True):
        parts = [
            torch.cat([c[k] if n == 0 else c[k][1:] for n, c in enumerate(per_chunk)]) for k in range(len(per_chunk[0]))
        ]
        joined.append([p[place] for p in parts])
    return joined


def _job(
    model: Any,
    backend: Any,
    steered: SteeringPlan,
    encoded: list[tuple[list[int], int]],
    rows: int,
    options: Mapping[str, Any],
    border: bool,
    reduce: Callable[[Tensor, Tensor, int], list[Tensor]],
) -> list[list[Tensor]]:
    """`_one_text` of every text, in one remote job."""
    with model.session(backend=backend):
        found = nnsight.save([])
        for ids, prefix in encoded:
            found.append(_one_text(model, steered, ids, prefix, rows, options, border, reduce, False))
    return found


def _batches(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


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
        texts: strings or chat messages. Special tokens that the tokenizer prepends are not counted.
        rows: plans a forward; as many as fit into about 4 GB (1 GB if remote) if not given.
        remote: True, "http://...", or a `Remote`: run on NDIF.
        progress: show a progress bar.
    """
    label = "KL on neutral text"
    found = _rows(model, plans, texts, row_costs, forced=True, rows=rows, remote=remote, progress=progress, label=label)
    return torch.cat([kl for kl, _ in found], 1), torch.cat([nll for _, nll in found], 1)


def word_scores(
    model: Any,
    plans: Sequence[SteeringPlan],
    prompts: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
) -> Tensor:
    """Log-odds of `positive` over `negative` next words after each prompt, `[1 + plan, prompt]`, nats; row 0 unsteered.

    A word counts with its first token after a space.

    Raises:
        ValueError: a positive and a negative word begin with the same token.
    """

    def first(words: Sequence[str]) -> list[int]:
        return sorted({tokenizer_of(model)(" " + w, add_special_tokens=False)["input_ids"][0] for w in words})

    up, down = first(positive), first(negative)
    if set(up) & set(down):
        raise ValueError("Some positive and negative words begin with the same token: choose words that differ there.")

    def odds(logits: Tensor, ids: Tensor, prefix: int) -> list[Tensor]:
        last = logits[:, -1].float()
        return [last[:, up].logsumexp(-1) - last[:, down].logsumexp(-1)]

    label = "effect on prompts"
    found = _rows(model, plans, prompts, odds, forced=False, rows=rows, remote=remote, progress=progress, label=label)
    return torch.stack([score for (score,) in found], 1)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Strengths that meet a KL budget, one a plan.

    Attributes:
        strength: total strength of each plan, in residual norms: the root of the summed squares over its layers.
        kl: the KL quantile there, in nats.
        nll: mean negative log-likelihood of the neutral texts there, nats a token.
        unsteered_nll: the same without steering.
        met: whether `kl` is within `tolerance` of the budget.
        curve: for each plan, every (strength, KL) that was tried, ascending.
    """

    strength: Tensor
    kl: Tensor
    nll: Tensor
    unsteered_nll: float
    met: Tensor
    curve: list[list[tuple[float, float]]]


def total_strength(plan: SteeringPlan) -> float:
    """Root of the summed squares of a plan's strengths: k layers of s / sqrt(k) count as s."""
    return math.sqrt(sum(float(v.strength) ** 2 for v in plan.vectors))


def with_total(plan: SteeringPlan, strength: float | int) -> SteeringPlan:
    """The plan scaled to a total strength.

    Raises:
        ValueError: its own strength is zero, which no factor changes.
    """
    if total_strength(plan) == 0:
        raise ValueError("The plan's strength is zero, so it cannot be scaled: give it any other.")
    return plan * (strength / total_strength(plan))


def calibrate_many(
    model: Any,
    plans: Sequence[SteeringPlan],
    texts: Any,
    kl_budget: float | int = 1.0,
    *,
    quantile: float = 0.95,
    tolerance: float = 0.03,
    start: float = 0.3,
    limit: float | int = 8.0,
    rounds: int = 12,
    rows: int | None = None,
    remote: bool | str | Remote = False,
    progress: bool = False,
) -> Calibration:
    """Finds, for every plan by itself, the strength at which the KL quantile over tokens meets the budget.

    Each round is one batch of forwards for all plans that are not there yet. The KL grows about as the square of the
    strength, so the next try interpolates log KL against log strength between the nearest two tries on either side, and
    bisects where that does not close in.

    Args:
        model: the target.
        plans: their signs count, their strengths do not.
        texts: neutral texts.
        kl_budget: nats.
        quantile: of KL(steered || unsteered) over all tokens.
        tolerance: relative, on the KL.
        start: first strength tried, in residual norms.
        limit: largest strength tried.
        rounds: most evaluations of a plan.
        rows: plans a forward (`costs`).
        remote: True, "http://...", or a `Remote`: run on NDIF.
        progress: show a progress bar.
    """
    curves: list[list[tuple[float, float]]] = [[] for _ in plans]
    nlls: dict[tuple[int, float], float] = {}
    unsteered = math.nan
    next_try = [start] * len(plans)
    with tqdm(total=len(plans), desc="calibrated", unit="plan", disable=not progress) as bar:
        for _ in range(rounds):
            open_ = [i for i, tried in enumerate(next_try) if tried > 0]
            if not open_:
                break
            kl, nll = costs(model, [with_total(plans[i], next_try[i]) for i in open_], texts, rows=rows, remote=remote)
            unsteered = float(nll[0].mean())
            levels = torch.quantile(kl[1:], quantile, dim=1).tolist()
            if not all(math.isfinite(x) for x in levels) or max(levels) == 0:
                raise ValueError(
                    f"The KL on the neutral texts is {'zero' if max(levels) == 0 else 'NaN or infinite'} at a strength of "
                    f"{start}: the plans steer none of their tokens (prompt only?), or break the model."
                )
            for i, value, mean in zip(open_, levels, nll[1:].mean(1).tolist(), strict=True):
                nlls[i, next_try[i]] = mean
                curves[i] = sorted([*curves[i], (next_try[i], value)])
                next_try[i] = _propose(curves[i], kl_budget, tolerance, limit)
            bar.update(sum(next_try[i] == 0 for i in open_))
    best = [min(curve, key=lambda p: (abs(math.log(max(p[1], 1e-12) / kl_budget)), p[0])) for curve in curves]
    kl_found = torch.tensor([p[1] for p in best])
    met = (kl_found / kl_budget).log().abs() <= math.log1p(tolerance) + 1e-6
    best_nll = torch.tensor([nlls[i, p[0]] for i, p in enumerate(best)])
    return Calibration(
        torch.tensor([p[0] for p in best], dtype=torch.float64), kl_found, best_nll, unsteered, met, curves
    )


def _propose(curve: list[tuple[float, float]], budget: float | int, tolerance: float, limit: float | int) -> float:
    """The next strength to try, or 0 where one has met the budget or none can."""
    if any(abs(math.log(max(kl, 1e-12) / budget)) <= math.log1p(tolerance) for _, kl in curve):
        return 0.0
    below = max((p for p in curve if p[1] < budget), default=None)
    above = min((p for p in curve if p[1] >= budget and (below is None or p[0] > below[0])), default=None)
    if below is None:
        return curve[0][0] * max(0.1, 0.95 * math.sqrt(budget / curve[0][1]))
    if above is None:
        return (
            0.0
            if below[0] >= limit
            else min(limit, below[0] * min(4.0, 1.05 * math.sqrt(budget / max(below[1], 1e-6))))
        )
    (x0, y0), (x1, y1) = [(math.log(x), math.log(max(y, 1e-12) / budget)) for x, y in (below, above)]
    # interpolation alone can keep one end of the bracket for ever, so every other late try halves it
    share = 0.5 if len(curve) > 3 and len(curve) % 2 else min(0.9, max(0.1, -y0 / (y1 - y0)))
    return math.exp(x0 + share * (x1 - x0))
