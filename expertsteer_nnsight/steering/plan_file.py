"""Plans as `.safetensors` files: tensors, and one JSON header. Loading never unpickles.

Here a plan is its header and its tensors, by the names that they have in the file: `SteeringPlan.save` and `load` put it
together, and whoever wants the header alone needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..files import library_versions, whole_file
from .header import BLENDS, PlanHeader, VectorHeader

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "expertsteer_nnsight.plan"
VERSION = 2  # 2: activations, places and prompts; what needs none of these is written as 1
NEWER_PLACES = ("last_prompt", "given")
_PLAIN = ("layer", "residual_norm", "op", "where", "from_step", "skip_special")


def write_plan(path: str | Path, header: PlanHeader, tensors: Mapping[str, Tensor]) -> Path:
    """Writes a plan; the file appears whole or not at all.

    Args:
        path: of the file.
        header: of the plan.
        tensors: `i.direction` (`[hidden]`, `[row, hidden]` or `[place, hidden]`) of vector `i`, and `i.strength` (`[row]`) and
            `i.predictor` (`[hidden + 1, hidden]`) where it has them.
    """
    from safetensors.torch import save_file

    vectors = [
        {k: getattr(v, k) for k in _PLAIN}
        | ({} if isinstance(v.strength, tuple) else {"strength": v.strength})
        | ({} if v.at is None else {"at": v.at})
        for v in header.vectors
    ]
    newer = header.prompts is not None or any(v.op in BLENDS or v.where in NEWER_PLACES for v in header.vectors)
    plan = {
        "format_version": VERSION if newer else 1,
        "target": header.target,
        "vectors": vectors,
        "info": {"versions": library_versions(), **header.info},
    }
    if header.prompts is not None:
        plan["prompts"] = header.prompts
    about = {"format": FORMAT, "plan": json.dumps(plan)}
    return whole_file(path, lambda to: save_file(dict(tensors), to, metadata=about))


def read_plan(path: str | Path) -> tuple[PlanHeader, dict[str, Tensor]]:
    """Header and tensors of what `write_plan` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no plan, or of a newer format.
    """
    return _read(path, "pt", lambda name: True)


def read_header(path: str | Path) -> PlanHeader:
    """The header of what `write_plan` wrote; needs no torch.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no plan, or of a newer format.
    """
    return _read(path, "numpy", lambda name: name.endswith(".strength"))[0]


def _read(path: str | Path, framework: str, wanted: Any) -> tuple[PlanHeader, dict[str, Any]]:
    """The header, and those tensors whose name is `wanted`."""
    if not Path(path).exists():
        raise FileNotFoundError(f"No plan at {path}.")
    try:
        with safe_open(path, framework=framework) as file:
            meta = file.metadata() or {}
            shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            tensors = {k: file.get_tensor(k) for k in shapes if wanted(k)}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or a damaged one ({error}).") from None
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no steering plan (its header says format={meta.get('format')!r}, not {FORMAT!r})."
        )
    plan = json.loads(meta["plan"])
    if plan["format_version"] > VERSION:
        raise ValueError(
            f"{path} has plan format {plan['format_version']}, newer than {VERSION}: upgrade expertsteer_nnsight."
        )
    vectors = []
    for i, v in enumerate(plan["vectors"]):
        by_row = tensors.get(f"{i}.strength")
        shape = shapes[f"{i}.direction"]
        at = None if v.get("at") is None else _integers(v["at"], f"The places of vector {i} in {path}")
        by_direction = len(at) if at is not None else shape[0] if len(shape) == 2 else None
        vectors.append(
            VectorHeader(
                **{k: v[k] for k in _PLAIN},
                strength=v["strength"] if by_row is None else tuple(by_row.tolist()),
                rows=by_direction if by_direction is not None or by_row is None else len(by_row),
                at=at,
            )
        )
    prompts = plan.get("prompts")
    if prompts is not None:
        wrong = not isinstance(prompts, dict) or set(prompts) != {"lengths", "checksums"}
        _integers(None if wrong else [*prompts.values()], f"The prompts of {path}")
    return PlanHeader(plan["target"], tuple(vectors), plan["info"], prompts), tensors


def _integers(rows: Any, what: str) -> tuple[tuple[int, ...], ...]:
    """Lists of integers as tuples.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(rows, list) or not all(isinstance(r, list) and all(type(x) is int for x in r) for r in rows):
        raise ValueError(f"{what} are damaged: they must be lists of whole numbers.")
    return tuple(map(tuple, rows))
