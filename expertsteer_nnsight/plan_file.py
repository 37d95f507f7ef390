"""Plans as `.safetensors` files: tensors, and one JSON header. Loading never unpickles."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .identity import ModelIdentity

if TYPE_CHECKING:
    from .steering import SteeringPlan

FORMAT = "expertsteer_nnsight.plan"
VERSION = 1
_PLAIN = ("layer", "residual_norm", "op", "where", "from_step", "skip_special")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    found = {}
    for name in ("expertsteer_nnsight", "nnsight", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save_plan(plan: SteeringPlan, path: str | Path) -> Path:
    """Writes `plan`; the file appears whole or not at all."""
    tensors, vectors = {}, []
    for i, v in enumerate(plan.vectors):
        tensors[f"{i}.direction"] = v.direction.clone()  # vectors may share memory, which the format refuses
        if isinstance(v.strength, torch.Tensor):
            tensors[f"{i}.strength"] = v.strength.clone()
        vectors.append(
            {k: getattr(v, k) for k in _PLAIN} | ({} if f"{i}.strength" in tensors else {"strength": v.strength})
        )
    header = {
        "format_version": VERSION,
        "target": plan.target.to_dict() if plan.target else None,
        "vectors": vectors,
        "info": {"versions": library_versions(), **plan.info},
    }
    about = {"format": FORMAT, "plan": json.dumps(header)}
    return whole_file(path, lambda to: save_file(tensors, to, metadata=about))


def whole_file(path: str | Path, write: Callable[[Path], object]) -> Path:
    """What `write` puts in a file; it appears whole or not at all."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask says; safetensors writes files that nobody else may read
    write(temporary)
    temporary.chmod(mode)
    os.replace(temporary, path)
    return path


def load_plan(path: str | Path) -> SteeringPlan:
    """Reads what `save_plan` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no plan, or of a newer format.
    """
    from .steering import SteeringPlan
    from .vectors import SteeringVector

    if not Path(path).exists():
        raise FileNotFoundError(f"No plan at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or a damaged one ({error}).") from None
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no steering plan (its header says format={meta.get('format')!r}, not {FORMAT!r})."
        )
    header = json.loads(meta["plan"])
    if header["format_version"] > VERSION:
        raise ValueError(
            f"{path} has plan format {header['format_version']}, newer than {VERSION}: upgrade expertsteer_nnsight."
        )
    vectors = tuple(
        SteeringVector(
            direction=tensors[f"{i}.direction"],
            strength=tensors.get(f"{i}.strength", v.get("strength")),
            **{k: v[k] for k in _PLAIN},
        )
        for i, v in enumerate(header["vectors"])
    )
    return SteeringPlan(vectors, ModelIdentity(**header["target"]) if header["target"] else None, header["info"])
