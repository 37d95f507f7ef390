"""States of some layers for some texts, in memory or in shards on disk: what `collect` gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..models.identity import ModelIdentity
from .shards import read_rows


@dataclass(frozen=True, eq=False)
class Activations(Mapping):
    """States of some layers for some texts: `activations[layer]` is `[text, hidden]`, in the order of the texts.

    With `ends`, a text has several rows: one for each place within it, and then that of its own position.

    Attributes:
        model: whose states these are.
        layers: the layers that were collected, ascending.
        n_texts: number of rows: of texts, where each has one.
        position: the position rule, as it was asked for.
        shards: folder of the shards that back it, or None if all is in memory.
        text_of: the number of the text that each row belongs to, or None where each text has one row.
    """

    model: ModelIdentity
    layers: tuple[int, ...]
    n_texts: int
    position: str
    shards: Path | None = None
    _memory: dict[str, Tensor] = field(default_factory=dict, repr=False)
    text_of: tuple[int, ...] | None = None

    @property
    def n_layers(self) -> int:
        """How many decoder layers the model has."""
        return self.model.n_layers

    def _read(self, key: str) -> Tensor:
        if self.shards is None:
            return self._memory[key]
        return read_rows(self.shards, key, self.n_texts)

    def __getitem__(self, layer: int) -> Float[Tensor, "text hidden"]:
        """States of one layer (negative: from the end); read from disk at each access where there are shards."""
        return self._read(f"layer.{self._known(layer)}")

    def _known(self, layer: int) -> int:
        found = layer + self.n_layers if layer < 0 else layer
        if found not in self.layers:
            raise KeyError(f"Layer {layer} was not collected; there are {list(self.layers)}.")
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping would compare tensors, which has no truth value

    def __hash__(self) -> int:
        return id(self)

    def norm(self, layer: int) -> float:
        """Median norm of the residual stream of `layer`, in its own units: over texts, of each text's median over its own tokens.

        Raises:
            KeyError: the layer was not collected.
        """
        return float(self._read(f"norm.{self._known(layer)}").median())

    def take(self, rows: Any, layers: Iterable[int] | None = None) -> Activations:
        """Some of the texts (and layers), in memory.

        Args:
            rows: a slice, or indices.
            layers: of those that were collected; all of them if None.

        Raises:
            KeyError: a layer that was not collected.
        """
        chosen = tuple(sorted({self._known(i) for i in (self.layers if layers is None else layers)}))
        memory = {f"{kind}.{i}": self._read(f"{kind}.{i}")[rows] for i in chosen for kind in ("layer", "norm")}
        n = len(memory[f"norm.{chosen[0]}"])
        of = None if self.text_of is None else tuple(torch.tensor(self.text_of)[rows].tolist())
        return Activations(self.model, chosen, n, self.position, None, memory, of)

    @property
    def whole(self) -> Activations:
        """The row of each text's own position; these states themselves where there is no other."""
        if self.text_of is None:
            return self
        last = [i for i, n in enumerate(self.text_of) if self.text_of[i + 1 : i + 2] != (n,)]
        return replace(self.take(last), text_of=None)

    @classmethod
    def joined(cls, parts: Sequence[Activations]) -> Activations:
        """The texts of several, one after another, in memory; the layers that all have.

        Raises:
            ValueError: no parts, no layer in all of them, or other models or positions.
        """
        if not parts or any(p.model != parts[0].model or p.position != parts[0].position for p in parts):
            raise ValueError("Only states of one model at one position can be joined.")
        chosen = tuple(sorted(set.intersection(*(set(p.layers) for p in parts))))
        if not chosen:
            raise ValueError("The states to be joined have no layer in common.")
        keys = [f"{kind}.{i}" for i in chosen for kind in ("layer", "norm")]
        memory = {key: torch.cat([p._read(key) for p in parts]) for key in keys}
        of: list[int] = []
        for part in parts:
            start = of[-1] + 1 if of else 0
            of += [start + n for n in part.text_of or range(part.n_texts)]
        several = None if all(part.text_of is None for part in parts) else tuple(of)
        return cls(parts[0].model, chosen, len(of), parts[0].position, None, memory, several)

    def __repr__(self) -> str:
        where = "in memory" if self.shards is None else f"in {self.shards}"
        layers = f"{self.layers[0]}..{self.layers[-1]}" if len(self.layers) > 2 else ", ".join(map(str, self.layers))
        return f"Activations({self.n_texts} texts, layers {layers} of {self.model}, position {self.position}, {where})"
