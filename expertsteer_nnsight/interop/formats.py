"""Steering vectors in files of other tools: GGUF control vectors, lm-eval's `steered` model, plain safetensors.

These formats know of a vector that is added to a layer's output at every position, and of little else: a plan that does
more is refused rather than changed silently. None of them knows of special tokens, so a plan that leaves a prepended
`<bos>` as it is (`skip_special`, the default) steers it too once it is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..files import whole_file
from ..models.identity import ModelIdentity
from ..models.residual import Residual
from ..steering.plan import SteeringPlan
from ..steering.vectors import SteeringVector


def added(plan: SteeringPlan) -> dict[int, Float[Tensor, " hidden"]]:
    """What a plan adds to the output of each layer, `[hidden]`, in the stream's own units.

    Raises:
        ValueError: the plan does anything else: another operation, positions, strengths by row.
    """
    found: dict[int, Tensor] = {}
    for v in plan.vectors:
        other = [f"op={v.op!r}"] if v.op != "add" else []
        other += [f"where={v.where!r}"] if v.where != "all" else []
        other += [f"vectors or strengths for {v.rows} rows"] if v.rows is not None else []
        other += ["prompts that it was made for"] if plan.prompts is not None else []
        if other:
            raise ValueError(
                f"Only a vector that is added at every position can be exported, but layer {v.layer} has {', '.join(other)}: "
                'change it (plan.with_(op="add", where="all")), or save the plan itself (plan.save).'
            )
        found[v.layer] = found.get(v.layer, 0) + v.direction * v.length
    return found


def plan_from(
    vectors: Mapping[int, Tensor],
    model: Any = None,
    *,
    strength: float = 1.0,
    residual_norms: Mapping[int, float] | None = None,
    info: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SteeringPlan:
    """A plan of vectors from elsewhere.

    Args:
        vectors: `[hidden]` by decoder layer, counted from 0, whose output they are added to.
        model: the wrapped model that they are for, whose identity the plan keeps.
        strength: times each vector as it is; with `residual_norms`, in residual norms, and the vectors give directions alone.
        residual_norms: median norm of the residual stream, by layer.
        info: what is known of their making.
        settings: further fields of every `SteeringVector`: `op`, `where`, `from_step`, `skip_special`.

    Raises:
        ValueError: no vectors, or some that are not `[hidden]`, or zero, NaN or infinite.
    """
    made = []
    for layer, v in vectors.items():
        if v.ndim != 1:
            raise ValueError(f"The vector of layer {layer} has shape {tuple(v.shape)}, and one of [hidden] is needed.")
        norm = None if residual_norms is None else residual_norms[layer]
        made.append(
            SteeringVector(layer, v, strength if norm else strength * float(v.double().norm()), norm, **settings)
        )
    plan = SteeringPlan(made, None if model is None else ModelIdentity.of(model), info or {})
    if model is not None:
        plan.check(model)
    return plan


def to_gguf(plan: SteeringPlan, path: str | Path, model_hint: str | None = None) -> Path:
    """A control vector that llama.cpp (`--control-vector`) and repeng read: `direction.L`, added to the output of block L.

    Args:
        plan: the plan.
        path: of the file.
        model_hint: llama.cpp's name of the architecture (default: the model type in the plan's target).

    Raises:
        ValueError: the plan does more than add vectors; or it steers layer 0, which llama.cpp leaves out.
        ImportError: gguf is not installed.
    """
    gguf = _gguf()
    vectors = added(plan)
    if 0 in vectors:
        raise ValueError("The plan steers layer 0, and llama.cpp applies control vectors from layer 1 on.")
    hint = model_hint or (plan.target.kind if plan.target else None) or "unknown"
    depth = plan.target.n_layers if plan.target else max(vectors) + 1

    def write(to: Path) -> None:
        writer = gguf.GGUFWriter(str(to), "controlvector")
        writer.add_string("controlvector.model_hint", hint)
        writer.add_uint32("controlvector.layer_count", depth)
        for layer, v in vectors.items():
            writer.add_tensor(f"direction.{layer}", v.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return whole_file(path, write)


def from_gguf(path: str | Path, model: Any = None, strength: float = 1.0, **settings: Any) -> SteeringPlan:
    """A plan of a control vector in GGUF, such as repeng's `export_gguf` writes.

    Args:
        path: of the file.
        model: the wrapped model that it is for.
        strength: times the vectors as they are.
        settings: further fields of every `SteeringVector`.

    Raises:
        ValueError: the file is no control vector.
        ImportError: gguf is not installed.
    """
    gguf = _gguf()
    reader = gguf.GGUFReader(str(path))

    def text(key: str) -> str | None:
        field = reader.get_field(key)
        return None if field is None else str(field.contents())

    if text("general.architecture") != "controlvector":
        raise ValueError(f"{path} holds no control vector, but {text('general.architecture')!r}.")
    vectors = {}
    for tensor in reader.tensors:
        kind, _, layer = str(tensor.name).partition(".")
        if kind == "direction" and layer.isdigit():
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)  # as it is, of one that is not quantised
            vectors[int(layer)] = torch.tensor(values, dtype=torch.float32)
    info = {"imported": "gguf", "model_hint": text("controlvector.model_hint")}
    return plan_from(vectors, model, strength=strength, info=info, **settings)


def to_lm_eval(plan: SteeringPlan, path: str | Path, model: Any) -> Path:
    """A file for lm-eval's own `steered` model (`--model steered --model_args pretrained=...,steer_path=FILE.pt`).

    lm-eval reads it with pickle. `interop.lm_eval` runs a plan itself, with everything that a plan can say.

    Args:
        plan: adds vectors at every position, or has one `clamp` a layer.
        path: of the file, which must end in `.pt`.
        model: the wrapped model (its weights are not needed), for the names of its layers.

    Raises:
        ValueError: the plan does more than that, does not fit the model, or the file has another ending.
    """
    if Path(path).suffix != ".pt":
        raise ValueError(f"lm-eval tells the format by the ending .pt, and the file is to be {Path(path).name!r}.")
    plan.check(model)
    free = [] if plan.prompts is not None else plan.vectors
    clamps = [v for v in free if v.op == "clamp" and v.where == "all" and v.rows is None]
    rest = [v for v in plan.vectors if v not in clamps]
    steps: dict[int, tuple[str, Tensor, float]] = {v.layer: ("clamp", v.direction, float(v.length)) for v in clamps}
    sums = added(SteeringPlan(rest, prompts=plan.prompts)) if rest else {}
    if len(steps) < len(clamps) or set(steps) & set(sums):
        raise ValueError(
            "lm-eval's steered model does one thing at a layer, and the plan has a clamp and another vector at one."
        )
    steps |= {layer: ("add", v, 1.0) for layer, v in sums.items()}
    start, prefix = Residual(model).path, getattr(model._module, "base_model_prefix", "") + "."
    names = start.removeprefix(prefix)
    made = {
        f"{names}.{layer}": {
            "action": action, "steering_vector": v.clone(), "steering_coefficient": size, "bias": None, "head_index": None,
        }
        for layer, (action, v, size) in sorted(steps.items())
    }  # fmt: skip
    return whole_file(path, lambda to: torch.save(made, to))


def to_safetensors(plan: SteeringPlan, path: str | Path, model: Any = None) -> Path:
    """The vectors alone, `layer.L` `[hidden]`, for any tool: what is to be added to the output of decoder layer L.

    They are in the stream's own units: direction x strength x residual norm.

    Args:
        plan: the plan.
        path: of the file.
        model: not used; it is there for the other formats' sake (`EXPORTS`).

    Raises:
        ValueError: the plan does more than add vectors at every position.
    """
    from safetensors.torch import save_file

    tensors = {f"layer.{layer}": v.contiguous() for layer, v in added(plan).items()}
    about = {"format": "pt"} | ({"model": str(plan.target)} if plan.target else {})
    return whole_file(path, lambda to: save_file(tensors, to, metadata=about))


def from_safetensors(path: str | Path, model: Any = None, strength: float = 1.0, **settings: Any) -> SteeringPlan:
    """A plan of vectors whose names end in the number of their layer, such as `layer.14` or `14`.

    Args:
        path: of the file; each vector is `[hidden]`.
        model: the wrapped model that it is for.
        strength: times the vectors as they are.
        settings: further fields of every `SteeringVector`.

    Raises:
        ValueError: a name without a number at its end, or two of one layer.
    """
    from safetensors.torch import load_file

    vectors: dict[int, Tensor] = {}
    for name, v in load_file(path).items():
        layer = name.rsplit(".", 1)[-1]
        if not layer.isdigit() or int(layer) in vectors:
            raise ValueError(
                f"The vector {name!r} in {path} does not tell its layer: names end in one number each, as layer.14 does."
            )
        vectors[int(layer)] = v
    return plan_from(vectors, model, strength=strength, info={"imported": "safetensors"}, **settings)


def from_steering_vectors(vector: Any, model: Any = None, strength: float = 1.0, **settings: Any) -> SteeringPlan:
    """A plan of a `SteeringVector` of the package steering-vectors, or of a file that `torch.save` made of one.

    A file is read without running what it holds, which takes that package to be installed.

    Args:
        vector: the object, its `layer_activations` (`[hidden]` by layer), or a path.
        model: the wrapped model that it is for.
        strength: times the vectors as they are.
        settings: further fields of every `SteeringVector`.

    Raises:
        ValueError: it was read elsewhere than after the decoder layers.
        ImportError: a file of the object, and steering-vectors is not installed.
    """
    if isinstance(vector, (str, Path)):
        if not Path(vector).exists():
            raise FileNotFoundError(f"No file at {vector}.")
        try:
            vector = torch.load(vector, weights_only=True)
        except Exception:
            try:
                import steering_vectors  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise ImportError(
                    f"{vector} holds an object of the package steering-vectors: pip install steering-vectors, or save its "
                    "layer_activations alone (torch.save(vector.layer_activations, path))."
                ) from None
            with torch.serialization.safe_globals([steering_vectors.SteeringVector]):
                vector = torch.load(vector, weights_only=True)
    kind = getattr(vector, "layer_type", "decoder_block")
    if kind != "decoder_block":
        raise ValueError(
            f"The vector was read at {kind!r}, and plans steer what decoder layers put out (decoder_block)."
        )
    vectors = getattr(vector, "layer_activations", vector)
    return plan_from(vectors, model, strength=strength, info={"imported": "steering-vectors"}, **settings)


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ImportError("GGUF files need the library gguf: pip install gguf.") from None
    return gguf


# by the name that the command line knows: (plan, path, model) -> path
EXPORTS: dict[str, Callable[..., Path]] = {
    "gguf": lambda plan, path, model: to_gguf(plan, path),
    "lm-eval": to_lm_eval,
    "safetensors": to_safetensors,
}
