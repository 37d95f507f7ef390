"""The models of the study, their untrained copies, and their states, each read once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import expertsteer_nnsight as es
from expertsteer_nnsight.models.packaged import load
from expertsteer_nnsight.states.activations import Activations
from expertsteer_nnsight.texts.texts import Position, texts_hash

FILES = {"gemma": "gemma-3-270m", "smol": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}
PAIRS = {"gemma-smol": ("gemma", "smol"), "smol-gemma": ("smol", "gemma"), "qwen-smol": ("qwen", "smol")}


@cache
def model(name: str) -> Any:
    """A model by its short name; `gemma~2` is Gemma with the random weights of seed 2."""
    base, _, seed = name.partition("~")
    if seed:
        return es.untrained_like(model(base), int(seed))
    return load(FILES[base])


class States:
    """States of texts, kept on disk: `states("gemma~1", texts)`.

    Args:
        folder: where shards are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, texts: list[Any], ends: Any = None, position: Position = "last") -> Activations:
        """States of every layer at a position of each text, and those at `ends` within the texts."""
        key = texts_hash([*texts, *map(str, ends or ())])
        folder = self.folder / f"{'' if position == 'last' else f'{position}-'}{name}-{key}"
        return es.collect(model(name), texts, position=position, ends=ends, cache=folder, progress=False)
