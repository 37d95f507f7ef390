"""What a plan is meant to change, measured on held-out items: words, choices between texts, or a judge's view of rollouts.

An effect has items and a score for each of them, higher where the model is nearer to the positive side. What a receipt
reports is the score steered towards minus the score steered away, so the unit is that of the score. Three kinds are here;
anything with the same four members will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..ndif.argument import host_of
from ..steering.plan import SteeringPlan
from ..texts.texts import Text, encode_continued, tokenizer_of
from .continuations import Scorer
from .continuations import Text as Scored
from .rollouts import completions, rollouts
from .rows import Encoded, log_odds
from .scoring import ByText, Steering, by_text, encoded, in_rows, likelihoods

if TYPE_CHECKING:
    from ..ndif.host import Remote


@runtime_checkable
class Effect(Protocol):
    """What `measure` and `receipt` need of an effect."""

    @property
    def unit(self) -> str:
        """Of the score."""
        ...

    def __len__(self) -> int:
        """How many items."""
        ...

    def __getitem__(self, key: slice) -> Effect:
        """Some of the items."""
        ...

    def score(
        self,
        model: Any,
        plans: Sequence[SteeringPlan | ByText],
        *,
        rows: int | None = None,
        remote: bool | str | Remote = False,
        progress: bool = False,
    ) -> Tensor:
        """Scores `[1 + plan, item]`, in `unit`; row 0 is unsteered.

        Args:
            model: the target.
            plans: those to score, at their own strengths; what steers each text in its own way, such as a `LiveExpert`, too.
            rows: plans a forward (`scoring.in_rows`); as many as fit into memory if None.
            remote: True, "http://...", or a `Remote`: run on NDIF.
            progress: show a progress bar.
        """
        ...


def _told(prompt: Text, instruction: str) -> Text:
    """A prompt after an instruction: a system message of a chat, a paragraph before a string."""
    if isinstance(prompt, str):
        return f"{instruction}\n\n{prompt}" if prompt else f"{instruction}\n\n"
    return [{"role": "system", "content": instruction}, *prompt]


class _OfPrompts:
    """What effects share whose items are prompts."""

    prompts: Sequence[Text]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, key: slice) -> Any:
        return replace(cast("Any", self), prompts=self.prompts[key])

    def instructed(self, instruction: str) -> Any:
        """The same with an instruction before every prompt."""
        return replace(cast("Any", self), prompts=[_told(p, instruction) for p in self.prompts])


@dataclass(frozen=True)
class Words(_OfPrompts):
    """Log-odds, in nats, of positive over negative next words after each prompt.

    Of each word the first token after a space counts.

    Attributes:
        prompts: unfinished texts, strings or chat messages, held out from every fit.
        positive: words whose probability the plan should raise.
        negative: words whose probability it should lower.

    Raises:
        ValueError: no prompts, or no words of one side, or one string in place of a list.
    """

    prompts: Sequence[Text]
    positive: Sequence[str]
    negative: Sequence[str]
    unit = "nats of log-odds"

    def __post_init__(self) -> None:
        for name in ("prompts", "positive", "negative"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"Words needs a list of {name}, but got one string: write [{value!r:.40}].")
            value = tuple(value) if name == "prompts" else tuple(word.strip() for word in value)
            if not value:
                raise ValueError(f"Words needs {name}, but there are none.")
            object.__setattr__(self, name, value)

    def score(
        self,
        model: Any,
        plans: Sequence[SteeringPlan | ByText],
        *,
        rows: int | None = None,
        remote: bool | str | Remote = False,
        progress: bool = False,
    ) -> Tensor:
        """Log-odds `[1 + plan, prompt]`, nats; row 0 is unsteered. Arguments as in `Effect.score`.

        Raises:
            ValueError: a positive and a negative word begin with the same token, or a plan has strengths a row.
        """
        tokenizer = tokenizer_of(model)
        up, down = word_ids(tokenizer, self.positive), word_ids(tokenizer, self.negative)
        if set(up) & set(down):
            raise ValueError(
                "Some positive and negative words begin with the same token: choose words that differ there."
            )
        texts = [text._replace(prompt=len(text.ids)) for text in encoded(model, list(self.prompts))]
        settings: dict[str, Any] = {"rows": rows, "remote": remote, "progress": progress, "label": "effect on prompts"}
        steering = by_text(plans, self.prompts)
        found = in_rows(model, steering, texts, [1] * len(texts), log_odds(up, down), **settings)
        return torch.stack([score for (score,) in found], 1)


def word_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The tokens that `words` begin with after a space, ascending, each once."""
    found = set()
    for word in words:
        ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        # a tokenizer that itself puts a space before a text has a token for the other one
        found.add(next((i for i in ids if tokenizer.decode([i]).strip()), ids[0]))
    return sorted(found)


@dataclass(frozen=True)
class Choices:
    """Log-likelihood of a positive minus that of a negative text after the same prompt, nats a token.

    An item is one question with two answers (A/B questions, "Yes" and "No" to a persona statement, right and wrong option), or,
    with an empty prompt, two statements. A score above 0 means that the model prefers the positive one.

    Attributes:
        items: (prompt, positive, negative); continuations usually begin with a space.
        per_token: divide each log-likelihood by its number of tokens; False compares the sums.

    Raises:
        ValueError: no items.
    """

    items: Sequence[tuple[Text, str, str]]
    per_token: bool = True

    def __post_init__(self) -> None:
        items = tuple((p, a, b) for p, a, b in self.items)
        if not items:
            raise ValueError("Choices needs items, but there are none.")
        object.__setattr__(self, "items", items)

    @classmethod
    def statements(cls, positive: Iterable[str], negative: Iterable[str]) -> Choices:
        """Items of two unconditional statements each.

        Raises:
            ValueError: not as many negative as positive ones.
        """
        up, down = list(positive), list(negative)
        if len(up) != len(down):
            raise ValueError(
                f"As many positive as negative statements are needed, but there are {len(up)} and {len(down)}."
            )
        return cls([("", a, b) for a, b in zip(up, down, strict=True)])

    @property
    def unit(self) -> str:
        """Of the score."""
        return "nats a token" if self.per_token else "nats"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: slice) -> Choices:
        return replace(self, items=self.items[key])

    def instructed(self, instruction: str) -> Choices:
        """The same with an instruction before every prompt."""
        return replace(self, items=[(_told(p, instruction), a, b) for p, a, b in self.items])

    def score(
        self,
        model: Any,
        plans: Sequence[SteeringPlan | ByText],
        *,
        rows: int | None = None,
        remote: bool | str | Remote = False,
        progress: bool = False,
    ) -> Tensor:
        """Differences of log-likelihood `[1 + plan, item]`, in `unit`; row 0 is unsteered. Arguments as in `Effect.score`.

        Raises:
            ValueError: a text of no tokens that the model predicts, or a plan with strengths a row.
        """
        asked = [(prompt, text) for prompt, *both in self.items for text in both]
        known, steering = _continued_under(model, plans, asked)
        found = likelihoods(model, steering, known, rows=rows, remote=remote, progress=progress)
        if self.per_token:
            found = found / torch.tensor([len(text.ids) - text.prompt for text in known])
        return found[:, 0::2] - found[:, 1::2]


@dataclass(frozen=True)
class MultipleChoice:
    """Questions with several options, one of which is right.

    The score is the log-likelihood of the right option minus that of the best wrong one, so a question is answered rightly
    where it is above 0, and the mean of `score > 0` is the accuracy (lm-eval's `acc_norm` with `per="character"`, `acc` with
    `per="text"`).

    Attributes:
        items: (prompt, options, number of the right option, from 0); options usually begin with a space.
        per: what a log-likelihood is divided by: the option's length in `character`s (without the space before it) or `token`s,
            or nothing (`text`).

    Raises:
        ValueError: no items, an item of fewer than two options or whose right one is none of them, or an unknown `per`.
    """

    items: Sequence[tuple[Text, Sequence[str], int]]
    per: str = "character"

    def __post_init__(self) -> None:
        items = tuple((prompt, tuple(options), int(right)) for prompt, options, right in self.items)
        if not items:
            raise ValueError("MultipleChoice needs items, but there are none.")
        for number, (_, options, right) in enumerate(items):
            if len(options) < 2 or not 0 <= right < len(options):
                raise ValueError(
                    f"Item {number} has {len(options)} options, and number {right} is to be the right one: give two or more, "
                    "counted from 0."
                )
        if self.per not in ("character", "token", "text"):
            raise ValueError(f'per is {self.per!r}: it must be "character", "token" or "text".')
        object.__setattr__(self, "items", items)

    @property
    def unit(self) -> str:
        """Of the score."""
        return "nats" if self.per == "text" else f"nats a {self.per}"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: slice) -> MultipleChoice:
        return replace(self, items=self.items[key])

    def instructed(self, instruction: str) -> MultipleChoice:
        """The same with an instruction before every prompt."""
        return replace(self, items=[(_told(p, instruction), options, right) for p, options, right in self.items])

    def options(
        self,
        model: Any,
        plans: Sequence[SteeringPlan | ByText],
        *,
        rows: int | None = None,
        remote: bool | str | Remote = False,
        progress: bool = False,
    ) -> list[Tensor]:
        """For each item the log-likelihoods `[1 + plan, option]`, in `unit`; row 0 is unsteered. Arguments as in `Effect.score`.

        Raises:
            ValueError: an option of no tokens that the model predicts, or a plan with strengths a row.
        """
        asked = [(prompt, option) for prompt, options, _ in self.items for option in options]
        known, steering = _continued_under(model, plans, asked)
        late = [one for one in steering if not isinstance(one, SteeringPlan) and not touches_context(one, known)]
        if host_of(remote) is None and len(late) == len(steering):
            found = _with_shared_contexts(model, late, known, rows or 64, progress)
        else:
            found = likelihoods(model, steering, known, rows=rows, remote=remote, progress=progress)
        length = {
            "character": [len(text.removeprefix(" ")) for _, text in asked],
            "token": [len(text.ids) - text.prompt for text in known],
            "text": [1] * len(asked),
        }[self.per]
        return list((found / torch.tensor(length)).split([len(options) for _, options, _ in self.items], 1))

    def score(
        self,
        model: Any,
        plans: Sequence[SteeringPlan | ByText],
        *,
        rows: int | None = None,
        remote: bool | str | Remote = False,
        progress: bool = False,
    ) -> Tensor:
        """How far the right option is ahead `[1 + plan, item]`, in `unit`; row 0 is unsteered. Arguments as in `Effect.score`.

        Raises:
            ValueError: as `options`.
        """
        found = self.options(model, plans, rows=rows, remote=remote, progress=progress)
        return torch.stack([ahead(x, right) for x, (_, _, right) in zip(found, self.items, strict=True)], 1)


def touches_context(plans: Sequence[SteeringPlan], texts: Sequence[Encoded]) -> bool:
    """Whether plans, one a text, steer any token of a prompt but its last one."""
    for plan, text in zip(plans, texts, strict=True):
        for v in plan.vectors:
            within = v.where == "last_prompt" or (v.where == "completion" and v.from_step == 0)
            if not within and (v.at is None or any(place < text.prompt - 1 for row in v.at for place in row)):
                return True
    return False


def _with_shared_contexts(
    model: Any, steering: Sequence[Sequence[SteeringPlan]], known: list[Encoded], rows: int, progress: bool
) -> Tensor:
    """As `likelihoods`, where plans begin at a prompt's last token: what is before it is read once for all options and plans."""
    texts = [Scored(tuple(t.ids[:-1]), t.prompt, len(t.ids) - t.prompt, (t.ids[-1],)) for t in known]
    found = torch.zeros(1 + len(steering), len(known))
    # unsteered texts are rows beside the first plans': the same without any strength
    own = [0.0 * plan for plan in steering[0]] + [plan for arm in steering for plan in arm] if steering else None
    with tqdm(total=found.numel(), desc="log-likelihoods", unit="text", disable=not progress) as bar:

        def done(text: int, values: Tensor) -> None:
            found[text // len(known), text % len(known)] = float(values[0].sum())
            bar.update()

        Scorer(model, None)(texts * len(found), rows, done, own)
    return found


def ahead(options: Tensor, right: int) -> Tensor:
    """How far the right option is ahead of the best wrong one, `[row]`, from log-likelihoods `[row, option]`."""
    wrong = torch.cat([options[:, :right], options[:, right + 1 :]], 1)
    return options[:, right] - wrong.amax(1)


def _continued_under(
    model: Any, plans: Sequence[SteeringPlan | ByText], asked: Sequence[tuple[Text, str]]
) -> tuple[list[Encoded], list[Steering]]:
    """Ids of prompts with their continuations, and what steers them."""
    known = [_continued(model, prompt, text) for prompt, text in asked]
    return known, by_text(plans, [prompt for prompt, _ in asked], [text for _, text in asked])


def _continued(model: Any, prompt: Text, text: str) -> Encoded:
    """Ids of prompt and continuation. Tokens are those of the whole where they begin with the prompt's."""
    if prompt == "":
        (whole,) = encoded(model, [text])
        # without a token before it nothing predicts the first one
        made = whole._replace(prompt=max(1, whole.prefix))
    else:
        made = Encoded(*encode_continued(tokenizer_of(model), prompt, text))
    if len(made.ids) <= made.prompt:
        raise ValueError(f"The text {text!r:.60} has no token that the model predicts: give a longer one.")
    return made


@dataclass(frozen=True)
class Judged(_OfPrompts):
    """A judge's view of greedy continuations.

    Attributes:
        prompts: unfinished texts, strings or chat messages, held out from every fit.
        judge: from a list of texts (the continuations alone) to a number each, higher for the positive side; a fitted
            `SentenceJudge`, or any callable.
        max_new_tokens: length of a continuation.
        unit: of the judge's numbers.

    Raises:
        ValueError: no prompts.
    """

    prompts: Sequence[Text]
    judge: Callable[[list[str]], Any]
    max_new_tokens: int = 24
    unit: str = "the judge's"

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not self.prompts:
            raise ValueError("Judged needs prompts, but there are none.")

    def score(
        self,
        model: Any,
        plans: Sequence[SteeringPlan | ByText],
        *,
        rows: int | None = None,
        remote: bool | str | Remote = False,
        progress: bool = False,
    ) -> Tensor:
        """What the judge makes of each continuation, `[1 + plan, prompt]`; row 0 is unsteered. Arguments as in `Effect.score`.

        Raises:
            ValueError: the judge gives another number of scores than texts.
        """
        found = []
        for plan in (None, *plans):
            if plan is None or isinstance(plan, SteeringPlan):
                made = rollouts(model, list(self.prompts), plan, self.max_new_tokens, remote=remote)
                said = completions(model, made)
            else:
                said = plan.generate(list(self.prompts), self.max_new_tokens)
            scores = torch.as_tensor(self.judge(said), dtype=torch.float32).flatten()
            if len(scores) != len(self):
                raise ValueError(f"The judge gave {len(scores)} scores for {len(self)} texts: it must give one each.")
            found.append(scores)
        return torch.stack(found)
