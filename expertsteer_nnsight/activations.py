"""collect(): texts -> residual-stream states of chosen layers, in memory or in resumable shards on disk.

Of a remote model only the kept states come back: the position is picked, and the norms are taken, on the server, because
the states of all positions would be a hundred times as much to download.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .identity import ModelIdentity, fingerprint
from .packaged_models import cache_folder
from .positions import affixes
from .residual import Residual, hidden
from .texts import Position, as_texts, encode, texts_hash, token_index

if TYPE_CHECKING:
    from .remote import Remote

_MANIFEST = "manifest.json"
_INLINE = 8 << 20  # a larger result is not sent with the answer, but fetched from the server's store
_TOKENS = 1 << 15  # padded tokens of a remote request: what one forward of a shared server should hold


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
        if len({part.dtype for part in parts}) > 1:
            raise ValueError(
                f"The shards in {self.shards} have several dtypes, as if the server's had changed: collect them anew."
            )
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
    batch_size: int | None = None,
    cache: str | Path | None = None,
    shard_size: int = 256,
    dtype: torch.dtype | None = None,
    remote: bool | str | Remote = False,
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
        batch_size: texts a forward, and a request if remote. None: 32; if remote up to 100, as many as have results of
            8 MiB (which come with the answer) and 32768 tokens with their padding.
        cache: folder for shards. What an interrupted call finished there is not run again.
        shard_size: texts a shard; a remote request is a shard of its own.
        dtype: of the stored states; the model's own if None. A remote model's are converted before they travel.
        remote: True, "http://...", or a `Remote`: run on NDIF. Without `cache` what came back is kept in the user's cache
            folder until the call succeeds, so that a call that failed goes on where it stopped when it is made again.
        progress: show a progress bar; of a remote model, with the job's state.

    Raises:
        ValueError: no texts or layers, a position that some text does not have, or a cache that was made with another
            model, other texts or other settings.
        IndexError: a layer that the model does not have.
        RemoteFailure: the host, the key or the model cannot be used, or a job failed.
    """
    residual, host = Residual(model), host_of(remote)
    texts = as_texts(texts)
    chosen = tuple(sorted({residual.index(i) for i in (range(residual.n_layers) if layers is None else layers)}))
    if not chosen:
        raise ValueError("No layers were asked for.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    tokenizer = tokenizer_of(model)
    known = affixes(tokenizer)
    encoded = [encode(tokenizer, t, known) for t in texts]
    at = [token_index(position, ids, prefix) for ids, prefix in encoded]
    rule = f"function {texts_hash(map(str, at))}" if callable(position) else str(position)
    identity = ModelIdentity.of(model)
    lengths = [len(ids) for ids, _ in encoded]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    if host is None:
        size = shard_size if cache is not None else len(order)
        shards = [_cut(order[i : i + size], batch_size or 32) for i in range(0, len(order), size)]
    else:
        bytes_each = len(chosen) * (residual.hidden_size or 4096) * (4 if dtype is None else dtype.itemsize)
        most = batch_size or max(1, min(100, _INLINE // bytes_each))
        shards = [[batch] for batch in _cut(order, most, lengths, None if batch_size else _TOKENS)]
    settings = {"model": fingerprint(model, remote=host is not None), "texts": texts_hash(texts),
                "tokens": texts_hash(map(str, encoded)), "layers": list(chosen), "position": rule,
                "shard_size": shard_size if host is None else f"requests of {batch_size or 'the usual size'}",
                "dtype": str(dtype)}  # fmt: skip
    if cache is not None and getattr(model, "_edits", None):
        raise ValueError(
            "An edited model's states cannot be kept in a cache, which could not tell the edit: omit cache=."
        )
    keep = host is not None and cache is None and not getattr(model, "_edits", None)
    memory: dict[str, Tensor] = {}
    with kept_until_done(texts_hash([json.dumps(settings)])) if keep else nullcontext(cache) as folder:
        folder = None if folder is None else Path(folder)
        if folder is not None:
            _open_cache(folder, settings)
        with tqdm(
            total=len(texts), desc=f"states of {identity.name or identity.kind}", unit="text", disable=not progress
        ) as bar:
            parts = []
            for number, batches in enumerate(shards):
                file = None if folder is None else folder / f"shard-{number:05d}.safetensors"
                if file is not None and file.exists():
                    bar.update(sum(map(len, batches)))
                    continue
                rows: dict[str, list[Tensor]] = {}
                for batch in batches:
                    backend = None if host is None else host.backend(model, bar.set_postfix_str)
                    with nullcontext() if host is None else host.explained(f"Reading {len(batch)} texts"):
                        found = _forward(model, residual, [(*encoded[i], at[i]) for i in batch], chosen, dtype, backend)
                    for key, value in found.items():
                        rows.setdefault(key, []).append(value)
                    bar.update(len(batch))
                shard = {key: torch.cat(values) for key, values in rows.items()}
                if file is not None:
                    _write(file, {**shard, "index": torch.tensor([i for batch in batches for i in batch])})
                else:
                    parts.append(shard)
            bar.set_postfix_str("")
        if cache is not None:
            return Activations(identity, chosen, len(texts), rule, folder)
        if folder is not None:
            on_disk = Activations(identity, chosen, len(texts), rule, folder)
            memory = {f"{kind}.{i}": on_disk._read(f"{kind}.{i}") for i in chosen for kind in ("layer", "norm")}
        else:
            back = torch.tensor(order).argsort()
            memory = {key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}
    return Activations(identity, chosen, len(texts), rule, None, memory)


def host_of(remote: bool | str | Remote) -> Remote | None:
    """The `Remote` that a `remote=` argument means, or None; its module is imported only then."""
    if remote is False:
        return None
    from .remote import Remote

    return Remote.of(remote)


def _cut(
    items: Sequence[int], size: int, lengths: Sequence[int] | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Runs of at most `size` items, and of at most `tokens` tokens, padded to the longest."""
    found: list[list[int]] = []
    for i in items:
        last = found[-1] if found else []
        longest = max((lengths[j] for j in (*last, i)), default=0) if lengths else 0
        if last and len(last) < size and (tokens is None or (len(last) + 1) * longest <= tokens):
            last.append(i)
        else:
            found.append([i])
    return found


@contextmanager
def kept_until_done(name: str) -> Iterator[Path]:
    """A folder in the user's cache that is deleted when the block succeeds, and is there again for the next try if not."""
    folder = cache_folder() / "unfinished" / name
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


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


def _forward(
    model: Any, residual: Residual, batch: list, layers: tuple[int, ...], dtype: Any, backend: Any
) -> dict[str, Tensor]:
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
    if backend is not None:
        extra["backend"] = backend
    blocks = [residual.layers[i] for i in layers]
    with torch.no_grad(), model.trace(*call, **extra) as tracer:
        states, norms = [], []
        for block in blocks:
            state, norm = pick(hidden(block.output), own, column, mean)
            # one tensor for all layers, which may lie on several devices: half the bytes of a result would be headers
            states.append((state if dtype is None else state.to(dtype)).cpu())
            norms.append(norm.cpu())
        kept = nnsight.save(torch.stack(states))
        sizes = nnsight.save(torch.stack(norms))
        tracer.stop()
    found = {f"layer.{i}": s for i, s in zip(layers, kept, strict=True)}
    return found | {f"norm.{i}": n for i, n in zip(layers, sizes, strict=True)}


def pick(h: Tensor, own: Tensor, column: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """From one layer's `[row, position, hidden]`: the kept state `[row, hidden]`, and the median norm of each row's tokens.

    Runs inside the trace, on a server too. Sums are taken in float32 or wider.
    """
    own, column = own.to(h.device), column.to(h.device)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    norms = wide.norm(dim=-1).masked_fill(~own, float("nan")).nanmedian(dim=1).values
    if mean:
        weight = own.to(wide.dtype) / own.sum(1, keepdim=True)
        return torch.einsum("rph,rp->rh", wide, weight).to(h.dtype), norms  # einops may be missing on a server
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
