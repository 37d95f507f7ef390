"""collect(): texts -> residual-stream states of chosen layers, in memory or in resumable shards on disk.

Of a remote model only the kept states come back: the position is picked, and the norms are taken, on the server, because
the states of all positions would be a hundred times as much to download.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.identity import ModelIdentity
from ..models.positions import affixes
from ..models.residual import Residual
from ..ndif.argument import host_of
from ..texts.texts import Position, as_texts, encode, texts_hash, token_index, tokenizer_of
from ..texts.word_ends import token_ends
from .activations import Activations
from .fingerprint import files_of, fingerprint, made_of, untold
from .forward import batches, forward
from .shards import joined, kept_until_done, model_of_files, open_cache, write_shard

if TYPE_CHECKING:
    from ..ndif.host import Remote

_INLINE = 8 << 20  # a larger result is not sent with the answer, but fetched from the server's store
_TOKENS = 1 << 15  # padded tokens of a remote request: what one forward of a shared server should hold


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
        ends: for each text, character offsets at which a token ends (`texts.word_ends.shared_ends`): further rows, before that of
            `position`, with the states there.
        remote: True, "http://...", or a `Remote`: run on NDIF. Without `cache` what came back is kept in the user's cache
            folder until the call succeeds, so that a call that failed goes on where it stopped when it is made again.
        progress: show a progress bar; of a remote model, with the job's state.

    Returns:
        By layer, `[text, hidden]` (with `ends`, more rows than texts: `Activations.text_of`).

    Raises:
        ValueError: no texts or layers, a position or an end that some text does not have, a cache that was made with
            another model, other texts or other settings, or one for a model with forward hooks or edits, which no cache can tell.
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
    known, pad = affixes(tokenizer), getattr(tokenizer, "pad_token_id", None) or 0
    encoded = [encode(tokenizer, t, known) for t in texts]
    at = [[token_index(position, ids, prefix)] for ids, prefix in encoded]
    rule = f"function {texts_hash(map(str, at))}" if callable(position) else str(position)
    if ends is not None:
        at = columns_at_ends(tokenizer, texts, encoded, ends, at)
    first_row = [0, *accumulate(map(len, at))]
    n_rows = first_row[-1]
    identity = ModelIdentity.of(model)
    settings = {"texts": texts_hash(texts), "tokens": texts_hash(map(str, encoded)), "layers": list(chosen),
                "position": rule, "dtype": str(dtype),
                "ends": None if ends is None else texts_hash(str(list(mine)) for mine in ends)}  # fmt: skip
    hidden = untold(model)
    if cache is not None and hidden is not None:
        raise ValueError(f"No cache can tell this model from others, because {hidden}: omit cache=, or undo that.")
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
            return forward(model, residual, rows, held, dtype, pad, None)
        after = f"; {kept} of {len(texts)} texts are kept, and the same call goes on from there" if kept else ""
        with host.explained(f"Reading {len(batch)} texts", "batch_size=", after):
            return forward(model, residual, rows, held, dtype, pad, host.backend(model, bar.set_postfix_str))

    with ExitStack() as own:
        folder = None if cache is None else Path(cache)
        if host is not None:
            settings["model"] = fingerprint(model, remote=True)
            if cache is None and hidden is None:
                # a caller that reads several times deletes them all when it has succeeded
                folder = (_until or own).enter_context(kept_until_done(texts_hash([json.dumps(settings)])))
        elif folder is not None:
            settings["model"], settings["files"] = _who(model, folder)
        stored, held = (set(), chosen) if folder is None else open_cache(folder, settings)
        done = {i for i, row in enumerate(first_row[:-1]) if row in stored}  # the rows of a text are in one shard
        kept = len(done)
        todo = sorted(set(range(len(texts))) - done, key=lambda i: (lengths[i], i))
        label = f"states of {identity.name or identity.kind}"
        with tqdm(
            total=len(texts), initial=kept, desc=label, unit="text", disable=not progress or kept == len(texts)
        ) as bar:
            unsaved: list[dict[str, Tensor]] = []
            memory: dict[str, Tensor] = {}
            count = 0
            for batch in batches(todo, most, lengths, tokens):
                rows = [row for i in batch for row in range(first_row[i], first_row[i + 1])]
                part = read(batch, bar)
                bar.update(len(batch))
                if folder is None:
                    _fill(memory, part, rows, n_rows)
                    continue
                unsaved.append({**part, "index": torch.tensor(rows)})
                count += len(batch)
                if count >= shard_size or batch[-1] == todo[-1]:
                    write_shard(folder, joined(unsaved))
                    kept, count, unsaved = kept + count, 0, []
            bar.set_postfix_str("")
        of = None if ends is None else tuple(i for i, columns in enumerate(at) for _ in columns)
        found = Activations(identity, chosen, n_rows, rule, folder, text_of=of)
        if cache is not None:
            return found
        if folder is not None:
            memory = {f"{kind}.{i}": found._read(f"{kind}.{i}") for i in chosen for kind in ("layer", "norm")}
    return Activations(identity, chosen, n_rows, rule, None, memory, of)


def _who(model: Any, folder: Path) -> tuple[str, str | None]:
    """A local model's fingerprint, and the state of the files that it is made of where that is known.

    A model that nnsight has not loaded yet is known by its files, where the cache was made of the same ones unchanged. Else it is
    loaded: its weights may be those of the cache, wherever they lie.
    """
    files = None if getattr(model, "dispatched", True) else files_of(model)
    known = model_of_files(folder, files)
    if known is not None:
        return known, files
    found = fingerprint(model)
    return found, made_of(model, found)


def _fill(memory: dict[str, Tensor], part: dict[str, Tensor], rows: list[int], n_rows: int) -> None:
    """Puts a batch into its rows of what is made at the first one: joined at the end, there would be three copies of it all."""
    for key, value in part.items():
        if key not in memory:
            memory[key] = value.new_empty((n_rows, *value.shape[1:]))
        memory[key][rows] = value


def columns_at_ends(
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
