"""Task definitions for lm-evaluation-harness, on files of the sets' own formats with rows written for the test."""

from __future__ import annotations

import pytest
from lm_eval.tasks import TaskManager
from question_sets import write_sets

from recipes.tasks.readers import READERS, dataset, read, splits


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
        assert len(found["test"]) == 2 and rows[0]["context"] == "It did. Much."
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


def test_variants_of_a_question_stay_in_one_split():
    rows = [
        {"question": f"A question about number {n} of many, {end}"} for n in range(300) for end in ("first", "second")
    ]
    found = splits(rows)
    starts = [{row["question"][:30] for row in part} for part in found.values()]
    assert not starts[0] & starts[1] and not starts[0] & starts[2] and not starts[1] & starts[2]
    assert 0.3 < len(found["train"]) / len(rows) < 0.5
    assert splits(rows[:50])["test"] == [row for row in found["test"] if row in rows[:50]]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="no reader of 'svmp': there are svamp"):
        read("svmp", tmp_path)
    with pytest.raises(FileNotFoundError):
        read("svamp", tmp_path)
    with pytest.raises(ValueError, match="The folder of the data is missing: --metadata"):
        dataset(reader="svamp")
