"""Several experts that read along: each prompt is steered by the expert that is surest of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..measure.answers import EVERY_PROMPT, AnswersReceipt
from ..measure.effects import MultipleChoice
from ..models.identity import ModelIdentity
from ..steering.plan import SteeringPlan
from ..texts.texts import Text, as_texts
from .live_expert import LiveExpert, _Setting


class SurestExpert:
    """Live experts of one target, of which the surest steers each prompt, as it would alone.

    The surest expert is the one whose next token after the prompt has the least entropy, in nats; among equals it is the first.
    Experts of other vocabularies and trainings are sure to other degrees, so that one may steer more often than it should: a
    receipt has each of them on every prompt beside the choice.

    An effect takes it in place of a plan: `MultipleChoice(items).score(target, [surest])`. Each prompt costs a second forward of
    every expert, for the entropies.

    Args:
        experts: fitted ones, of the same target, that read different models.

    Raises:
        NotFittedError: one is not fitted.
        ValueError: none is given, one has no models or is a TransformerBridge, they steer different models, or two read the same.
    """

    def __init__(self, experts: Sequence[LiveExpert]) -> None:
        self.experts = list(experts)
        if not self.experts:
            raise ValueError("There is no live expert to choose from: give at least one.")
        for number, live in enumerate(self.experts):
            live._setting()
            if type(live.expert_._module).__name__ == "TransformerBridge":
                raise ValueError(
                    f"Live expert {number} reads a TransformerBridge, which gives no next-token entropies here: wrap the model "
                    "with nnsight itself."
                )
            if live.target_._module is not self.target_._module:
                raise ValueError(
                    f"Live expert {number} steers another model than the first: fit or load them with one target."
                )
            if any(live.expert_._module is other.expert_._module for other in self.experts[:number]):
                raise ValueError(
                    f"Live expert {number} reads the same model as one before it, so both are equally sure of every prompt: give "
                    "live experts of different models."
                )

    @property
    def target_(self) -> Any:
        """The wrapped model that they steer."""
        return self.experts[0].target_

    def surest(self, prompts: Any) -> list[int]:
        """The number of the expert that steers each prompt.

        Args:
            prompts: strings or chat messages.

        Raises:
            RemoteFailure: an expert is remote and could not be read.
        """
        return self._chosen(self._settings(), as_texts(prompts))

    def plan(self, prompts: Any) -> SteeringPlan:
        """As `LiveExpert.plan`; in each row the vectors of the prompt's surest expert alone have strength."""
        texts, settings = as_texts(prompts), self._settings()
        chosen = self._chosen(settings, texts)
        plans = [
            setting.plan(texts, heard=mine)
            for setting, mine in zip(settings, self._heard(settings, texts), strict=True)
        ]
        info = {"live_experts": [plan.info for plan in plans], "surest": chosen}
        return SteeringPlan([v for plan in plans for v in plan.vectors], self.target_, info, plans[0].prompts)

    def for_texts(self, prompts: Sequence[Text], continuations: Sequence[str] | None = None) -> list[SteeringPlan]:
        """As `LiveExpert.for_texts`."""
        settings = self._settings()
        heard = self._heard(settings, prompts)
        each = [s.for_texts(prompts, continuations, heard=mine) for s, mine in zip(settings, heard, strict=True)]
        target = ModelIdentity.of(self.target_)
        return [SteeringPlan([v for plan in plans for v in plan.vectors], target) for plans in zip(*each, strict=True)]

    def generate(
        self, prompts: Any, max_new_tokens: int = 40, *, batch_size: int = 32, do_sample: bool = False
    ) -> list[str]:
        """As `LiveExpert.generate`, each prompt with its surest expert."""
        texts, settings = as_texts(prompts), self._settings()
        said: dict[int, str] = {}
        chosen = self._chosen(settings, texts)
        for number, setting in enumerate(settings):
            mine = [i for i, k in enumerate(chosen) if k == number]
            if mine:
                some = [texts[i] for i in mine]
                new = setting.generate(some, max_new_tokens, batch_size=batch_size, do_sample=do_sample)
                said.update(zip(mine, new, strict=True))
        return [said[i] for i in range(len(texts))]

    def receipt(
        self, questions: MultipleChoice, anchors: Sequence[Any], *, cache: str | Path | None = None, **settings: Any
    ) -> AnswersReceipt:
        """Compares it with the controls of its experts, each on the questions of which that expert is surest.

        Beside them is each expert on every prompt, which tells what the choice is worth.

        Args:
            questions: held-out ones.
            anchors: for each expert, those of its fit.
            cache: folder for the anchors' activations, with a folder for each expert in it.
            settings: further arguments of `live_receipt`.

        Raises:
            ValueError: not one set of anchors for each expert, an expert that is surest of one prompt alone, or as `live_receipt`.
        """
        if len(anchors) != len(self.experts):
            raise ValueError(
                f"{len(self.experts)} live experts need as many sets of anchors, but {len(anchors)} were given."
            )
        chosen = self.surest([prompt for prompt, _, _ in questions.items])
        parts: list[tuple[list[int], AnswersReceipt]] = []
        notes = []
        for number, (live, mine) in enumerate(zip(self.experts, anchors, strict=True)):
            asked = [i for i, k in enumerate(chosen) if k == number]
            notes.append(f"{self._name(number)} is the surest of {len(asked)} of {len(chosen)} questions")
            if asked:
                some = replace(questions, items=[questions.items[i] for i in asked])
                made = live.receipt(some, mine, cache=None if cache is None else Path(cache) / str(number), **settings)
                notes += [f"{self._name(number)}: {note}" for note in made.notes]
                parts.append((asked, made))
        shared = [arm for arm in parts[0][1].answers if all(arm in made.answers for _, made in parts)]
        found = {arm: {i: given for asked, made in parts for i, given in zip(asked, made.answers[arm], strict=True)}
                 for arm in shared}  # fmt: skip
        answers = {arm: [given[i] for i in range(len(chosen))] for arm, given in found.items()}
        every = questions.options(self.target_, self.experts, remote=self.experts[0].remote_target_)
        for number in range(len(self.experts)):
            answers[f"{EVERY_PROMPT}{self._name(number)}"] = [int(x[1 + number].argmax()) for x in every]
        return AnswersReceipt(answers, [right for _, _, right in questions.items], questions.unit, notes)

    def _name(self, number: int) -> str:
        name = self.experts[number].info_["expert"]["id"]
        return f"live expert {number}" + (f" ({name})" if name else "")

    def _settings(self) -> list[_Setting]:
        return [live._setting() for live in self.experts]

    @staticmethod
    def _chosen(settings: Sequence[_Setting], texts: Sequence[Text]) -> list[int]:
        sure = [setting.read.expert_entropies(texts).tolist() for setting in settings]
        return [min(range(len(sure)), key=lambda k, i=i: sure[k][i]) for i in range(len(texts))]

    def _heard(self, settings: Sequence[_Setting], texts: Sequence[Text]) -> list[list[bool]]:
        """For each expert, the prompts that it steers: those of which it is the surest, less those that its gate leaves alone."""
        chosen = self._chosen(settings, texts)
        through = [setting.heard(texts, texts) for setting in settings]
        return [[k == number and on for k, on in zip(chosen, mine, strict=True)] for number, mine in enumerate(through)]
