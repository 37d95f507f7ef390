"""What a `remote=` argument means, told without importing what a remote model needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .host import Remote


def host_of(remote: bool | str | Remote) -> Remote | None:
    """The `Remote` that a `remote=` argument means, or None; its module is imported only then."""
    if remote is False:
        return None
    from .host import Remote

    return Remote.of(remote)
