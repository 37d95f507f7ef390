"""Task definitions for lm-evaluation-harness, on files of the sets' own formats with rows written for the test."""

from __future__ import annotations

import pytest
from lm_eval.tasks import TaskManager
from question_sets import said, write_sets

from recipes.tasks.readers import READERS, _with_test, dataset, families, financial_phrasebank, kept, read, splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("data"))


RIGHT = {
    "aqua_rat": ["1", "2"],
    "medqa": ["calcium"],
    "medmcqa": ["calcium"],
    "pubmedqa": ["yes"],
    "mmlu_medical": ["c"],
    "mmlu_financial": ["c"],
    "mmlu_mathematics": ["c"],
    "mmlu_general": ["c"],
    "financial_phrasebank": ["positive"],
    "tatqa": ["7.5"],
    "arc_easy": ["A stone."],
    "arc_challenge": ["A stone."],
    "openbookqa": ["A stone."],
    "social_i_qa": ["A stone."],
    "piqa": ["Heat it."],
    "winogrande": ["the cup"],
}


@pytest.mark.parametrize("name", READERS)
def test_every_set_is_read(name, folder):
    found = read(name, folder)
    rows = [row for split in ("train", "validation", "test") for row in found[split]]
    assert list(found) == ["train", "validation", "test"] and len(rows) >= 10
    for row in rows:
        assert len(set(row["choices"])) == len(row["choices"]) >= 2
        right = row["choices"][row["answer"]]
        if name == "svamp":
            boys = int(row["question"].split()[0])
            assert right == str(boys + 3) and len(row["choices"]) == 4
        elif name == "aqua_rat":
            assert int(right) == int(row["question"].split()[2]) + 1
        else:
            assert right in RIGHT[name]
    if name.startswith("mmlu"):
        assert len(rows) == 11 and all("\n" in row["question"] for row in rows)  # less the one with an error
    if name == "pubmedqa":
        assert (
            len(found["test"]) == 2
            and rows[0]["context"].startswith("It did ")
            and rows[0]["context"].endswith(". Much.")
        )
    if name == "tatqa":
        assert all("Costs | 3 | 4 each" in row["context"] and "4 each" not in row["choices"] for row in rows)


@pytest.mark.parametrize("name", READERS)
def test_every_task_asks_for_its_options_texts(name, folder):
    manager = TaskManager(include_path="recipes/tasks", include_defaults=False, metadata={"data": str(folder)})
    (task,) = manager.load([f"local_{name}"])["tasks"].values()
    task.build_all_requests(limit=1, rank=0, world_size=1)
    doc = next(iter(task.test_docs()))
    asked = [i.args for i in task.instances]
    count = len(doc["choices"])
    if name == "winogrande":
        assert [a[0] for a in asked] == [doc["question"].split("_")[0] + c for c in doc["choices"]]
        assert {a[1].strip() for a in asked} == {"was too large."}
        return
    assert [a[1] for a in asked] == [f" {c}" for c in doc["choices"]] * 2
    assert {a[0] for a in asked[count:]} == {""}  # what each option has without its question
    (context,) = {a[0] for a in asked[:count]}
    assert doc["question"] in context and (doc["context"] in context)
    assert set(task._metric_fn_list) == {"acc", "acc_norm", "acc_mutual_info"}


def rows_of(questions, context=""):
    return [{"question": q, "choices": ["yes", "no"], "answer": 0, "context": context} for q in questions]


def test_variants_of_a_question_stay_in_one_split():
    one = [f"{said(n)} had 26 sweet cookies" for n in range(300)]
    other = [f"{said(n)} ate {n} salty cookies" for n in range(300)]  # other numbers, and two other words of twelve
    found = splits(rows_of([*one, *other]))
    starts = [{" ".join(row["question"].split()[:8]) for row in part} for part in found.values()]
    assert sum(map(len, starts)) == 300 == len(set().union(*starts))
    assert 0.3 < len(found["train"]) / 600 < 0.5 and all(found.values())
    again = splits(rows_of([*other, *one]))  # in another order
    assert all({r["question"] for r in again[name]} == {r["question"] for r in part} for name, part in found.items())
    # a chain of variants is one family, and questions on one context are
    words = said(1).split()
    chain = [" ".join([*words[n:], *said(2).split()[:n]]) for n in range(8)]
    assert len(set(families(rows_of(chain)))) == 1 and len(set(families(rows_of(chain[::7])))) == 2
    assert len(set(families([*rows_of(chain[:1], "a table"), *rows_of(chain[7:], "a table")]))) == 1


def test_training_items_are_no_variants_of_test_items(folder, monkeypatch):
    tested = rows_of(f"{said(n)} had 26 sweet cookies" for n in range(20))
    train = rows_of(f"{said(n)} had 97 sweet cookies" for n in range(10, 200))
    found = _with_test(train, tested)
    assert found["test"] == tested and len(found["train"]) + len(found["validation"]) == 180


def test_items_with_equal_options_are_left_out():
    assert [r["choices"] for r in kept([{"choices": ["a", "a"]}, {"choices": ["a", "b"]}])] == [["a", "b"]]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="no reader of 'svmp': there are svamp"):
        read("svmp", tmp_path)
    with pytest.raises(FileNotFoundError):
        read("svamp", tmp_path)
    with pytest.raises(ValueError, match="The folder of the data is missing: --metadata"):
        dataset(reader="svamp")


def test_a_sorted_file_is_measured_in_a_drawn_order(tmp_path):
    labels = ["negative", "neutral", "positive"]
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]
    lines = [f"{w} {w[::-1]} firm said {w}{w} .@{labels[i // 200]}\n" for i, w in enumerate(words)]
    (tmp_path / "financial_phrasebank").mkdir()
    (tmp_path / "financial_phrasebank" / "Sentences_75Agree.txt").write_text("".join(lines), "latin-1")
    drawn, plain = read("financial_phrasebank", tmp_path), splits(financial_phrasebank(tmp_path))
    for split, rows in plain.items():
        answers = [[row["answer"] for row in found] for found in (rows, drawn[split])]
        assert answers[0] == sorted(answers[0]) == sorted(answers[1]) and len(answers[0]) > 20
        assert (drawn[split] == rows) == (split == "train")  # pairs are drawn from it in any case
        assert split == "train" or {*answers[1][:20]} == {0, 1, 2}
