"""What a live expert must be compared with: the same injection with nothing, or something else, of the expert in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import clone

from ..measure.answers import AnswersReceipt
from ..measure.effects import MultipleChoice
from ..measure.rollouts import completions, rollouts
from ..models.identity import ModelIdentity
from ..models.untrained import untrained_like
from ..steering.plan import SteeringPlan
from ..texts.texts import Text, as_texts, once, texts_hash

if TYPE_CHECKING:
    from ..measure.scoring import ByText
    from .live_expert import LiveExpert, _Setting

TOLD = "A colleague answered the next question with:{answer}\n\n"
LATER = 0.13  # of the target's depth: how far behind the edited layer the target's own activation is taken


def live_receipt(
    live: LiveExpert,
    questions: MultipleChoice,
    anchors: Any,
    *,
    untrained: int = 3,
    told: str | None = TOLD,
    cache: str | Path | None = None,
    progress: bool = True,
) -> AnswersReceipt:
    """A live expert, its controls, and what else the expert could be used for, on the same questions.

    Controls, at the same layer, amount and places: `another prompt` (the expert reads another item's prompt, with this item's
    options where it follows), `untrained` (the expert's shape with random weights and a map of its own, for each seed), `mean` (of
    the mapped activations over the questions), and `own layer` (the target's own later layer in the expert's place). Besides:
    the `expert alone`, the `ensemble` (mean of both models' log-likelihoods), and the target that is `told the expert's answer`.

    Args:
        live: a fitted one. Its layers and amount must have been chosen on other items than these.
        questions: held-out ones.
        anchors: those of its fit, on which the controls' maps are fitted.
        untrained: how many seeds.
        told: what stands before the prompt to tell the target the expert's answer, with `{answer}` in it; None leaves that out.
        cache: folder for the anchors' activations, the same as in `fit`, so that the target does not read them again.
        progress: show progress bars.

    Raises:
        NotFittedError: `live` is not fitted.
        ValueError: fewer than two different prompts, or as `live_arms`.
        RemoteFailure: a host, a key or a model cannot be used, or a job failed.
    """
    setting = live._setting()  # its models are read once for all that it is compared with
    _check_questions(questions)
    others = live_arms(live, anchors, untrained=untrained, cache=cache, progress=progress, setting=setting)
    arms = {"live": setting, **others}
    answers = answered(live, arms, questions, told, progress=progress)
    notes = []
    if live.gate_ is not None:
        prompts = [prompt for prompt, _, _ in questions.items]
        through = setting.heard(prompts, prompts)
        notes.append(
            f"the gate let the expert steer {sum(through)} of {len(through)} questions, and every control the same ones"
        )
    known = set(live.info_.get("validation", {}).get("prompts", ()))
    again = sum(texts_hash([prompt]) in known for prompt, _, _ in questions.items)
    if again:
        notes.append(f"{again} of the questions are among those that layers and amount were chosen on")
    if "own layer" not in arms:
        notes.append("the target has no later layer than the edited one, so the arm own layer is missing")
    return AnswersReceipt(answers, [right for _, _, right in questions.items], questions.unit, notes)


def _check_questions(questions: MultipleChoice) -> None:
    """Raises ValueError where no prompt has another."""
    distinct = len({str(prompt) for prompt, _, _ in questions.items})
    if distinct < 2:
        raise ValueError(
            f"There are {distinct} different prompts, so the expert has no other to read: give more questions."
        )


def live_arms(
    live: LiveExpert,
    anchors: Any,
    *,
    untrained: int = 3,
    cache: str | Path | None = None,
    progress: bool = True,
    setting: _Setting | None = None,
) -> dict[str, ByText]:
    """The controls of a live expert by name, as `live_receipt` tells them, with its arguments.

    `setting` is the live expert as it stands in the receipt, whose reading they share.

    Raises:
        ValueError: other anchors than those of the fit, or a live expert from a file whose aligner the file does not keep.
    """
    setting = live._setting() if setting is None else setting
    texts = once(as_texts(anchors))  # `fit` has said so
    if live.info_.get("data", {}).get("anchors_hash") != texts_hash(texts):
        raise ValueError("The live expert was fitted on other anchors than these: give those that it was made of.")
    if not live.aligner_known_:
        raise ValueError(
            f"The live expert's file does not keep its aligner ({live.info_['settings']['aligner']}), so no control can be fitted "
            "like it: take the receipt of the one that was fitted, or fit it again."
        )
    ends = live._ends(live.expert_, texts)
    folder = None if cache is None else Path(cache)
    arms: dict[str, ByText] = {"another prompt": AnotherPrompt(live, setting=setting), "mean": Mean(live, setting)}

    def refitted(reader: Any, layers: Any, name: str, remote: Any = False) -> ByText:
        """The same live expert with another model in the expert's place, and maps of its own."""
        made: Any = clone(live)
        made.set_params(layers=layers, amount=live.amount_, gate=None)
        folders = (None, None) if folder is None else (folder / name, folder / "target")
        how = {"batch_size": live._batch_size, "remote_target": live.remote_target_, "progress": progress}
        made._fit(reader, live.target_, texts, ends, folders, remote_expert=remote, **how)
        return made if live.gate_ is None else SamePrompts(setting, made)

    for seed in range(1, untrained + 1):
        arms[f"untrained, seed {seed}"] = refitted(
            untrained_like(live.expert_, seed), live.layers_, f"untrained-{seed}"
        )
    depth = ModelIdentity.of(live.target_).n_layers
    later = [(min(depth - 1, t + max(1, round(LATER * depth))), t) for _, t in live.layers_]
    if all(own > t for own, t in later):
        arms["own layer"] = refitted(live.target_, later, "own", live.remote_target_)
    return arms


def answered(
    live: LiveExpert,
    arms: Mapping[str, ByText],
    questions: MultipleChoice,
    told: str | None = TOLD,
    *,
    progress: bool = True,
) -> dict[str, list[int]]:
    """The number of the option that each question is answered with, by arm, and by what else the expert could be used for.

    Args:
        live: whose models are asked.
        arms: what steers the target; they share forwards where layers and places are alike.
        questions: with two or more different prompts.
        told: as in `live_receipt`.
        progress: show progress bars.

    Raises:
        ValueError: fewer than two different prompts.
    """
    _check_questions(questions)
    how: dict[str, Any] = {"remote": live.remote_target_, "progress": progress}
    steered = questions.options(live.target_, list(arms.values()), **how)
    alone = [x[0] for x in questions.options(live.expert_, [], remote=live.remote_, progress=progress)]
    answers = {name: [int(x[row].argmax()) for x in steered] for row, name in enumerate(("unsteered", *arms))}
    answers["expert alone"] = [int(x.argmax()) for x in alone]
    answers["ensemble"] = [int((x[0] + y).argmax()) for x, y in zip(steered, alone, strict=True)]
    if told is not None and all(isinstance(prompt, str) for prompt, _, _ in questions.items):
        items = [
            (told.format(answer=options[best]) + str(prompt), options, right)
            for (prompt, options, right), best in zip(questions.items, answers["expert alone"], strict=True)
        ]
        spoken = replace(questions, items=items).options(live.target_, [], **how)
        answers["told the expert's answer"] = [int(x[0].argmax()) for x in spoken]
    return answers


class AnotherPrompt:
    """A live expert that reads another prompt than the target, of the same set, with the target's own continuation.

    Args:
        live: a fitted one.
        random_state: seed of who reads what; nobody reads its own.
        setting: of the live expert, where its reading is shared.
    """

    def __init__(self, live: LiveExpert, random_state: int = 0, setting: _Setting | None = None) -> None:
        self.setting, self.random_state = live._setting() if setting is None else setting, random_state

    def _reads(self, prompts: Sequence[Text]) -> list[Text]:
        distinct = list({str(prompt): prompt for prompt in prompts}.values())
        if len(distinct) < 2:
            raise ValueError("There is one prompt alone, so the expert has no other to read: give more.")
        order = np.random.default_rng(self.random_state).permutation(len(distinct)).tolist()
        other = {str(distinct[i]): distinct[j] for i, j in zip(order, order[1:] + order[:1], strict=True)}
        return [other[str(prompt)] for prompt in prompts]

    def for_texts(self, prompts: Sequence[Text], continuations: Sequence[str] | None = None) -> list[SteeringPlan]:
        """As `LiveExpert.for_texts`; the same prompts pass the gate as when the expert reads them."""
        heard = self.setting.heard(prompts, prompts)
        return self.setting.for_texts(prompts, continuations, self._reads(prompts), heard)

    def generate(self, prompts: Sequence[Text], max_new_tokens: int) -> list[str]:
        """As `LiveExpert.generate`; where it follows, the other prompt with what is written after this one."""
        heard = self.setting.heard(prompts, prompts)
        return self.setting.generate(prompts, max_new_tokens, self._reads(prompts), heard)


class SamePrompts:
    """A control that steers the prompts that a live expert's gate lets through, so that both steer the same ones.

    Args:
        setting: of a fitted one with a gate.
        control: another one without.
    """

    def __init__(self, setting: _Setting, control: LiveExpert) -> None:
        self.setting, self.control = setting, control

    def for_texts(
        self, prompts: Sequence[Text], continuations: Sequence[str] | None = None, reads: Sequence[Text] | None = None
    ) -> list[SteeringPlan]:
        """As `LiveExpert.for_texts`."""
        heard = self.setting.heard(prompts, prompts if reads is None else reads)
        return self.control._setting().for_texts(prompts, continuations, reads, heard)

    def generate(self, prompts: Sequence[Text], max_new_tokens: int) -> list[str]:
        """As `LiveExpert.generate`."""
        heard = self.setting.heard(prompts, prompts)
        return self.control._setting().generate(prompts, max_new_tokens, None, heard)


class Mean:
    """A live expert's injection with the mean over all prompts in place of each prompt's own activation.

    Args:
        live: a fitted one.
        setting: of the live expert, where its reading is shared.
    """

    def __init__(self, live: LiveExpert, setting: _Setting | None = None) -> None:
        self.live, self.setting = live, live._setting() if setting is None else setting

    def for_texts(self, prompts: Sequence[Text], continuations: Sequence[str] | None = None) -> list[SteeringPlan]:
        """As `LiveExpert.for_texts`."""
        plans = self.setting.for_texts(prompts, continuations)
        means = [
            torch.cat([p.vectors[k].direction.reshape(-1, p.vectors[k].direction.shape[-1]) for p in plans]).mean(0)
            for k in range(len(plans[0].vectors))
        ]
        return [
            p.with_directions([m.expand(v.direction.shape) for m, v in zip(means, p.vectors, strict=True)])
            for p in plans
        ]

    def generate(self, prompts: Sequence[Text], max_new_tokens: int) -> list[str]:
        """As `LiveExpert.generate`.

        Raises:
            ValueError: the live expert follows what is written, of which there is no mean.
        """
        if self.live.follow:
            raise ValueError("A live expert that follows has no mean of what it will read: take follow=False.")
        plan = self.setting.plan(list(prompts))
        same = plan.with_directions([v.direction.mean(0).expand(v.direction.shape) for v in plan.vectors])
        how: dict[str, Any] = {"remote": self.live.remote_target_}
        return completions(self.live.target_, rollouts(self.live.target_, list(prompts), same, max_new_tokens, **how))
