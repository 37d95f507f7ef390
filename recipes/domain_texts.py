"""The tasks of a domain, and the labelled pairs and the anchors that are made of their training items."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import expertsteer_nnsight as es
from expertsteer_nnsight.texts.texts import texts_hash
from recipes.domain_tables import Line

PAIRS = 200  # labelled pairs, at most
READ = 800  # of the training questions that are no labelled text, as anchors, at most


class Tasks:
    """Tasks of lm-eval on the files in a folder, and on the hub.

    Args:
        data: folder of the files that the tasks of `recipes/tasks` read.
        every: whether lm-eval's own tasks can be named too; finding them takes seconds.
    """

    def __init__(self, data: Path | None, every: bool = False) -> None:
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        folder = Path(__file__).parent / "tasks"
        metadata: dict[str, Any] = {} if data is None else {"data": str(data)}
        self.manager = TaskManager(include_path=str(folder), include_defaults=every, metadata=metadata)
        self._loaded: dict[tuple[str, str], Any] = {}  # reading a set takes up to seconds, and every arm answers it
        self._items: dict[tuple[str, str, int | None], str] = {}

    def __call__(self, name: str, split: str = "test") -> Any:
        """A task that evaluates one of its splits."""
        if (name, split) not in self._loaded:
            (task,) = self.manager.load([name])["tasks"].values()
            if split == "validation":
                task.config.test_split = task.config.validation_split
            self._loaded[name, split] = task
        return self._loaded[name, split]

    def items(self, name: str, split: str, limit: int | None) -> str:
        """A hash of the first items of a split, as the model reads them, with their answers."""
        if (name, split, limit) not in self._items:
            task = self(name, split)
            offers = task.config.doc_to_choice is not None
            seen = [
                [task.doc_to_text(doc), task.doc_to_choice(doc) if offers else None, task.doc_to_target(doc)]
                for doc in itertools.islice(task.eval_docs, limit)
            ]
            self._items[name, split, limit] = texts_hash(map(str, seen))[:8]
        return self._items[name, split, limit]

    def rows(self, name: str) -> Iterator[Line]:
        """Training items, as `ContrastPairs.from_choices` takes them: `question`, `options`, `answer`.

        Raises:
            ValueError: the task offers no options, or has no training items.
        """
        task = self(name)
        if not task.has_training_docs() or task.config.doc_to_choice is None:
            raise ValueError(
                f"Pairs are made of training items with options, and {name} has none: name another task in fit."
            )
        for doc in task.training_docs():
            yield {
                "question": task.doc_to_text(doc),
                "options": task.doc_to_choice(doc),
                "answer": task.doc_to_target(doc),
            }


def contrasted(rows: Sequence[Line], count: int, seed: int) -> dict[int, Line]:
    """Some of the rows, by number, with their right option and one wrong one.

    The wrong one is drawn. Where all rows offer the same options, each of these is as often right as wrong, so that no option
    tells the label.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows)).tolist()
    right = [row["options"][row["answer"]] for row in rows]
    others = [sorted({*row["options"]} - {text}) for row, text in zip(rows, right, strict=True)]
    of = {text: [i for i in order if right[i] == text] for text in rows[0]["options"]} if rows else {}
    if all({*row["options"]} == {*of} for row in rows) and all(of.values()):
        most = min(count // len(of), *(len(found) for found in of.values()))
        each = most - most % (len(of) - 1)  # so that it can be divided among the others
        wrong = {i: others[i][n % len(others[i])] for found in of.values() for n, i in enumerate(found[:each])}
    else:
        wrong = {i: others[i][rng.integers(len(others[i]))] for i in order[:count]}
    return {i: {"question": rows[i]["question"], "options": [right[i], o], "answer": 0} for i, o in wrong.items()}


def texts_of(tasks: Tasks, name: str, seed: int, anchors: int | None = None) -> tuple[es.ContrastPairs, list[str]]:
    """Labelled pairs, and anchors: general texts and questions of the domain that no pair has.

    Raises:
        ValueError: too few training items.
    """
    rows = list(tasks.rows(name))
    chosen = contrasted(rows, min(PAIRS, len(rows) // 2), seed)
    if not chosen:
        raise ValueError(
            f"{name} has {len(rows)} training items, of which no pairs can be made: name another task in fit."
        )
    taken = {row["question"] for row in chosen.values()}
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    others = [rows[i]["question"] for i in order if i not in chosen and rows[i]["question"] not in taken]
    return es.ContrastPairs.from_choices(list(chosen.values())), [*es.example("general")[:anchors], *others[:READ]]
