"""States on disk: a folder with a manifest and shards, each of which tells which texts it holds.

Two processes may fill one folder: a shard is named by its texts, and a text that is there twice is read once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import cache_folder, reason, whole_file

_log = logging.getLogger("expertsteer_nnsight")
_MANIFEST = "manifest.json"
VERSION = 2  # of what is kept in a folder, and of the fingerprint of its model


@contextmanager
def kept_until_done(name: str) -> Iterator[Path | None]:
    """A folder in the user's cache that is deleted when the block succeeds, and is there again for the next try if not.

    None where there can be none: another process is at the same, or the folder cannot be written.
    """
    folder = cache_folder() / "unfinished" / name
    lock = folder.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        _log.warning(
            "What comes back cannot be kept in %s (%s): name a folder with cache=.", folder.parent, error.strerror
        )
        yield None
        return
    with file:
        if not _locked(file):
            yield None
            return
        try:
            yield folder
        except BaseException:
            if not shards_of(folder):
                _remove(folder, lock)
            raise
        _remove(folder, lock)


def _remove(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:
        return True  # not on Windows
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class _Manifest(BaseModel, extra="forbid", strict=True):
    """What the shards of a folder were made of."""

    version: int
    model: str
    texts: str
    tokens: str
    layers: list[int]
    position: str
    dtype: str
    ends: str | None
    files: list[str]


def _manifest(folder: Path) -> _Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        ValueError: it is damaged, or of another version of this package.
    """
    file = folder / _MANIFEST
    damaged = f"{file} is damaged ({{}}): delete the folder, or pass another one."
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # no text, no JSON, or a number of thousands of digits
        raise ValueError(damaged.format(reason(error))) from None
    if isinstance(known, dict) and known.get("version") != VERSION:
        raise ValueError(
            f"The cache {folder} was made by another version of expertsteer_nnsight: delete it, or pass another folder."
        )
    try:
        return _Manifest.model_validate(known)
    except ValidationError as error:
        raise ValueError(damaged.format(reason(error))) from None


def model_of_files(folder: Path, files: str | None) -> str | None:
    """The model of a cache that was made of files in this state, which need not be loaded to know it."""
    stored = None if files is None else _manifest(folder)
    return stored.model if stored is not None and files in stored.files else None


def open_cache(folder: Path, settings: dict[str, Any]) -> tuple[set[int], tuple[int, ...]]:
    """Makes the folder of a cache, or finds which rows are in it; and the layers that it holds: those of `settings`, or more.

    Args:
        folder: of the cache.
        settings: of its manifest; `files` is the state of the model's files, or None.

    Raises:
        ValueError: it was made of other settings, or is damaged, or is another folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [] if settings.get("files") is None else [settings["files"]]
    wanted = _Manifest(version=VERSION, **{**settings, "files": files})
    stored = _manifest(folder)
    if stored is not None:
        differ = [k for k in _Manifest.model_fields if k != "files" and getattr(stored, k) != getattr(wanted, k)]
        # other texts have other tokens; the same texts have them with another tokenizer or chat template
        differ = [k for k in differ if k != "tokens" or "texts" not in differ]
        if differ == ["layers"] and set(wanted.layers) < set(stored.layers):
            differ = []
        if differ:
            raise ValueError(
                f"The cache {folder} was made with another {', '.join(differ)}: pass another folder, or delete this one."
            )
        if not set(files) <= set(stored.files):
            _write(folder, stored.model_copy(update={"files": [*stored.files, *files]}))
        return {i for shard in shards_of(folder) for i in shard_index(shard)}, tuple(stored.layers)
    own = Path(_MANIFEST).stem
    if any(not (file.name.startswith(own) and file.suffix == ".partial") for file in folder.iterdir()):
        if (folder / _MANIFEST).exists():  # another process has made it since
            return open_cache(folder, settings)
        raise ValueError(
            f"The folder {folder} is not empty and holds no activations: pass an empty or a new one as cache=."
        )
    _write(folder, wanted)
    return set(), tuple(wanted.layers)


def _write(folder: Path, manifest: _Manifest) -> None:
    whole_file(folder / _MANIFEST, lambda to: to.write_text(manifest.model_dump_json(), encoding="utf-8"))


def shards_of(folder: Path) -> list[Path]:
    """The shards in a folder."""
    return sorted(folder.glob("shard-*.safetensors"))


def shard_index(shard: Path) -> list[int]:
    """Which texts a shard holds."""
    with safe_open(shard, framework="pt") as file:
        return file.get_tensor("index").tolist()


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several batches in one."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def write_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Adds a shard, whole or not at all, so that a kill leaves nothing half-written."""
    index = tensors["index"].tolist()
    file = folder / f"shard-{hashlib.sha256(str(index).encode()).hexdigest()[:12]}.safetensors"
    whole_file(file, lambda to: save_file({k: v.contiguous() for k, v in tensors.items()}, to))


def read_rows(folder: Path, key: str, texts: int) -> Tensor:
    """Rows of all texts, in their order.

    Raises:
        ValueError: some are missing, or they have several dtypes.
    """
    parts, where = [], {}
    for shard in shards_of(folder):
        with safe_open(shard, framework="pt") as file:
            part, index = file.get_tensor(key), file.get_tensor("index").tolist()
        start = sum(map(len, parts))
        parts.append(part)
        for row, text in enumerate(index):
            where.setdefault(text, start + row)
    if len(where) != texts or len({part.dtype for part in parts}) > 1:
        raise ValueError(
            f"The shards in {folder} hold {len(where)} of {texts} texts, in dtypes {sorted({str(p.dtype) for p in parts})}: "
            f"delete the folder and collect the states anew."
        )
    return torch.cat(parts)[[where[text] for text in range(texts)]]
