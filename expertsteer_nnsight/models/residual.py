"""Where a wrapped model keeps its residual stream: finds the decoder layers, reads and writes what they put out.

Layer `L` is the output of decoder block `L`, counted from 0. The embedding is not a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Classes whose layers the search by structure would miss or mistake: class name -> attribute path.
EXCEPTIONS = {"TransformerBridge": "blocks", "HookedTransformer": "blocks"}
_OTHER_TOWERS = ("vision", "visual", "audio", "image", "encoder", "expert", "mtp")


def config_of(model: Any) -> Any:
    """The text configuration of a wrapped model (transformers' `config`, or TransformerLens' `cfg`), or None."""
    module = model._module if hasattr(model, "_module") else model
    config: Any = getattr(module, "config", None) or getattr(module, "cfg", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _field(config: Any, *names: str) -> Any:
    return next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)


def layers_path(module: nn.Module, depth: int | None = None) -> str:
    """The attribute path of the decoder layers inside a torch module, such as `model.layers` or `transformer.h`.

    The layers are the outermost `nn.ModuleList` whose elements have children and are of one class (or, if there is none,
    of several classes, and as many as the configuration says); where several fit, the one as long as the configuration's
    number of layers.

    Raises:
        ValueError: none or several fit.
    """
    if type(module).__name__ in EXCEPTIONS:
        return EXCEPTIONS[type(module).__name__]
    lists = {n: m for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    outermost = {
        name: blocks
        for name, blocks in lists.items()
        if not any(name.startswith(outer + ".") for outer in lists) and any(True for _ in blocks[0].children())
    }
    # hybrids mix kinds of block in one list: those count only where no list of equal blocks does
    found = {n: b for n, b in outermost.items() if len({type(x) for x in b}) == 1} or {
        n: b for n, b in outermost.items() if len(b) == depth
    }
    if depth is not None and any(len(b) == depth for b in found.values()):
        found = {n: b for n, b in found.items() if len(b) == depth}
    if len(found) > 1:
        text = {n: b for n, b in found.items() if not any(t in n.lower() for t in _OTHER_TOWERS)}
        found = text or found
    if len(found) != 1:
        seen = (
            ", ".join(f"{n} ({len(b)} x {type(b[0]).__name__})" for n, b in lists.items()) or "no nn.ModuleList at all"
        )
        raise ValueError(
            f"Looked in {type(module).__name__} for one outermost nn.ModuleList of equal blocks"
            f"{'' if depth is None else f' ({depth} of them)'}, the decoder layers, and found {len(found)} (seen: {seen}). "
            f'Pass the path yourself, as in Residual(model, path="model.layers").'
        )
    return next(iter(found))


class Residual:
    """The residual stream of a model that nnsight wraps.

    Args:
        model: a `TransformersModel`, an `NNsight(...)` of any causal LM, or `NNsight(TransformerBridge)`.
        path: where the decoder layers are, if the search by structure cannot tell (`"model.layers"`). Told once, it is
            remembered for this model by everything in the package.

    Attributes:
        path: attribute path of the decoder layers.
        n_layers: how many there are.
        hidden_size: width of the residual stream, or None if the configuration does not say.

    Raises:
        TypeError: the model is not wrapped by nnsight.
        ValueError: no list of decoder layers is found, or several are; or `path` leads to none.
    """

    def __init__(self, model: Any, path: str | None = None) -> None:
        if not hasattr(model, "_module"):
            raise TypeError(
                f"Asked for the residual stream of a {type(model).__name__}: wrap the model first, "
                f"as in nnsight.NNsight(model) or TransformersModel(id, task='text-generation')."
            )
        # The search walks the whole module tree, and a plan asks on every decode step. Kept on the wrapper: it travels with
        # a remote request, and leaves nothing on a server's model.
        known: dict[Any, Any] = model.__dict__.setdefault("_expertsteer_residual", {})
        if path not in known:
            config = config_of(model)
            found = path or layers_path(model._module, _field(config, "num_hidden_layers", "n_layers", "n_layer"))
            known[path] = (found, _field(config, "hidden_size", "d_model", "n_embd"))
        self.path, self.hidden_size = known[path]
        self.layers = model
        for name in self.path.split("."):
            try:
                self.layers = getattr(self.layers, name)
            except AttributeError:
                raise ValueError(f"{type(model._module).__name__} has no {name!r} on the path {self.path!r}.") from None
        blocks: Any = getattr(self.layers, "_module", None)
        if not hasattr(blocks, "__len__"):
            raise ValueError(
                f"{self.path!r} of {type(model._module).__name__} is a {type(blocks).__name__}, not a list of decoder layers."
            )
        self.n_layers = len(blocks)
        if path is not None:
            known[None] = known[path]  # a path that was told once holds for collect, plans and all else

    def index(self, layer: int) -> int:
        """`layer` counted from 0; negative ones count from the end.

        Raises:
            IndexError: the model has no such layer.
        """
        if not -self.n_layers <= layer < self.n_layers:
            raise IndexError(
                f"Layer {layer} was asked for, but the model has {self.n_layers} layers (0 to {self.n_layers - 1})."
            )
        return int(layer) % self.n_layers

    def read(self, layer: int) -> Tensor:
        """Inside a trace: the output of `layer`, `[row, position, hidden]`."""
        return hidden(self.layers[layer].output)

    def write(self, layer: int, value: Tensor) -> None:
        """Inside a trace: replaces the output of `layer` by `value`, `[row, position, hidden]`, in its own container."""
        output = self.layers[layer].output
        self.layers[layer].output = value if isinstance(output, Tensor) else (value, *output[1:])


def hidden(output: Any) -> Tensor:
    """The residual stream `[row, position, hidden]` in a decoder layer's output, a tensor or a tuple that starts with it.

    Raises:
        TypeError: neither of the two.
    """
    value = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(value, torch.Tensor) or value.ndim != 3:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"A decoder layer should put out [row, position, hidden], but this one gave {shape}.")
    return value
