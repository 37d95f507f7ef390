"""Names that the tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from expertsteer_nnsight import SteeringVector

REPOSITORY = Path(__file__).resolve().parents[2]
TINY, BOS, SMOL = "lab/tiny-llama", "lab/tiny-expert", "lab/SmolLM2-135M-Instruct"


def hub_folder() -> Path:
    """Where the stand-in for the hub finds its models."""
    return Path(json.loads((Path(os.environ["NDIF_STACK_DIR"]) / "stack.json").read_text())["models"])


def vector(model, layer, strength, seed=0, rows=None, **settings):
    """A random vector at about the norm of the model's residual stream."""
    width = model.config.hidden_size
    shape = (width,) if rows is None else (rows, width)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(layer, direction, strength, 50.0 if width == 576 else 3.0, **settings)
