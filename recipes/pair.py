"""The pair of models that the recipes run on, and one plan that they share.

    python -m recipes.pair        # fits the plan, once (about a minute), and prints it

The plan is the recommended one, for sentiment, of 400 general anchors, calibrated to 1 nat; it is kept in the user's cache.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import expertsteer_nnsight as es
from expertsteer_nnsight.packaged_models import cache_folder, model_path
from expertsteer_nnsight.texts import texts_hash
from recipes.steer_on_ndif import load

ANCHORS = 400


@functools.cache
def expert() -> Any:
    """Gemma-3-270M, out of its wheel."""
    return load(str(model_path("gemma-3-270m")), here=True)


@functools.cache
def target() -> Any:
    """SmolLM2-135M-Instruct, out of its wheel."""
    return load(str(model_path("SmolLM2-135M-Instruct")), here=True)


def neutral() -> list[str]:
    """Eight texts that have nothing to do with sentiment, on which strength is calibrated."""
    return list(es.example("sentiment_probe")["neutral_texts"][:8])


def words(prompts: int = 16) -> es.Words:
    """The effect: log-odds of positive over negative next words, on prompts that served for nothing else."""
    probe = es.example("sentiment_probe")
    return es.Words(probe["test_prompts"][:prompts], probe["positive_words"], probe["negative_words"])


def plan() -> es.SteeringPlan:
    """The shared plan; fitted if it is not in the cache."""
    pairs, anchors = es.example("sentiment_pairs").split("train"), es.example("general")[:ANCHORS]
    key = texts_hash([es.__version__, *pairs.texts, *anchors, *neutral()])[:12]
    path: Path = cache_folder() / "recipes" / f"plan-{key}.safetensors"
    if not path.exists():
        fitted = es.ExpertSteer.recommended().fit(expert(), target(), pairs, anchors)
        es.calibrate(fitted, target(), neutral()).save(path)
    return es.SteeringPlan.load(path)


if __name__ == "__main__":
    print(plan())
