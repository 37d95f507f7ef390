"""Files: written whole or not at all, where the package keeps its own, and the versions that stand in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    found = {}
    for name in ("expertsteer_nnsight", "nnsight", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cache_folder() -> Path:
    """Where packaged models and unfinished downloads are kept: `$EXPERTSTEER_CACHE`, or a folder in the user's cache."""
    return Path(os.environ.get("EXPERTSTEER_CACHE") or Path.home() / ".cache" / "expertsteer_nnsight")


def whole_file(path: str | Path, write: Callable[[Path], object]) -> Path:
    """What `write` puts in a file; it appears whole or not at all, whoever else writes it at the same time.

    Raises:
        ValueError: the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid4().hex[:8]}.partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; safetensors writes files that nobody else may read
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def reason(error: Exception) -> str:
    """What is wrong with a header or a manifest, in a few words; the first thing that pydantic's validation found."""
    if not hasattr(error, "errors"):
        return str(error) or type(error).__name__
    first: dict[str, Any] = error.errors()[0]  # type: ignore[attr-defined]
    where = ".".join(map(str, first["loc"]))
    return f"{where or 'it'}: {first['msg']}"
