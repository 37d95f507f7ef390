"""Readers of public question sets, for lm-evaluation-harness: each gives the splits of one set from a folder of its files.

A row is `question`, `choices` (texts), `answer` (number of the right one) and `context`, which may be empty. Where a set has no
splits of its own, they are made here (`splits`); variants of one question stay in one split.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MMLU = {
    "medical": (
        "anatomy",
        "clinical_knowledge",
        "college_medicine",
        "medical_genetics",
        "professional_medicine",
        "nutrition",
        "virology",
        "college_biology",
    ),
    "financial": (
        "econometrics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "business_ethics",
        "marketing",
        "management",
        "professional_accounting",
    ),
    "mathematics": (
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "high_school_mathematics",
        "high_school_statistics",
    ),
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def row(question: str, choices: Iterable[Any], answer: int, context: str = "") -> Row:
    """One question."""
    return {
        "question": question.strip(),
        "choices": [str(c).strip() for c in choices],
        "answer": answer,
        "context": context,
    }


def shuffled(question: str, right: str, wrong: Iterable[str], most: int = 4) -> Row:
    """A question whose choices were made here, in an order that the question decides."""
    rng = random.Random(question)
    others = sorted({*wrong} - {right})
    choices = [right, *rng.sample(others, min(most - 1, len(others)))]
    rng.shuffle(choices)
    return row(question, choices, choices.index(right))


def svamp(folder: Path) -> Iterator[Row]:
    """Word problems; the wrong results are those of other operations, and the numbers of the problem."""
    for item in json.loads((folder / "svamp" / "SVAMP.json").read_text()):
        question = f"{item['Body'].rstrip('. ')}. {item['Question']}"
        numbers = [float(x) for x in NUMBER.findall(question.replace(",", ""))]
        right, operands = float(item["Answer"]), [float(x) for x in NUMBER.findall(item["Equation"])]
        wrong = set(numbers) | {right + 1, right + 10, right * 2}
        for a in operands:
            for b in operands:
                wrong |= {a + b, abs(a - b), a * b, *([a / b] if b and a % b == 0 else [])}
        yield shuffled(question, _number(right), map(_number, wrong - {right}))


def _number(x: float) -> str:
    return str(int(x)) if x == int(x) else f"{x:.2f}".rstrip("0")


def aqua_rat(folder: Path, file: str) -> Iterator[Row]:
    """Algebra with five options."""
    for line in (folder / "aqua_rat" / file).read_text().splitlines():
        item = json.loads(line)
        yield row(item["question"], [o.split(")", 1)[1] for o in item["options"]], "ABCDE".index(item["correct"]))


def lettered(folder: Path, name: str) -> Iterator[Row]:
    """MedQA and MedMCQA."""
    for line in (folder / name / "test.jsonl").read_text().splitlines():
        item = json.loads(line)
        letters = sorted(item["options"])
        yield row(item["question"], [item["options"][k] for k in letters], letters.index(item["answer_idx"]))


def pubmedqa(folder: Path, test: bool) -> Iterator[Row]:
    """Questions on an abstract, which the row has as its context: yes, no or maybe."""
    held_out = json.loads((folder / "pubmedqa" / "test_ground_truth.json").read_text())
    names = ["yes", "no", "maybe"]
    for key, item in json.loads((folder / "pubmedqa" / "ori_pqal.json").read_text()).items():
        if (key in held_out) == test:
            yield row(item["QUESTION"], names, names.index(item["final_decision"]), " ".join(item["CONTEXTS"]))


def mmlu_redux(folder: Path, domain: str) -> Iterator[Row]:
    """Questions of MMLU whose annotation found no error; `general` has those of no other domain."""
    special = {name for names in MMLU.values() for name in names}
    for file in sorted((folder / "mmlu_redux").glob("mmlu_*.csv")):
        name = file.stem.removeprefix("mmlu_")
        if name not in MMLU[domain] if domain in MMLU else name in special:
            continue
        text = file.read_text(errors="replace")
        delimiter = ";" if ";" in text.split("\n", 1)[0] else ","
        for item in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter):
            if item["error_type"].lower() == "ok":
                yield row(item["question"], ast.literal_eval(item["choices"]), int(item["answer"]))


def financial_phrasebank(folder: Path) -> Iterator[Row]:
    """Sentences from financial news: negative, neutral or positive for an investor."""
    names = ["negative", "neutral", "positive"]
    text = (folder / "financial_phrasebank" / "Sentences_75Agree.txt").read_text(encoding="latin-1")
    for line in text.splitlines():
        sentence, _, label = line.rpartition("@")
        yield row(sentence, names, names.index(label.strip()))


def tatqa(folder: Path) -> Iterator[Row]:
    """Questions whose answer is one number of a table, which the row has as its context; the wrong ones stand in it too."""
    for item in json.loads((folder / "tatqa" / "tatqa_dataset_dev.json").read_text()):
        cells = [[cell.strip() for cell in line] for line in item["table"]["table"]]
        table = "\n".join(" | ".join(line) for line in cells)
        numbers = {c for line in cells for c in line if NUMBER.search(c) and not re.search("[A-Za-z]", c)}
        for asked in item["questions"]:
            found = asked["answer"]
            if asked["answer_type"] == "span" and len(found) == 1 and found[0].strip() in numbers and len(numbers) >= 4:
                yield shuffled(asked["question"], found[0].strip(), numbers) | {"context": table}


def instructed(folder: Path, name: str, split: str) -> Iterator[Row]:
    """Sets that come as instructions, whose question and options stand in one text."""
    for item in json.loads((folder / "commonsense_mc" / name / f"{split}.json").read_text()):
        text = item["instruction"].split(": ", 1)[1].rsplit("Answer format:", 1)[0]
        question, *options = re.split(r"\s*(?:Answer|Solution|Option)\d: ", text)
        yield row(question, options, int(item["answer"][-1]) - 1)


def kept(rows: Iterable[Row]) -> list[Row]:
    """The rows whose options differ: of equal ones no answer is right."""
    return [item for item in rows if len(set(item["choices"])) == len(item["choices"])]


def families(rows: list[Row], alike: float = 0.7) -> list[int]:
    """A number for each row, the same for variants of one question and for questions on one context.

    Variants share at least `alike` of their words (Jaccard index), numbers apart, directly or by way of further ones.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer: Any = CountVectorizer(binary=True, token_pattern=r"[^\W\d_]+")
    words: Any = vectorizer.fit_transform([r["question"] + " x" for r in rows]).astype(np.float32)
    size, links = np.asarray(words.sum(1)).ravel(), []
    for start in range(0, len(rows), 512):
        both = (words[start : start + 512] @ words.T).toarray()
        first, second = np.nonzero(both >= alike * (size[start : start + 512, None] + size - both))
        links.append(np.stack([first + start, second]))
    places: dict[str, int] = {}
    same = [(i, places.setdefault(r["context"], i)) for i, r in enumerate(rows) if r["context"]]
    i, j = np.concatenate([*links, np.array(same, dtype=int).reshape(-1, 2).T], 1)
    return connected_components(coo_array((np.ones(len(i)), (i, j)), (len(rows), len(rows))))[1].tolist()


def splits(rows: Iterable[Row], train: float = 0.4, validation: float = 0.1) -> dict[str, list[Row]]:
    """Splits by a hash, in which variants of one question, and questions on one context, stay together."""
    rows = kept(rows)
    names = families(rows)
    named: dict[int, str] = {}
    for item, name in zip(rows, names, strict=True):
        named[name] = min(named.get(name, item["question"]), item["question"])
    found: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for item, name in zip(rows, names, strict=True):
        place = int(hashlib.sha256(named[name].encode()).hexdigest()[:8], 16) / 16**8
        split = "train" if place < train else "validation" if place < train + validation else "test"
        found[split].append(item)
    return found


def scattered(found: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """What is measured on in a drawn order: of a file that is sorted, the first few items are no sample."""
    return {
        name: rows if name == "train" else random.Random(name).sample(rows, len(rows)) for name, rows in found.items()
    }


def _with_test(train: Iterable[Row], test: Iterable[Row]) -> dict[str, list[Row]]:
    """Splits of a set that has a test split of its own, without training items that are variants of a test item."""
    train, test = kept(train), kept(test)
    names = families([*train, *test])
    tested = set(names[len(train) :])
    rest = splits([item for item, name in zip(train, names, strict=False) if name not in tested], 0.8, 0.2)
    return {"train": rest["train"], "validation": rest["validation"] + rest["test"], "test": test}


def _instructed(folder: Path, name: str, own: bool) -> dict[str, list[Row]]:
    if own:
        return _with_test(instructed(folder, name, "train"), instructed(folder, name, "test"))
    return splits(instructed(folder, name, "test"))


READERS: dict[str, Callable[[Path], dict[str, list[Row]]]] = {
    "svamp": lambda f: splits(svamp(f)),
    "aqua_rat": lambda f: _with_test(aqua_rat(f, "dev.json"), aqua_rat(f, "test.json")),
    "medqa": lambda f: splits(lettered(f, "medqa")),
    "medmcqa": lambda f: splits(lettered(f, "medmcqa")),
    "pubmedqa": lambda f: _with_test(pubmedqa(f, False), pubmedqa(f, True)),
    "financial_phrasebank": lambda f: scattered(splits(financial_phrasebank(f))),
    "tatqa": lambda f: splits(tatqa(f), 0.3, 0.1),
    **{f"mmlu_{d}": partial(lambda f, d: splits(mmlu_redux(f, d)), d=d) for d in (*MMLU, "general")},
    **{
        name.lower().replace("-", "_"): partial(_instructed, name=name, own=own)
        for name, own in (
            ("ARC-Easy", True),
            ("ARC-Challenge", True),
            ("openbookqa", True),
            ("piqa", False),
            ("social_i_qa", False),
            ("winogrande", False),
        )
    },
}


@functools.cache
def read(name: str, folder: str | Path) -> dict[str, list[Row]]:
    """Splits `train`, `validation` and `test` of a set.

    Args:
        name: a key of `READERS`.
        folder: has a folder for each set.

    Raises:
        ValueError: no such set.
        FileNotFoundError: its files are not there.
    """
    if name not in READERS:
        raise ValueError(f"There is no reader of {name!r}: there are {', '.join(READERS)}.")
    return READERS[name](Path(folder))


def dataset(data: str | None = None, reader: str = "", **_: Any) -> Any:
    """The set as lm-eval takes it; `data` comes from its `--metadata '{"data": "FOLDER"}'`."""
    import datasets

    if data is None:
        raise ValueError("""The folder of the data is missing: --metadata '{"data": "FOLDER"}'.""")
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in read(reader, data).items()})


def before_blank(doc: Row) -> list[str]:
    """A sentence up to its blank, with each option in it."""
    return [doc["question"].split("_", 1)[0] + choice for choice in doc["choices"]]


def after_blank(doc: Row) -> str:
    """What follows the blank."""
    return doc["question"].split("_", 1)[1].strip()
