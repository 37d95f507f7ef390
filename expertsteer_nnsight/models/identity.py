"""Which model a plan belongs to, as far as its name and shape tell: id, revision, width, depth and class."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from .residual import Residual, config_of


@dataclass(frozen=True)
class ModelIdentity:
    """What distinguishes a model: `id` and `revision` as the hub names them, width, depth and class."""

    id: str | None
    revision: str | None
    hidden_size: int | None
    n_layers: int
    kind: str

    @classmethod
    def of(cls, model: Any) -> ModelIdentity:
        """Identity of a wrapped model."""
        residual, config = Residual(model), config_of(model)
        name = (
            getattr(model, "repo_id", None)
            or getattr(config, "_name_or_path", None)
            or getattr(config, "model_name", None)
        )
        name = name.rstrip("/") if isinstance(name, str) and name else None
        if name and os.path.isdir(name):
            name = os.path.basename(name)  # where a folder lies on this machine is nobody else's business
        kind = getattr(config, "model_type", None) or type(model._module).__name__
        revision = getattr(model, "revision", None)
        return cls(name, revision if isinstance(revision, str) else None, residual.hidden_size, residual.n_layers, kind)

    @property
    def name(self) -> str | None:
        """Last part of the id: a hub id and a local folder of the same name are taken to be the same model."""
        return None if self.id is None else self.id.rsplit("/", 1)[-1]

    def check(self, other: ModelIdentity, what: str, any_id: bool = False) -> None:
        """Compares with another identity.

        Raises:
            ValueError: they differ; the message says in what.
        """
        differ = [
            f"{label} {mine} against {theirs}"
            for label, mine, theirs in (
                ("width", self.hidden_size, other.hidden_size),
                ("number of layers", self.n_layers, other.n_layers),
                ("id", None if any_id else self.name, None if any_id else other.name),
            )
            if mine is not None and theirs is not None and mine != theirs
        ]
        if differ:
            hint = (
                "" if any_id or len(differ) > 1 or not differ[0].startswith("id") else " (any_id=True overrides the id)"
            )
            raise ValueError(f"{what}: it was made for another one ({', '.join(differ)}){hint}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for headers."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name or self.kind} ({self.n_layers} layers, width {self.hidden_size})"
