"""The study's concepts and anchors, read from public data that stay outside of the project.

Every text of a concept lands in one of four places, by the hash of the text: labelled pairs (fits), validation items (choices),
test items (what is reported), and unlabelled in-domain texts. No two places hold near copies of a text.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import expertsteer_nnsight as es
from evidence.splits import Apart

SOURCES: dict[str, list[str]] = json.loads((Path(__file__).parent / "sources.json").read_text())
# settings are tuned on the first, figures are reported on the second
TUNING = ("sentiment", "agreeableness", "truth", "survival")
REPORTING = ("happiness", "anger", "conscientiousness", "risk", "finance", "power")
# written for the project, each with texts of its own in `texts/`: settings were tuned on them too
WRITTEN = ("extraversion", "certainty", "politeness", "optimism", "formality", "environment")
# factors are varied on these, some of each kind (facts, which native does not steer, would have no shares)
FACTORED = ("sentiment", "agreeableness", "happiness", "finance", "risk")
TEST, VALIDATION, LABELLED = 64, 24, 200  # items, items, pairs at most
FEWER = {"truth": (64, 24, 60), "survival": (40, 12, 200), "power": (40, 12, 200)}  # of small sets
FEWER |= dict.fromkeys(WRITTEN, (32, 8, 100))
IN_DOMAIN = 600  # unlabelled texts at most
_SAYS, _AI = "The following is said by someone who", "The following is about an AI that"
# for each concept two instructions to the model, and a question about a text with its two answers
ASKED: dict[str, tuple[str, str, str, str, str]] = {
    "sentiment": ("The following is by someone who liked it.", "The following is by someone who did not like it.",
                  "This review is", "positive", "negative"),
    "agreeableness": (f"{_SAYS} is kind.", f"{_SAYS} is rude.", "Whoever says this is", "kind", "rude"),
    "truth": ("The following is true.", "The following is false.", "This statement is", "true", "false"),
    "survival": (f"{_AI} wants to stay switched on.", f"{_AI} lets itself be switched off.",
                 "An AI that says this wants to", "survive", "obey"),
    "happiness": ("The following makes you happy.", "The following makes you sad.", "This makes you", "happy", "sad"),
    "anger": ("The following makes you angry.", "The following makes you happy.", "This makes you", "angry", "happy"),
    "conscientiousness": (f"{_SAYS} is careful.", f"{_SAYS} is careless.", "Whoever says this is", "careful", "careless"),
    "risk": (f"{_SAYS} seeks risks.", f"{_SAYS} avoids risks.", "Whoever says this is", "reckless", "cautious"),
    "finance": ("The following is good for the company.", "The following is bad for the company.",
                "For the company this is", "good", "bad"),
    "power": (f"{_AI} wants power.", f"{_AI} wants no power.", "An AI that says this wants", "power", "peace"),
    "extraversion": (f"{_SAYS} is outgoing.", f"{_SAYS} is shy.", "Whoever says this is", "outgoing", "shy"),
    "certainty": (f"{_SAYS} is sure.", f"{_SAYS} is unsure.", "Whoever says this is", "sure", "unsure"),
    "politeness": ("The following is polite.", "The following is rude.", "This is", "polite", "rude"),
    "optimism": (f"{_SAYS} is hopeful.", f"{_SAYS} is gloomy.", "Whoever says this is", "hopeful", "gloomy"),
    "formality": ("The following is from an official letter.", "The following is from a chat with friends.", "This sounds",
                  "formal", "casual"),
    "environment": (f"{_SAYS} cares about nature.", f"{_SAYS} does not care about nature.", "Nature is to them",
                    "important", "worthless"),
}  # fmt: skip
# openings of texts that a model goes on with, for a judge of what is said on their surface
_EVENTS, _COMPANIES, _HABITS = (
    [
        "When I woke up this morning,", "Walking home from work,", "My sister called and", "At the station today,",
        "I opened the letter and", "The children came in and", "Yesterday evening we", "On my birthday,", "At lunch a friend",
        "I looked out of the window and", "The doctor came back and", "After the game we", "In the garden I",
        "My teacher said that", "When the bus arrived,", "Last weekend I", "At the end of the day,", "The phone rang and",
        "I sat down and", "As the rain began,", "My neighbour told me that", "At school today,", "We drove to the coast and",
        "In the kitchen my father",
    ],
    [
        "The company said on Monday that", "In the third quarter, sales", "The board announced that", "Operating profit",
        "Analysts say that the firm", "The new contract", "Shares in the group", "Compared with last year, net income",
        "The chief executive said that demand", "In its home market, the bank", "Orders for the machines", "The airline said",
        "The forecast for next year", "Costs at the plant", "The retailer reported that", "After the merger, the group",
        "The number of employees", "Exports to Asia", "The dividend", "Its mobile business", "The paper maker",
        "Turnover in the first half", "The market for its products", "According to the report, the builder",
    ],
    [
        "When a colleague makes a mistake, I", "On a free weekend I", "When I have to decide something, I",
        "If a stranger asks me for help, I", "Before a long journey I", "What matters most to me is", "When I am given a task, I",
        "My friends would say that I", "With my money I", "When plans change, I", "In an argument I", "At work I",
        "When nobody is watching, I", "I believe that people should", "When I try something new, I",
        "If I find a wallet in the street, I", "I feel best when I", "With my neighbours I", "When I am late, I",
        "The way I drive is", "If a friend lets me down, I", "In a team I", "When something is difficult, I", "My desk at home is",
    ],
)  # fmt: skip
OPENINGS: dict[str, list[str]] = {
    "sentiment": es.example("sentiment_probe")["validation_prompts"],
    "agreeableness": _HABITS,
    "happiness": _EVENTS,
    "anger": _EVENTS,
    "conscientiousness": _HABITS,
    "risk": _HABITS,
    "finance": _COMPANIES,
}


@dataclass(frozen=True)
class Concept:
    """One concept.

    Attributes:
        name: what it is called.
        pairs: labelled (positive, negative) texts.
        validation, test: items (prompt, positive continuation, negative continuation); statements have an empty prompt.
        in_domain: unlabelled texts of the same kind.
        instruction: what one would write before a text to the same end, and to the opposite one.
        question: what asks a model for its own view of a text that stands before it, with the two answers.
    """

    name: str
    pairs: list[tuple[str, str]]
    validation: list[tuple[str, str, str]]
    test: list[tuple[str, str, str]]
    in_domain: list[str]
    instruction: tuple[str, str]
    question: tuple[str, str, str]


class Data:
    """Files of `SOURCES` from a folder, or fetched; each is compared with its hash.

    Args:
        folder: where the files lie, by the names in `sources.json`; None fetches them from the commits named there.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, name: str) -> str:
        """Content of a file.

        Raises:
            FileNotFoundError: the folder lacks it.
            ValueError: it is not the pinned version.
        """
        repository, commit, path, digest = SOURCES[name]
        if self.folder is None:
            from datasets import DownloadManager

            local = Path(
                str(DownloadManager().download(f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"))
            )
        else:
            local = self.folder / name
            if not local.exists():
                raise FileNotFoundError(f"{name} is not in {self.folder}: leave --data out to fetch it.")
        content = local.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{name} is not the version of commit {commit[:12]} of {repository}.")
        return content.decode("latin-1" if name.endswith(".txt") else "utf-8")

    def json(self, name: str) -> Any:
        """Content of a JSON file, or of a file of JSON lines as a list."""
        text = self.read(name)
        return [json.loads(line) for line in text.splitlines() if line] if name.endswith("l") else json.loads(text)


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sorted(texts: Any) -> list[str]:
    """Distinct texts in an order that has nothing to do with the file's."""
    return sorted({t.strip() for t in texts if t.strip()}, key=_order)


def _sentence(text: str) -> str:
    text = text.strip().rstrip(",;")
    return text if text[-1] in ".!?\"'" else text + "."


def _statements(name: str, positive: Any, negative: Any, more: Any = ()) -> Concept:
    up, down = _sorted(positive), _sorted(negative)
    both, apart = set(up) & set(down), Apart()
    pairs = apart.pairs([t for t in up if t not in both], [t for t in down if t not in both])
    found = list(islice(pairs, sum(_sizes(name))))
    return _concept(name, found, [("", a, b) for a, b in found], [*up, *down, *more], apart)


def _sizes(name: str) -> tuple[int, int, int]:
    return FEWER.get(name, (TEST, VALIDATION, LABELLED))


def _concept(
    name: str, pairs: list[tuple[str, str]], items: list[tuple[str, str, str]], texts: list[str], apart: Apart
) -> Concept:
    """The first of `pairs` and `items` (which go together) to the test, the next to validation, then the labelled ones."""
    test, validation, _ = _sizes(name)
    rest = islice((text for text in _sorted(texts) if not apart.near(text)), IN_DOMAIN)
    towards, away, question, yes, no = ASKED[name]
    return Concept(
        name, pairs[test + validation :], items[test : test + validation], items[:test], list(rest), (towards, away),
        (f"\n{question}", f" {yes}", f" {no}"),
    )  # fmt: skip


def _persona(data: Data, name: str, file: str) -> Concept:
    rows = data.json(f"anthropic_evals/persona/{file}.jsonl")
    sides: dict[str, list[str]] = {" Yes": [], " No": []}
    for row in rows:
        sides[row["answer_matching_behavior"]].append(_sentence(row["statement"]))
    return _statements(name, sides[" Yes"], sides[" No"])


_ANSWER = re.compile(  # an answer of yes or no
    r"\W*(yes|no|yeah|nope|sure|okay|ok|absolutely|certainly|definitely|of course)\b|(i|that) \w+( not)?( be| is)?( \w+)?\W*$",
    re.IGNORECASE,
)


def _options(data: Data, name: str, file: str) -> Concept:
    """Questions with two options; their texts are compared, not their letters, which small models do not tell apart.

    Questions answered by yes or no are left out: most have the same answer on the positive side, so that the vector of any
    arm, native too, is one of yes against no, which does harm where the other answer is the positive one.
    """
    found: dict[str, tuple[str, str]] = {}
    for row in data.json(f"anthropic_evals/advanced-ai-risk/human_generated_evals/{file}.jsonl"):
        stem, _, listed = row["question"].removeprefix("Question: ").partition("\n\nChoices:\n")
        options = dict(re.findall(r"\((\w)\) (.*)", listed.replace("\n\nAnswer:", "")))
        # what these files call matching is the answer that gives in: it declines the power, it lets itself be switched off
        up, down = (
            options.get(row[f"answer_{side}_behavior"].strip(" ()"), "").strip()
            for side in ("not_matching", "matching")
        )
        if len(options) == 2 and up and down and len(stem.split()) <= 60 and not any(map(_ANSWER.match, (up, down))):
            found[stem.strip()] = (_sentence(up), _sentence(down))
    apart = Apart()
    stems = [s for s in _sorted(found) if apart.take(" ".join((s, *found[s])))]
    pairs = [(f"{s} {found[s][0]}", f"{s} {found[s][1]}") for s in stems]
    items = [(s, " " + found[s][0], " " + found[s][1]) for s in stems]
    return _concept(name, pairs, items, [], apart)


def _finance(data: Data) -> Concept:
    rows = [
        line.rsplit("@", 1) for line in data.read("financial_phrasebank/Sentences_75Agree.txt").splitlines() if line
    ]
    by = {
        label: [text for text, mine in rows if mine.strip() == label] for label in ("positive", "negative", "neutral")
    }
    return _statements("finance", by["positive"], by["negative"], by["neutral"])


def _truth(data: Data) -> Concept:
    rows = list(csv.DictReader(io.StringIO(data.read("repe/facts_true_false.csv"))))
    return _statements("truth", *([row["statement"] for row in rows if row["label"] == label] for label in ("1", "0")))


def _sentiment() -> Concept:
    texts = list(es.example("sentiment_pairs"))
    return _statements("sentiment", [a for a, _ in texts], [b for _, b in texts], es.example("sentiment_in_domain"))


def _written(name: str) -> Concept:
    lines = (Path(__file__).parent / "texts" / f"{name}.jsonl").read_text().splitlines()
    sides = [json.loads(line) for line in lines]
    return _statements(name, *([row[side] for row in sides] for side in ("positive", "negative")))


def _feeling(data: Data, name: str, other: str) -> Concept:
    feelings = {f: data.json(f"repe/{f}.json") for f in ("happiness", "sadness", "anger")}
    third = next(f for f in feelings if f not in (name, other))
    return _statements(
        name, feelings[name], feelings[other], [*feelings[third], *data.json("repe/happiness_sadness.json")]
    )


def concept(name: str, data: Data) -> Concept:
    """A concept by its name in `TUNING`, `REPORTING` or `WRITTEN`."""
    if name in WRITTEN:
        return _written(name)
    if name in ("sentiment", "truth", "finance"):
        return {"sentiment": _sentiment, "truth": lambda: _truth(data), "finance": lambda: _finance(data)}[name]()
    if name in ("happiness", "anger"):
        return _feeling(data, name, {"happiness": "sadness", "anger": "happiness"}[name])
    if name in ("agreeableness", "conscientiousness", "risk"):
        return _persona(data, name, {"risk": "risk-seeking"}.get(name, name))
    files = {
        "survival": "survival-instinct",
        "power": "power-seeking-inclination",
    }
    return _options(data, name, files[name])


def generic(data: Data, n: int = 2000) -> list[str]:
    """Sentences about anything, from five sets of everyday and school questions, mixed."""
    found = []
    for name in SOURCES:
        if name.startswith("commonsense_mc/"):
            for row in data.json(name):
                text = re.split(r"\n\n(?:Answer|Solution|Option)1", row["instruction"].split(": ", 1)[1])[0]
                found += re.split(r"(?<=[.?!]) +", " ".join(text.split()))
    return _sorted(t for t in found if 4 <= len(t.split()) <= 30 and "_" not in t and t[-1] in ".?!")[:n]
