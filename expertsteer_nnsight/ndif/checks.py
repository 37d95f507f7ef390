"""What a host says of itself before its first job: its versions against those here, and whether it runs the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..files import library_versions
from .http import RemoteFailure


def compare_versions(address: str, theirs: Mapping[str, str]) -> None:
    """Refuses a host with another nnsight, and warns of one with another torch or transformers.

    Raises:
        RemoteFailure: nnsight differs.

    Warns:
        UserWarning: torch or transformers differ from those here.
    """
    ours = library_versions()
    differ = [n for n in ("nnsight", "torch", "transformers") if n in theirs and _minor(theirs[n]) != _minor(ours[n])]
    told = ", ".join(f"{n} {theirs[n]} (here {ours[n]})" for n in differ)
    if "nnsight" in differ:
        raise RemoteFailure(
            f"{address} has {told}, and they cannot read each other's jobs: install nnsight=={theirs['nnsight']} here."
        )
    if differ:
        warnings.warn(
            f"{address} has {told}: values may differ a little, and a job fails if modules are named otherwise; "
            f"install the same versions here if it does.",
            stacklevel=3,
        )


def state_of(address: str, deployed: Iterable[Mapping[str, Any]], shown: str, name: str) -> str:
    """One sentence about the model `shown`, whose key is `name`, from the host's list of what is deployed."""
    states = {d.get("application_state") for d in deployed if d.get("model_key") == name}
    if "RUNNING" in states:
        return f"{shown} on {address} is running."
    if "DEPLOYING" in states:
        return f"{shown} is being deployed on {address}: the first job waits for it."
    for other in deployed:
        if other.get("repo_id") == shown and other.get("application_state") in ("RUNNING", "DEPLOYING"):
            return (
                f"{address} runs {shown} with task {other.get('task')!r} and revision "
                f"{other.get('revision') or 'main'!r} only, which is another model to it: make yours with the same, or wait "
                f"while it is loaded."
            )
    return (
        f"{shown} is not in {address}'s list of running models, which may be a minute old: the server loads it now, or "
        f"refuses to (print(nnsight.status()) shows the list)."
    )


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]
