"""States on disk: a folder with a manifest and numbered shards, each of which tells which texts it holds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .packaged_models import cache_folder

_MANIFEST = "manifest.json"


@contextmanager
def kept_until_done(name: str) -> Iterator[Path]:
    """A folder in the user's cache that is deleted when the block succeeds, and is there again for the next try if not."""
    folder = cache_folder() / "unfinished" / name
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def open_cache(folder: Path, settings: dict[str, Any]) -> set[int]:
    """Makes the folder of a cache, or finds which texts are in it."""
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
        return {i for shard in shards_of(folder) for i in shard_index(shard)}
    temporary = manifest.with_suffix(".partial")
    if any(file != temporary for file in folder.iterdir()):
        raise ValueError(
            f"The folder {folder} is not empty and holds no activations: pass an empty or a new one as cache=."
        )
    temporary.write_text(json.dumps(settings))
    os.replace(temporary, manifest)
    return set()


def shards_of(folder: Path) -> list[Path]:
    """The shards in a folder, in the order of their making."""
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
    shards = shards_of(folder)
    file = folder / f"shard-{int(shards[-1].stem[6:]) + 1 if shards else 0:05d}.safetensors"
    temporary = file.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, file)
