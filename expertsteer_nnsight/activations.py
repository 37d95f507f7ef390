"""collect(): texts -> residual-stream states of chosen layers, in memory or in resumable shards on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nnsight
import torch
from einops import einsum
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .identity import ModelIdentity, fingerprint
from .positions import affixes
from .residual import Residual, hidden
from .texts import Position, as_texts, encode, texts_hash, token_index

_MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class Activations(Mapping):
    """States of some layers for some texts: `activations[layer]` is `[text, hidden]`, in the order of the texts.

    Attributes:
        model: whose states these are.
        layers: the layers that were collected, ascending.
        n_texts: number of texts.
        position: the position rule, as it was asked for.
        shards: folder of the shards that back it, or None if all is in memory.
    """

    model: ModelIdentity
    layers: tuple[int, ...]
    n_texts: int
    position: str
    shards: Path | None = None
    _memory: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def n_layers(self) -> int:
        """How many decoder layers the model has."""
        return self.model.n_layers

    def _read(self, key: str) -> Tensor:
        if self.shards is None:
            return self._memory[key]
        parts, order = [], []
        for shard in sorted(self.shards.glob("shard-*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                parts.append(file.get_tensor(key))
                order.append(file.get_tensor("index"))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def __getitem__(self, layer: int) -> Float[Tensor, "text hidden"]:
        """States of one layer (negative: from the end); read from disk at each access where there are shards."""
        return self._read(f"layer.{self._known(layer)}")

    def _known(self, layer: int) -> int:
        found = layer + self.n_layers if layer < 0 else layer
        if found not in self.layers:
            raise KeyError(f"Layer {layer} was not collected; there are {list(self.layers)}.")
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping would compare tensors, which has no truth value

    def __hash__(self) -> int:
        return id(self)

    def norm(self, layer: int) -> float:
        """Median norm of the residual stream of `layer`, over texts, of each text's median over its own tokens."""
        return float(self._read(f"norm.{self._known(layer)}").median())

    def __repr__(self) -> str:
        where = "in memory" if self.shards is None else f"in {self.shards}"
        layers = f"{self.layers[0]}..{self.layers[-1]}" if len(self.layers) > 2 else ", ".join(map(str, self.layers))
        return f"Activations({self.n_texts} texts, layers {layers} of {self.model}, position {self.position}, {where})"


def collect(
    model: Any,
    texts: Any,
    layers: Iterable[int] | None = None,
    position: Position = "last",
    *,
    batch_size: int = 32,
    cache: str | Path | None = None,
    shard_size: int = 256,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Activations:
    """Residual-stream states of `texts` in `layers`, each text at one position (or the mean over its tokens).

    Texts are batched by length. A batch's forward stops after the last layer asked for, so the LM head never runs.
    What is kept is sliced inside the trace: memory grows with texts x layers x hidden, and with `cache` not at all.

    Args:
        model: any causal LM that nnsight wraps.
        texts: strings or chat messages; a list, a dataset with a column `text`, or a file.
        layers: decoder layers, counted from 0 (negative from the end); all of them if None.
        position: `"last"`, `"mean"`, an index, or a function of a text's own token ids to an index. Counted in the
            text's own tokens: never padding, nor a special token that the tokenizer prepends.
        batch_size: texts a forward.
        cache: folder for shards. What an interrupted call finished there is not run again.
        shard_size: texts a shard.
        dtype: of the stored states; the model's own if None.
        progress: show a progress bar.

    Raises:
        ValueError: no texts or layers, a position that some text does not have, or a cache that was made with another
            model, other texts or other settings.
        IndexError: a layer that the model does not have.
    """
    residual = Residual(model)
    texts = as_texts(texts)
    chosen = tuple(sorted({residual.index(i) for i in (range(residual.n_layers) if layers is None else layers)}))
    if not chosen:
        raise ValueError("No layers were asked for.")
    tokenizer = tokenizer_of(model)
    known = affixes(tokenizer)
    encoded = [encode(tokenizer, t, known) for t in texts]
    at = [token_index(position, ids, prefix) for ids, prefix in encoded]
    rule = f"function {texts_hash(map(str, at))}" if callable(position) else str(position)
    identity = ModelIdentity.of(model)
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i][0]))
    shards = [order[i : i + shard_size] for i in range(0, len(order), shard_size)] if cache is not None else [order]
    folder = None if cache is None else Path(cache)
    if folder is not None:
        if getattr(model, "_edits", None):
            raise ValueError(
                "An edited model's states cannot be kept in a cache, which could not tell the edit: omit cache=."
            )
        settings = {"model": fingerprint(model), "texts": texts_hash(texts), "tokens": texts_hash(map(str, encoded)),
                    "layers": list(chosen), "position": rule, "shard_size": shard_size, "dtype": str(dtype)}  # fmt: skip
        _open_cache(folder, settings)
    memory: dict[str, Tensor] = {}
    with tqdm(
        total=len(texts), desc=f"states of {identity.name or identity.kind}", unit="text", disable=not progress
    ) as bar:
        for number, shard in enumerate(shards):
            file = None if folder is None else folder / f"shard-{number:05d}.safetensors"
            if file is None or not file.exists():
                rows = {}
                for start in range(0, len(shard), batch_size):
                    batch = shard[start : start + batch_size]
                    for key, value in _forward(
                        model, residual, [(*encoded[i], at[i]) for i in batch], chosen, dtype
                    ).items():
                        rows.setdefault(key, []).append(value)
                    bar.update(len(batch))
                memory = {key: torch.cat(parts) for key, parts in rows.items()}
                if file is not None:
                    _write(file, {**memory, "index": torch.tensor(shard)})
            else:
                bar.update(len(shard))
    if folder is not None:
        return Activations(identity, chosen, len(texts), rule, folder)
    back = torch.tensor(order).argsort()
    return Activations(identity, chosen, len(texts), rule, None, {k: v[back] for k, v in memory.items()})


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a wrapped model.

    Raises:
        ValueError: it has none, as a bare `NNsight(module)` has not.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"The wrapped {type(model._module).__name__} has no tokenizer, which reading texts needs: "
            f'load it as TransformersModel(module, tokenizer=..., task="text-generation").'
        )
    return tokenizer


def _forward(model: Any, residual: Residual, batch: list, layers: tuple[int, ...], dtype: Any) -> dict[str, Tensor]:
    # padded on the right: no real token can see the padding, and columns are token numbers
    width = max(len(ids) for ids, _, _ in batch)
    pad = getattr(tokenizer_of(model), "pad_token_id", None) or 0
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in batch])
    own = torch.stack(
        [((torch.arange(width) >= prefix) & (torch.arange(width) < len(ids))) for ids, prefix, _ in batch]
    )
    column = torch.tensor([0 if at is None else at for _, _, at in batch])
    mean = batch[0][2] is None
    bridge = type(model._module).__name__ == "TransformerBridge"
    call = (ids,) if bridge else ()
    extra = {} if bridge else {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    blocks = [residual.layers[i] for i in layers]
    with torch.no_grad(), model.trace(*call, **extra) as tracer:
        states = nnsight.save([])
        norms = nnsight.save([])
        for block in blocks:
            state, norm = pick(hidden(block.output), own, column, mean)
            states.append(state if dtype is None else state.to(dtype))
            norms.append(norm)
        tracer.stop()
    found = {f"layer.{i}": s.cpu() for i, s in zip(layers, states, strict=True)}
    return found | {f"norm.{i}": n.cpu() for i, n in zip(layers, norms, strict=True)}


def pick(h: Tensor, own: Tensor, column: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """From one layer's `[row, position, hidden]`: the kept state `[row, hidden]`, and the median norm of each row's tokens.

    Runs inside the trace, on a server too. Sums are taken in float32 or wider.
    """
    own, column = own.to(h.device), column.to(h.device)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    norms = wide.norm(dim=-1).masked_fill(~own, float("nan")).nanmedian(dim=1).values
    if mean:
        weight = own.to(wide.dtype) / own.sum(1, keepdim=True)
        return einsum(wide, weight, "row position hidden, row position -> row hidden").to(h.dtype), norms
    # a copy: a view would keep the whole layer alive
    return h[torch.arange(len(h), device=h.device), column].clone(), norms


def _open_cache(folder: Path, settings: dict[str, Any]) -> None:
    manifest = folder / _MANIFEST
    folder.mkdir(parents=True, exist_ok=True)
    if manifest.exists():
        stored = json.loads(manifest.read_text())
        differ = [k for k in settings if stored.get(k) != settings[k]]
        # other texts have other tokens; the same texts have them with another tokenizer or chat template
        differ = [k for k in differ if k != "tokens" or "texts" not in differ]
        if differ:
            raise ValueError(
                f"The cache {folder} was made with another {', '.join(differ)}: pass another folder, or delete this one."
            )
        return
    temporary = manifest.with_suffix(".partial")
    if any(file != temporary for file in folder.iterdir()):
        raise ValueError(
            f"The folder {folder} is not empty and holds no activations: pass an empty or a new one as cache=."
        )
    temporary.write_text(json.dumps(settings))
    os.replace(temporary, manifest)


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    # a shard is there whole or not at all, so that a kill leaves nothing half-written
    temporary = file.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, file)
