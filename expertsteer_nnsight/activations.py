"""collect(): texts -> residual-stream states of chosen layers, in memory or in resumable shards on disk.

Of a remote model only the kept states come back: the position is picked, and the norms are taken, on the server, because
the states of all positions would be a hundred times as much to download.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ._shards import joined, kept_until_done, open_cache, read_rows, write_shard
from .identity import ModelIdentity, fingerprint
from .positions import affixes
from .residual import Residual, hidden
from .texts import Position, as_texts, encode, texts_hash, token_index
from .word_ends import token_ends

if TYPE_CHECKING:
    from .remote import Remote

_INLINE = 8 << 20  # a larger result is not sent with the answer, but fetched from the server's store
_TOKENS = 1 << 15  # padded tokens of a remote request: what one forward of a shared server should hold


@dataclass(frozen=True, eq=False)
class Activations(Mapping):
    """States of some layers for some texts: `activations[layer]` is `[text, hidden]`, in the order of the texts.

    With `ends`, a text has several rows: one for each place within it, and then that of its own position.

    Attributes:
        model: whose states these are.
        layers: the layers that were collected, ascending.
        n_texts: number of rows: of texts, where each has one.
        position: the position rule, as it was asked for.
        shards: folder of the shards that back it, or None if all is in memory.
        text_of: the number of the text that each row belongs to, or None where each text has one row.
    """

    model: ModelIdentity
    layers: tuple[int, ...]
    n_texts: int
    position: str
    shards: Path | None = None
    _memory: dict[str, Tensor] = field(default_factory=dict, repr=False)
    text_of: tuple[int, ...] | None = None

    @property
    def n_layers(self) -> int:
        """How many decoder layers the model has."""
        return self.model.n_layers

    def _read(self, key: str) -> Tensor:
        if self.shards is None:
            return self._memory[key]
        return read_rows(self.shards, key, self.n_texts)

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
        """Median norm of the residual stream of `layer`, in its own units: over texts, of each text's median over its own tokens.

        Raises:
            KeyError: the layer was not collected.
        """
        return float(self._read(f"norm.{self._known(layer)}").median())

    def take(self, rows: Any, layers: Iterable[int] | None = None) -> Activations:
        """Some of the texts (and layers), in memory.

        Args:
            rows: a slice, or indices.
            layers: of those that were collected; all of them if None.

        Raises:
            KeyError: a layer that was not collected.
        """
        chosen = tuple(sorted({self._known(i) for i in (self.layers if layers is None else layers)}))
        memory = {f"{kind}.{i}": self._read(f"{kind}.{i}")[rows] for i in chosen for kind in ("layer", "norm")}
        n = len(memory[f"norm.{chosen[0]}"])
        of = None if self.text_of is None else tuple(torch.tensor(self.text_of)[rows].tolist())
        return Activations(self.model, chosen, n, self.position, None, memory, of)

    @property
    def whole(self) -> Activations:
        """The row of each text's own position; these states themselves where there is no other."""
        if self.text_of is None:
            return self
        last = [i for i, n in enumerate(self.text_of) if self.text_of[i + 1 : i + 2] != (n,)]
        return replace(self.take(last), text_of=None)

    @classmethod
    def joined(cls, parts: Sequence[Activations]) -> Activations:
        """The texts of several, one after another, in memory; the layers that all have.

        Raises:
            ValueError: no parts, no layer in all of them, or other models or positions.
        """
        if not parts or any(p.model != parts[0].model or p.position != parts[0].position for p in parts):
            raise ValueError("Only states of one model at one position can be joined.")
        chosen = tuple(sorted(set.intersection(*(set(p.layers) for p in parts))))
        if not chosen:
            raise ValueError("The states to be joined have no layer in common.")
        keys = [f"{kind}.{i}" for i in chosen for kind in ("layer", "norm")]
        memory = {key: torch.cat([p._read(key) for p in parts]) for key in keys}
        of: list[int] = []
        for part in parts:
            start = of[-1] + 1 if of else 0
            of += [start + n for n in part.text_of or range(part.n_texts)]
        several = None if all(part.text_of is None for part in parts) else tuple(of)
        return cls(parts[0].model, chosen, len(of), parts[0].position, None, memory, several)

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
    ends: Sequence[Sequence[int]] | None = None,
    remote: bool | str | Remote = False,
    progress: bool = True,
    _until: ExitStack | None = None,
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
        cache: folder for shards. What an interrupted call finished there is not run again. One that holds further layers will do.
        shard_size: texts a shard, at least; a remote request is a shard of its own.
        dtype: of the stored states; the model's own if None. A remote model's are converted before they travel.
        ends: for each text, character offsets at which a token ends (`word_ends.shared_ends`): further rows, before that of
            `position`, with the states there.
        remote: True, "http://...", or a `Remote`: run on NDIF. Without `cache` what came back is kept in the user's cache
            folder until the call succeeds, so that a call that failed goes on where it stopped when it is made again.
        progress: show a progress bar; of a remote model, with the job's state.

    Returns:
        By layer, `[text, hidden]` (with `ends`, more rows than texts: `Activations.text_of`).

    Raises:
        ValueError: no texts or layers, a position or an end that some text does not have, or a cache that was made with
            another model, other texts or other settings.
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
    at = [[token_index(position, ids, prefix)] for ids, prefix in encoded]
    rule = f"function {texts_hash(map(str, at))}" if callable(position) else str(position)
    if ends is not None:
        at = _with_ends(tokenizer, texts, encoded, ends, at)
    first_row = [0, *accumulate(map(len, at))]
    n_rows = first_row[-1]
    identity = ModelIdentity.of(model)
    settings = {"model": fingerprint(model, remote=host is not None), "texts": texts_hash(texts),
                "tokens": texts_hash(map(str, encoded)), "layers": list(chosen), "position": rule,
                "dtype": str(dtype)}  # fmt: skip
    settings["ends"] = None if ends is None else texts_hash(str(list(mine)) for mine in ends)
    edited = bool(getattr(model, "_edits", None))
    if cache is not None and edited:
        raise ValueError(
            "An edited model's states cannot be kept in a cache, which could not tell the edit: omit cache=."
        )
    lengths = [len(ids) for ids, _ in encoded]
    most, tokens = batch_size or 32, None
    if host is not None:
        bytes_each = len(chosen) * (residual.hidden_size or 4096) * (4 if dtype is None else dtype.itemsize)
        bytes_each *= max(map(len, at))
        most, tokens = batch_size or max(1, min(100, _INLINE // bytes_each)), None if batch_size else _TOKENS
        shard_size = 1  # every request is kept as it comes

    def read(batch: list[int], bar: tqdm) -> dict[str, Tensor]:
        rows = [(*encoded[i], at[i]) for i in batch]
        if host is None:
            return _forward(model, residual, rows, held, dtype, None)
        after = f"; {kept} of {len(texts)} texts are kept, and the same call goes on from there" if kept else ""
        with host.explained(f"Reading {len(batch)} texts", "batch_size=", after):
            return _forward(model, residual, rows, held, dtype, host.backend(model, bar.set_postfix_str))

    with ExitStack() as own:
        folder = None if cache is None else Path(cache)
        if host is not None and cache is None and not edited:
            # a caller that reads several times deletes them all when it has succeeded
            folder = (_until or own).enter_context(kept_until_done(texts_hash([json.dumps(settings)])))
        stored, held = (set(), chosen) if folder is None else open_cache(folder, settings)
        done = {i for i, row in enumerate(first_row[:-1]) if row in stored}  # the rows of a text are in one shard
        kept = len(done)
        todo = sorted(set(range(len(texts))) - done, key=lambda i: (lengths[i], i))
        label = f"states of {identity.name or identity.kind}"
        with tqdm(
            total=len(texts), initial=kept, desc=label, unit="text", disable=not progress or kept == len(texts)
        ) as bar:
            unsaved: list[dict[str, Tensor]] = []
            count = 0
            for batch in _cut(todo, most, lengths, tokens):
                rows = [row for i in batch for row in range(first_row[i], first_row[i + 1])]
                unsaved.append({**read(batch, bar), "index": torch.tensor(rows)})
                bar.update(len(batch))
                count += len(batch)
                if folder is not None and (count >= shard_size or batch[-1] == todo[-1]):
                    write_shard(folder, joined(unsaved))
                    kept, count, unsaved = kept + count, 0, []
            bar.set_postfix_str("")
        of = None if ends is None else tuple(i for i, columns in enumerate(at) for _ in columns)
        found = Activations(identity, chosen, n_rows, rule, folder, text_of=of)
        if cache is not None:
            return found
        if folder is not None:
            memory = {f"{kind}.{i}": found._read(f"{kind}.{i}") for i in chosen for kind in ("layer", "norm")}
        else:
            memory = joined(unsaved)
            back = memory.pop("index").argsort()
            memory = {key: value[back] for key, value in memory.items()}
    return Activations(identity, chosen, n_rows, rule, None, memory, of)


def _with_ends(
    tokenizer: Any, texts: Any, encoded: Any, ends: Any, at: list[list[int | None]]
) -> list[list[int | None]]:
    """The columns of each text's ends, before that of its position."""
    if len(ends) != len(texts):
        raise ValueError(f"Ends are given for {len(ends)} texts, but there are {len(texts)}.")
    if any(column is None for columns in at for column in columns):
        raise ValueError('Ends go with a position of one token, not with "mean".')
    found = []
    for text, (_, prefix), mine, columns in zip(texts, encoded, ends, at, strict=True):
        known = token_ends(tokenizer, text, prefix) if len(mine) else {}
        missing = [end for end in mine if end not in known]
        if missing:
            raise ValueError(f"No token of this model ends at character {missing[0]} of {text!r:.60}.")
        found.append([*(known[end] for end in mine), *columns])
    return found


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
    column = torch.tensor([at or 0 for *_, columns in batch for at in columns])
    row = torch.tensor([n for n, (*_, columns) in enumerate(batch) for _ in columns])
    mean = batch[0][2][0] is None
    bridge = type(model._module).__name__ == "TransformerBridge"
    call = (ids,) if bridge else ()
    extra = {} if bridge else {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if backend is not None:
        extra["backend"] = backend
    blocks = [residual.layers[i] for i in layers]
    with torch.no_grad(), model.trace(*call, **extra) as tracer:
        states, norms = [], []
        for block in blocks:
            state, norm = pick(hidden(block.output), own, row, column, mean)
            # one tensor for all layers, which may lie on several devices: half the bytes of a result would be headers
            states.append((state if dtype is None else state.to(dtype)).cpu())
            norms.append(norm.cpu())
        kept = nnsight.save(torch.stack(states))
        sizes = nnsight.save(torch.stack(norms))
        tracer.stop()
    found = {f"layer.{i}": s for i, s in zip(layers, kept, strict=True)}
    return found | {f"norm.{i}": n for i, n in zip(layers, sizes, strict=True)}


def pick(h: Tensor, own: Tensor, row: Tensor, column: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """From one layer's `[text, position, hidden]`: the kept states `[row, hidden]`, and the median norm of each text's tokens.

    Runs inside the trace, on a server too. Sums are taken in float32 or wider.
    """
    own, row, column = own.to(h.device), row.to(h.device), column.to(h.device)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    norms = wide.norm(dim=-1).masked_fill(~own, float("nan")).nanmedian(dim=1).values
    if mean:
        weight = own.to(wide.dtype) / own.sum(1, keepdim=True)
        # no product of matrices: a server's autocast would round it, and it has no einops
        return (wide * weight[..., None]).sum(1).to(h.dtype), norms
    # a copy: a view would keep the whole layer alive
    return h[row, column].clone(), norms[row]
