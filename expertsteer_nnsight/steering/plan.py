"""Steering plans: the steering vectors of one intervention, and where they came from.

A plan is frozen. `plan.apply(model)` edits inside the user's own trace; `plan.attach(model)` gives an edited model whose
every later trace and generation is steered. What runs in a trace may be sent to a server, so those functions need
torch and nnsight alone, and their annotations are strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.identity import ModelIdentity
from ..models.positions import Positions, prefix_of
from ..models.prompts import Prompts
from ..models.residual import Residual
from ..models.tracing import batch_rows, current_step, every_step, in_step, invoke_rows, passed, pin
from .header import PlanHeader
from .vectors import SteeringVector, needs_positions, stack


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """The steering vectors of one intervention, and where they came from.

    Attributes:
        vectors: in the order of their layers (vectors of one layer act in the order given).
        target: the model that they were made for, or its identity, which is what is kept; None fits any model of that width.
        info: what is known of their making: expert, aligner and its held-out fit, layer pairs and scores, direction
            method, position rule, calibration, receipt, hashes, library versions. Plain JSON values.
        prompts: those that the plan was made for, one a row, where it refuses others; None fits any.

    Raises:
        ValueError: no vectors, or vectors of different widths, or for other numbers of rows than of prompts.
    """

    vectors: Sequence[SteeringVector]
    target: ModelIdentity | Any = None
    info: Mapping[str, Any] = field(default_factory=dict)
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        vectors = tuple(self.vectors)
        if not vectors:
            raise ValueError("A plan needs at least one SteeringVector.")
        widths = {v.direction.shape[-1] for v in vectors}
        if len(widths) > 1:
            raise ValueError(f"The vectors of one plan must have one width, but have {sorted(widths)}.")
        if hasattr(self.target, "_module"):  # a wrapped model
            object.__setattr__(self, "target", ModelIdentity.of(self.target))
        if not (self.target is None or hasattr(self.target, "to_dict")):
            raise ValueError(f"target must be a wrapped model or its ModelIdentity, got {self.target!r:.60}.")
        if self.prompts is not None:
            rows = {v.rows for v in vectors} - {None, len(self.prompts.lengths)}
            if rows:
                raise ValueError(
                    f"The plan has vectors for {rows.pop()} rows, but {len(self.prompts.lengths)} prompts."
                )
        object.__setattr__(self, "vectors", tuple(sorted(vectors, key=lambda v: v.layer)))
        object.__setattr__(self, "info", dict(self.info))

    # -- algebra ---------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The steered layers, ascending, each once."""
        return tuple(sorted({v.layer for v in self.vectors}))

    def __add__(self, other: SteeringPlan) -> SteeringPlan:
        """Both plans' vectors in one plan (what a trace needs: two plans applied one after the other are out of order).

        Raises:
            ValueError: they are for different models or prompts.
        """
        if self.target and other.target:
            self.target.check(other.target, "Two plans cannot be added")
        if self.prompts and other.prompts and self.prompts != other.prompts:
            raise ValueError("Two plans cannot be added: they were made for different prompts.")
        return SteeringPlan(
            (*self.vectors, *other.vectors),
            self.target or other.target,
            {"sum_of": [self.info, other.info]},
            self.prompts or other.prompts,
        )

    def __mul__(self, factor: float | int) -> SteeringPlan:
        return self._changed([replace(v, strength=v.strength * factor) for v in self.vectors], measured=("receipt",))

    __rmul__ = __mul__

    def __neg__(self) -> SteeringPlan:
        return self * -1.0

    def _changed(
        self, vectors: Sequence[SteeringVector], measured: tuple[str, ...] = ("receipt", "calibration")
    ) -> SteeringPlan:
        # without what was measured for the plan as it was; a calibration holds for any strength
        info = {k: v for k, v in self.info.items() if k not in measured}
        return SteeringPlan(vectors, self.target, info, self.prompts)

    @property
    def n_rows(self) -> int | None:
        """How many rows a batch must have, or None where every row gets the same."""
        known = [] if self.prompts is None else [len(self.prompts.lengths)]
        return next(iter([*known, *(v.rows for v in self.vectors if v.rows is not None)]), None)

    def take(self, rows: Sequence[int]) -> SteeringPlan:
        """The plan of some rows, such as those of one invoke; what has no rows stays as it is.

        Raises:
            IndexError: a row that it does not have.
        """
        prompts = None if self.prompts is None else self.prompts.take(rows)
        return SteeringPlan([v.take(rows) for v in self.vectors], self.target, self.info, prompts)

    @property
    def header(self) -> PlanHeader:
        """All but the directions: what a plan prints, and the header of its file."""
        vectors = tuple(v.header for v in self.vectors)
        prompts = None if self.prompts is None else asdict(self.prompts)
        return PlanHeader(self.target.to_dict() if self.target else None, vectors, self.info, prompts)

    @property
    def dose(self) -> float | None:
        """Strength in units of the calibrated one (`calibrate`); None where the plan is not calibrated."""
        return self.header.dose

    def at_dose(self, dose: float | int) -> SteeringPlan:
        """A calibrated plan at `dose` times the strength that met its budget, whatever its own strength is now.

        Raises:
            ValueError: the plan is not calibrated.
        """
        unit_strengths = self.info.get("calibration", {}).get("strengths")
        if not unit_strengths:
            raise ValueError(
                f"Dose {dose:g} was asked for, but the plan is not calibrated: calibrate it, or name no dose."
            )
        scaled = [replace(v, strength=s * dose) for v, s in zip(self.vectors, unit_strengths, strict=True)]
        return self._changed(scaled, measured=("receipt",))

    def with_(self, **changes: Any) -> SteeringPlan:
        """The same plan with fields of every vector changed: `plan.with_(strength=0.3, where="completion")`.

        A strength is that of each vector; `steering.plan.with_total` sets the total.

        Raises:
            ValueError: a layer or residual norm for a plan of several layers.
        """
        if len(self.layers) > 1 and {"layer", "residual_norm"} & set(changes):
            raise ValueError(
                f"The plan steers layers {list(self.layers)}: a layer or residual_norm is one vector's, so build it anew."
            )
        return self._changed([replace(v, **changes) for v in self.vectors])

    def with_directions(self, directions: Sequence[Tensor]) -> SteeringPlan:
        """The same plan with other directions, `[hidden]` or `[row, hidden]`, one a vector in the order of `vectors`.

        Raises:
            ValueError: not as many directions as vectors, or one that is zero, NaN or infinite.
        """
        pairs = zip(self.vectors, directions, strict=True)
        made = self._changed([replace(v, direction=d) for v, d in pairs])
        return SteeringPlan(made.vectors, self.target, {"directions": "replaced"}, self.prompts)

    # -- use -------------------------------------------------------------------------------------------------------

    def check(self, model: Any, any_id: bool = False) -> Residual:
        """The model's residual stream, if the plan fits the model.

        Raises:
            ValueError: the width, the depth or the id differs (`any_id=True` overrides the id alone).
        """
        residual = Residual(model)
        width = self.vectors[0].direction.shape[-1]
        if residual.hidden_size is not None and residual.hidden_size != width:
            raise ValueError(
                f"The plan's vectors have width {width}, but the model's residual stream has {residual.hidden_size}."
            )
        if self.layers[-1] >= residual.n_layers:
            raise ValueError(
                f"The plan steers layer {self.layers[-1]}, but the model has layers 0 to {residual.n_layers - 1}."
            )
        if self.target is not None:
            self.target.check(ModelIdentity.of(model), "This plan cannot steer the model", any_id)
        return residual

    def apply(
        self, model: Any, positions: Positions | None = None, prompt_lengths: Any = None, any_id: bool = False
    ) -> None:
        """Steers inside the current trace, in the current forward pass.

        In `generate`, put it at the top of `for _ in tracer.iter[:]:`; outside such a loop nnsight runs a block on the
        prompt's forward only. Call it before reading any later layer.

        Args:
            model: the traced model.
            positions: `Positions.read(model)`, where the block has read layers before this call.
            prompt_lengths: one a row, in real tokens: where the completion starts in a teacher-forced trace.
            any_id: steer a model of another id (width and depth must fit).

        Raises:
            RuntimeError: outside a trace; or the model has already run past a layer of the plan in this step.
            ValueError: the plan does not fit the model or the batch; rows or positions that cannot be told apart.
        """
        what = "plan.apply(model)"
        begun = positions is not None
        step = current_step(model, what) if positions is None else positions.step
        residual = self.check(model, any_id)
        prefix = prefix_of(model)
        for vector in self.vectors:
            late = (
                f"The plan steers layer {vector.layer}, which the model has already run past in step {step}: apply the "
                f"plan before reading later layers, and merge plans with + instead of applying one after another."
            )
            if positions is None and self.needs_positions(prefix):
                with in_step(step, begun, late):
                    positions, begun = Positions.read(model, prefix), True
            if passed(residual.layers[vector.layer], "output", step, what):
                raise RuntimeError(late)
            with in_step(step, begun, late):
                pin(step, what)
                h, begun = residual.read(vector.layer), True
                _check_rows(vector, h, what)
                residual.write(vector.layer, self.steered(vector, h, positions, prompt_lengths))

    def needs_positions(self, prefix: tuple[int, ...]) -> bool:
        """Whether `Positions` must be read in every step, for a tokenizer that prepends the ids `prefix`."""
        return self.prompts is not None or any(needs_positions(v, prefix) for v in self.vectors)

    def steered(
        self, vector: SteeringVector, h: Tensor, positions: Positions | None = None, prompt_lengths: Any = None
    ) -> Tensor:
        """The output `h` `[row, position, hidden]` of a layer after one of the plan's vectors.

        Args:
            vector: one of `vectors`.
            h: output of its layer.
            positions: of this forward; None where no vector tells positions apart.
            prompt_lengths: as in `apply`; those of the plan's own prompts if None.

        Raises:
            ValueError: the batch has other rows or prompts than the plan.
        """
        if positions is None:
            return vector.edit(h)
        if self.prompts is not None:
            self.prompts.check(positions)
            prompt_lengths = self.prompts.lengths if prompt_lengths is None else prompt_lengths
        return vector.edit_at(h, positions, prompt_lengths)

    def attach(self, model: Any, any_id: bool = False) -> Any:
        """A copy of `model` (sharing its weights) whose every trace and generation is steered, on every decode step.

        The copy composes with any other nnsight code. Per-row strengths index the rows of the whole batch.

        Raises:
            ValueError: the plan does not fit the model.
        """
        self.check(model, any_id)
        plan = SteeringPlan(self.vectors, self.target, {}, self.prompts)  # what is known of its making need not travel
        with model.edit() as (_tracer, edited):
            _every_step(plan, edited, any_id)
        if getattr(model, "dispatched", True) is False:
            edited.dispatch = _LoadOnce(model, edited)
        return edited

    def to_transformer_lens(self, bridge: Any, any_id: bool = False) -> list[Any]:
        """The plan as TransformerLens hooks: `with bridge.hooks(fwd_hooks=plan.to_transformer_lens(bridge)):`.

        For what is no trace of nnsight's, such as the bridge's own `generate` and `run_with_hooks`; see
        `interop.transformer_lens.hooks`.

        Raises:
            ValueError: the plan does not fit the model.
        """
        from ..interop.transformer_lens import hooks

        return hooks(self, bridge, any_id)

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Writes one `.safetensors` file: the tensors, and a JSON header with everything else."""
        from .plan_file import write_plan  # not at the top: safetensors must not travel with a plan

        # vectors may share memory, which the format refuses
        tensors = {
            f"{i}.{name}": value.clone()
            for i, v in enumerate(self.vectors)
            for name in ("direction", "strength", "predictor")
            if isinstance(value := getattr(v, name), Tensor)
        }
        return write_plan(path, self.header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> SteeringPlan:
        """Reads what `save` wrote; never unpickles.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no plan, or of a newer format.
        """
        from .plan_file import read_plan

        header, tensors = read_plan(path)
        vectors = tuple(
            SteeringVector(
                layer=v.layer,
                direction=tensors[f"{i}.direction"],
                strength=tensors[f"{i}.strength"] if isinstance(v.strength, tuple) else v.strength,
                residual_norm=v.residual_norm,
                op=v.op,
                where=v.where,
                from_step=v.from_step,
                skip_special=v.skip_special,
                at=v.at,
                predictor=tensors.get(f"{i}.predictor"),
            )
            for i, v in enumerate(header.vectors)
        )
        prompts = None if header.prompts is None else Prompts(**{k: tuple(x) for k, x in header.prompts.items()})
        return cls(vectors, ModelIdentity(**header.target) if header.target else None, header.info, prompts)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the plan, with a card made of its header and receipt, to the Hugging Face hub; see `interop.hub.push`."""
        from ..interop.hub import push

        return push(self, repo_id, **options)

    @classmethod
    def from_hub(cls, repo_id: str, revision: str | None = None, **options: Any) -> SteeringPlan:
        """Reads a plan from the Hugging Face hub; see `interop.hub.pull`.

        Raises:
            ValueError: the repository has no plan.
        """
        from ..interop.hub import pull

        return pull(repo_id, revision, **options)

    def __repr__(self) -> str:
        return str(self.header)


def total_strength(plan: SteeringPlan) -> float:
    """Root of the summed squares of a plan's strengths: k layers of s / sqrt(k) count as s.

    Raises:
        ValueError: strengths or vectors a row.
    """
    return plan.header.total_strength


def with_total(plan: SteeringPlan, strength: float | int) -> SteeringPlan:
    """The plan scaled to a total strength.

    Raises:
        ValueError: its own strength is zero, which no factor changes, or it has one for each row.
    """
    if total_strength(plan) == 0:
        raise ValueError("The plan's strength is zero, so it cannot be scaled: give it any other.")
    return plan * (strength / total_strength(plan))


def stack_plans(plans: Sequence[SteeringPlan], unsteered: bool = False) -> SteeringPlan:
    """One plan with a row for each of `plans`, and an unsteered one before them if asked.

    Raises:
        ValueError: they differ in layer, op or place, or are themselves for several rows or for certain prompts.
    """
    if len({tuple(v.kind for v in plan.vectors) for plan in plans}) > 1 or any(plan.prompts for plan in plans):
        raise ValueError("Plans share a forward only with the same layers, ops and places, and none per row.")
    return SteeringPlan(
        [stack(mine, unsteered) for mine in zip(*(plan.vectors for plan in plans), strict=True)], plans[0].target
    )


def random_plans(plan: SteeringPlan, draws: int, random_state: int = 0) -> list[SteeringPlan]:
    """`plan` with its directions replaced by random ones (uniform on the sphere), `draws` times.

    Activations (`blend`, `innovation`) are replaced by random ones of the same length.
    """
    generator = torch.Generator().manual_seed(random_state)

    def drawn(v: SteeringVector) -> Tensor:
        new = torch.randn(v.direction.shape, generator=generator)
        return new / new.norm(dim=-1, keepdim=True) * v.direction.norm(dim=-1, keepdim=True)

    return [plan.with_directions([drawn(v) for v in plan.vectors]) for _ in range(draws)]


def _check_rows(vector: SteeringVector, h: Tensor, what: str) -> None:
    own, whole = invoke_rows(what), batch_rows(what)
    expected = own if own is not None else whole
    if expected is not None and len(h) != expected and (own is not None or vector.rows is not None):
        raise ValueError(
            f"This block owns {expected} rows, but the layer has {len(h)}: beams, num_return_sequences or repeated rows mix "
            f"the rows of a batch, so they cannot be steered apart. Use one invoke and one strength, or plan.attach(model)."
        )


class _LoadOnce:
    """The `dispatch` of an edited copy of a model whose weights are not loaded yet: it loads the model, and shares its weights.

    On a server, where the weights are, nothing of it arrives.
    """

    def __init__(self, model: Any, edited: Any) -> None:
        self.model, self.edited = model, edited

    def __call__(self) -> None:
        self.model.dispatch()
        own = ("_edits", "dispatch")
        self.edited.__dict__.update({k: v for k, v in self.model.__dict__.items() if k not in own})
        self.edited.__dict__.pop("dispatch", None)

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()


def _every_step(plan: SteeringPlan, model: Any, any_id: bool) -> None:
    for _ in every_step():
        plan.apply(model, any_id=any_id)
