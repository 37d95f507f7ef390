"""What the command line's arguments mean: plans, models, hosts, texts and effects from files and names."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import expertsteer_nnsight as es
from expertsteer_nnsight.texts import as_texts


def plan_of(path: Path, dose: float | None = None) -> es.SteeringPlan:
    """A plan's file, at a dose if one is named."""
    plan = es.SteeringPlan.load(path)
    return plan if dose is None else plan.at_dose(dose)


def plan_for(plan: es.SteeringPlan, wrapped: Any, model: str | None) -> es.SteeringPlan:
    """The plan as it is, or for the model that was named in place of its target."""
    if model is None:
        return plan
    plan.check(wrapped, any_id=True)  # a model of any name, but of the plan's width and depth
    return es.SteeringPlan(plan.vectors, wrapped, plan.info)


def model_of(name: str, remote: str | None) -> Any:
    """The model that a name means, with its weights unless it is remote."""
    from .packaged_models import MODELS, load

    known = [packaged for packaged in MODELS if "MiniLM" not in packaged]  # which writes no text
    near = [] if "/" in name or name in known or Path(name).exists() else get_close_matches(name, known, 1, 0.85)
    if near:
        raise ValueError(f"There is no model {name!r}: is {near[0]} meant?")
    try:
        return load(name, here=remote is None)
    except OSError as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{name!r} is no folder and no packaged model ({', '.join(known)}), and the hub did not give it: {said}"
        ) from None


def target_of(plan: es.SteeringPlan, model: str | None) -> str:
    """The name of the model to steer: the one that was named, else the plan's."""
    named = model or (plan.target.id if plan.target else None)
    if not named:
        raise ValueError("The plan does not say which model it is for: name it with --model.")
    return named


def remote_of(remote: str | None) -> Any:
    """The `remote=` that an option means."""
    return False if remote is None else True if remote == "ndif" else remote


def remotes_of(remote_expert: str | None, remote_target: str | None) -> dict[str, Any]:
    """The same of both options, as arguments of `fit`."""
    return {"remote_expert": remote_of(remote_expert), "remote_target": remote_of(remote_target)}


def texts_of(pairs: Path | None, anchors: Path | None) -> tuple[es.ContrastPairs, list[Any]]:
    """Contrast pairs and anchors, from files or the package's."""
    labelled = es.example("sentiment_pairs").split("train") if pairs is None else es.ContrastPairs.from_jsonl(pairs)
    return labelled, list(es.example("general")) if anchors is None else as_texts(anchors)


def neutral_of(path: Path | None) -> list[Any]:
    """Neutral texts, from a file or the package's."""
    return list(es.example("sentiment_probe")["neutral_texts"][:8]) if path is None else as_texts(path)


def effect_of(path: Path | None) -> Any:
    """The effect that a file describes, or the package's."""
    try:
        found = es.example("sentiment_probe") if path is None else json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"An effect's file holds an object, but {path} a {type(found).__name__}.")
    if "items" in found:
        wrong = next((item for item in found["items"] if isinstance(item, str) or len(item) != 3), None)
        if wrong is not None:
            raise ValueError(f"An item of {path} is a prompt, a text and the other text, but one is {wrong!r:.60}.")
        return es.Choices([tuple(item) for item in found["items"]])
    prompts = found.get("prompts", found.get("test_prompts"))
    if prompts is None or not {"positive_words", "negative_words"} <= set(found):
        raise ValueError(
            f"An effect's file needs prompts, positive_words and negative_words, or items, but {path} has {sorted(found)}."
        )
    return es.Words(prompts, found["positive_words"], found["negative_words"])
