"""Plans on the Hugging Face hub: a repository with the plan's file, and a card made from its header and receipt."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    from ..steering.plan import SteeringPlan

FILE = "plan.safetensors"


def card(plan: SteeringPlan, repo_id: str) -> str:
    """The model card, in Markdown with its YAML header: what the plan steers, where it came from, what was measured."""
    from huggingface_hub import ModelCardData

    target, expert = plan.target, plan.info.get("expert")
    expert = expert if isinstance(expert, Mapping) else {"id": expert}  # of a plan by hand it may be a name
    on_hub = target.id if target and target.id and "/" in target.id else None  # a folder's name is no id
    about = ModelCardData(
        library_name="expertsteer_nnsight",
        base_model=on_hub,
        tags=["nnsight", "steering-vector", "activation-steering"],
    )
    name = target or "any model of this width"
    load = f"TransformersModel({on_hub!r}" if on_hub else "TransformersModel(MODEL"
    receipt = plan.info.get("receipt")
    measured = "It was not measured: there is no receipt."
    if receipt:
        from ..measure.receipts import Receipt

        measured = f"```\n{Receipt.from_dict(receipt)}\n```"
    prompt = '"The weekend was"' if plan.prompts is None else "PROMPTS"  # those that it was made for
    source = f" The directions come from `{expert['id']}`." if expert.get("id") else ""
    return f"""---
{about.to_yaml()}
---

# {repo_id.rsplit("/", 1)[-1]}

A steering plan for `{name}`: vectors that are added to its residual stream at inference; no weights change.{source}

```python
import nnsight
import expertsteer_nnsight as es
from nnsight.modeling.transformers import TransformersModel

model = {load}, task="text-generation", dispatch=True)
steered = es.SteeringPlan.from_hub("{repo_id}").attach(model)
with steered.generate({prompt}, max_new_tokens=20) as tracer:
    ids = nnsight.save(tracer.result)
```

## The plan

```
{plan}
```

## What was measured

{measured}

Made with expertsteer_nnsight {__version__}.
"""


def push(plan: SteeringPlan, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
    """Uploads a plan and its card in one commit; the repository is made if it is not there.

    Args:
        plan: the plan.
        repo_id: `owner/name`.
        private: whether a new repository is private (default: as the owner's settings say).
        options: of `huggingface_hub.HfApi.create_commit`, such as `commit_message`, `revision`, `create_pr`, and `token` and
            `endpoint` of `HfApi`.

    Returns:
        The commit's address.

    Raises:
        ValueError: `repo_id` is no such name.
        RuntimeError: the hub cannot be reached.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses the token, the repository or the commit.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise ValueError(f"A repository on the hub is named owner/name, and {repo_id!r} is not.")
    validate_repo_id(repo_id)
    api = HfApi(endpoint=options.pop("endpoint", None), token=options.pop("token", None))
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
    except Exception as error:
        if type(error).__module__.startswith("httpx"):
            raise RuntimeError(f"The hub at {api.endpoint} cannot be reached ({error}).") from None
        raise
    with tempfile.TemporaryDirectory() as folder:
        path = plan.save(Path(folder) / FILE)
        operations = [
            CommitOperationAdd(FILE, str(path)),
            CommitOperationAdd("README.md", card(plan, repo_id).encode()),
        ]
        options.setdefault("commit_message", "Upload a steering plan")
        return str(api.create_commit(repo_id, operations, **options).commit_url)


def pull(repo_id: str, revision: str | None = None, filename: str = FILE, **options: Any) -> SteeringPlan:
    """Downloads a plan (into the hub's cache) and reads it.

    Args:
        repo_id: `owner/name`.
        revision: a commit, branch or tag; name a commit where the plan must stay the same.
        filename: of the plan in the repository.
        options: of `huggingface_hub.hf_hub_download`, such as `token`, `endpoint` and `local_files_only`.

    Raises:
        ValueError: the repository has no such file, or the file is no plan.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from ..steering.plan import SteeringPlan

    try:
        path = hf_hub_download(repo_id, filename, revision=revision, **options)
    except EntryNotFoundError:
        raise ValueError(f"{repo_id} has no {filename}: name the plan's file with filename=.") from None
    return SteeringPlan.load(path)
