"""Names that the tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TINY, BOS, SMOL = "lab/tiny-llama", "lab/tiny-expert", "lab/SmolLM2-135M-Instruct"


def hub_folder() -> Path:
    """Where the stand-in for the hub finds its models."""
    return Path(json.loads((Path(os.environ["NDIF_STACK_DIR"]) / "stack.json").read_text())["models"])
