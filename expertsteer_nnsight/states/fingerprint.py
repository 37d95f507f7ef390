"""Whether a model computes what another one does: a digest of its weights and of all else that its outputs depend on.

Where it lies, how it was loaded and whether it has run before make no difference. What no digest can tell, hooks and functions in
place of a module's forward, is named, so that nothing is kept for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..models.identity import ModelIdentity
from ..models.residual import config_of

WHOLE = 2 << 30  # bytes of weights up to which all of them count, and beyond which a sample does
_RUN, _STEP, _CHUNK = 16, 1021, 127  # words: of a sampled run, from one to the next, and of one sum
_ROWS = {"cpu": 512}  # sums at once, by device: few stay in the processor's cache
# of configurations and modules: where a model lies and how it was loaded, what it puts out besides, what a forward changes
_FREE = frozenset((
    "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "problem_type", "use_cache",
    "return_dict", "output_hidden_states", "output_attentions", "attn_implementation", "name_or_path", "training",
    "hf_device_map", "warnings_issued", "gradient_checkpointing", "max_seq_len_cached", "is_parallelizable",
    "model_parallel",
))  # fmt: skip
_ADAPTERS = frozenset(("active_adapter", "_active_adapter", "_disable_adapters"))  # of PEFT; one or several
# whose hooks do what the model says
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "nnsight", "bitsandbytes")


def fingerprint(model: Any, remote: bool = False) -> str:
    """A digest of what a model computes; one that nnsight has not loaded is loaded.

    All weights and buffers count, each with its dtype (of models above 2 GiB one in 64 of the words of each tensor, in runs that
    cross every row and column); so do the configuration, the kinds of the modules, their plain attributes and the adapters that are
    in use. Of a remote model, whose weights are elsewhere, the id and revision stand for them.

    Args:
        model: wrapped by nnsight.
        remote: it runs elsewhere.
    """
    files = None
    if not remote and not getattr(model, "dispatched", True):
        files = files_of(model)
        model.dispatch()
    module, digest = model._module, hashlib.sha256()
    config = config_of(model)
    if hasattr(config, "to_dict"):
        digest.update(json.dumps(_settings(config.to_dict()), sort_keys=True, default=str).encode())
    if remote:
        digest.update(json.dumps(ModelIdentity.of(model).to_dict(), sort_keys=True).encode())
        for name, p in module.named_parameters():
            digest.update(f"{name}{tuple(p.shape)}".encode())
        return digest.hexdigest()[:16]
    for name, one in module.named_modules():
        digest.update(f"{name} {type(one).__module__}.{type(one).__qualname__} {_attributes(one)}".encode())
    tensors = [*module.named_parameters(), *module.named_buffers()]
    sample = sum(t.numel() * t.element_size() for _, t in tensors) > WHOLE
    for name, t in tensors:
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        for part in _digested(_loaded(module, name, t), sample):
            digest.update(part)
    found = digest.hexdigest()[:16]
    if files is not None and files == files_of(model):  # else they were written while they were loaded
        model.__dict__["_expertsteer_made_of"] = found, files
    return found


def made_of(model: Any, found: str) -> str | None:
    """The state of the files (`files_of`) that make a model of this fingerprint; None where `fingerprint` did not load it."""
    loaded, files = model.__dict__.get("_expertsteer_made_of", (None, None))
    return files if loaded == found else None


def untold(model: Any) -> str | None:
    """What of a model no digest can tell, as the end of a sentence; None where it tells all."""
    if getattr(model, "_edits", None):
        return "it has lasting edits"
    hooks = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
    if any(_foreign(hook) for some in hooks for hook in some.values()):
        return "forward hooks of all modules are registered"
    for name, one in model._module.named_modules():
        where = f"its module {name}" if name else "it"
        if any(_foreign(hook) for some in (one._forward_hooks, one._forward_pre_hooks) for hook in some.values()):
            return f"{where} has a forward hook"
        if _replaced(one):
            return f"{where} has another forward than its class"
    return None


def files_of(model: Any) -> str | None:
    """A digest of the state of the files that nnsight makes a model of, and of how: any change of a file changes it.

    It says nothing of what a loaded model has become since. None where the files cannot all be told: a model that was made in
    memory, adapters, a model that is on this machine in part.
    """
    name, how = getattr(model, "repo_id", None), dict(getattr(model, "kwargs", None) or {})
    if getattr(model, "peft", None) or not isinstance(name, str) or not name:
        return None
    folder = Path(name)
    try:
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, revision=getattr(model, "revision", None), local_files_only=True))
        files = sorted(file for file in folder.rglob("*") if file.is_file())  # weights may lie in a folder of it
        found = {str(file.relative_to(folder)): _state(file) for file in files}
    except (OSError, ValueError, ImportError):  # not there, or not whole
        return None
    if not any(file.endswith((".safetensors", ".bin")) for file in found) or "adapter_config.json" in found:
        return None
    told = {
        "files": found,
        "how": {key: str(value) for key, value in sorted(how.items())},
        "folder": str(folder.resolve()),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of how a tokenizer reads text and chats."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    for passing in ("padding", "truncation"):  # of the last call
        told.pop(passing, None)
    about = [
        type(tokenizer).__name__,
        told,
        str(tokenizer.special_tokens_map),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _settings(config: Any) -> Any:
    """A configuration without what changes nothing that is computed."""
    if isinstance(config, dict):
        return {str(k): _settings(v) for k, v in config.items() if not str(k).startswith("_") and str(k) not in _FREE}
    return [_settings(v) for v in config] if isinstance(config, (list, tuple)) else config


def _attributes(module: nn.Module) -> str:
    """A module's plain attributes and its functions."""
    found = {}
    for name, value in sorted(vars(module).items()):
        if name in _FREE or name == "forward" or (name.startswith("_") and name not in _ADAPTERS):
            continue
        if _plain(value):
            alone = name in _ADAPTERS and isinstance(value, str)
            found[name] = repr([value] if alone else value)
        elif callable(value) and not isinstance(value, (nn.Module, type)) and hasattr(value, "__qualname__"):
            found[name] = f"{value.__module__}.{value.__qualname__}"
    return json.dumps(found)


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or type(value) in (int, float, bool, str)


def _foreign(hook: Callable[..., Any]) -> bool:
    """Whether a hook is of none of the libraries that models are made with."""
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return where.split(".")[0] not in _LIBRARIES


def _replaced(module: nn.Module) -> bool:
    """Whether a function stands in the place of a module's own forward; nnsight keeps it where it puts its own."""
    own = vars(module)
    if "_hf_hook" in own:  # accelerate moves weights around it
        return False
    state = own.get("__nnsight__")
    if state is None:
        return "forward" in own
    here = type(own.get("forward")).__module__.split(".")[0]
    return here != "nnsight" or getattr(state, "original", type(module).forward) is not type(module).forward


def _loaded(root: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor, from where accelerate has put it if it is not in memory."""
    if not tensor.is_meta:
        return tensor.detach()
    owner, _, leaf = name.rpartition(".")
    hook = getattr(root.get_submodule(owner), "_hf_hook", None)
    kept = getattr(hook, "weights_map", None)
    if kept is None:
        raise ValueError(
            f"The weight {name} is on no device, so that the model cannot be told from others: load it whole."
        )
    return torch.as_tensor(kept[leaf])


def _digested(tensor: Tensor, sample: bool) -> Iterator[bytes]:
    """Weighted sums of runs of 8-byte words; of large models of some runs alone, with the end of the tensor."""
    if tensor.is_sparse or tensor.is_quantized:
        tensor = tensor.to_dense() if tensor.is_sparse else tensor.int_repr()
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    yield flat[whole:].cpu().numpy().tobytes()
    words = flat[:whole]
    words = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64)
    if sample and len(words) > 2 * _STEP:
        count = (len(words) - _RUN) // _STEP
        yield words[-_RUN:].cpu().numpy().tobytes()
        words = words.as_strided((count, _RUN), (_STEP, 1), words.storage_offset()).reshape(-1)
    chunks = words[: len(words) // _CHUNK * _CHUNK].view(-1, _CHUNK)
    # odd factors in 64 bits that tell the words of a sum apart (golden ratio), so that none may change places
    factors = torch.arange(1, 2 * _CHUNK, 2, device=words.device) * -0x61C8864680B583EB
    for some in chunks.split(_ROWS.get(words.device.type, 1 << 16)):
        yield (some * factors).sum(1).cpu().numpy().tobytes()
    yield words[chunks.numel() :].cpu().numpy().tobytes()
