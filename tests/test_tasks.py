"""Task definitions for lm-evaluation-harness, on files of the sets' own formats with rows written for the test."""

from __future__ import annotations

import json

import pytest
from lm_eval.tasks import TaskManager

from recipes.tasks.readers import READERS, dataset, read, splits

INSTRUCTED = {
    "ARC-Easy": "Please choose the correct answer to the question: What falls? {n}\n\n"
    "Answer1: A stone. Answer2: Air. Answer3: Light.\n\nAnswer format: answer1/answer2/answer3",
    "piqa": "Please choose the correct solution to the question: How do I boil water? {n}\n\n"
    "Solution1: Heat it.\n\nSolution2: Cool it.\n\nAnswer format: solution1/solution2",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: {n} The cup did not fit "
    "the box, as _ was too large.\n\nOption1: the cup Option2: the box Answer format: option1/option2",
}
KINDS = {"ARC-Challenge": "ARC-Easy", "openbookqa": "ARC-Easy", "social_i_qa": "ARC-Easy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a few rows of every set."""
    out = tmp_path_factory.mktemp("data")

    def write(path, text, encoding="utf-8"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text, encoding=encoding)

    def lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)

    some = range(12)
    write(
        "svamp/SVAMP.json",
        json.dumps(
            [
                {
                    "Body": f"{n} boys had {n + 5} marbles and lost 2.",
                    "Question": "How many are left?",
                    "Equation": f"( {n + 5}.0 - 2.0 )",
                    "Answer": n + 3.0,
                }
                for n in some
            ]
        ),
    )
    for file in ("dev", "test"):
        rows = [
            {
                "question": f"What is {n} + 1?",
                "options": [f"{k}){n + i}" for i, k in enumerate("ABCDE")],
                "correct": "B",
            }
            for n in some
        ]
        write(f"aqua_rat/{file}.json", lines(rows))
    for name in ("medqa", "medmcqa"):
        rows = [
            {"question": f"{n}. What do bones hold?", "options": {"A": "air", "B": "calcium"}, "answer_idx": "B"}
            for n in some
        ]
        write(f"{name}/test.jsonl", lines(rows))
    asked = {
        str(n): {"QUESTION": f"{n}: does it help?", "CONTEXTS": ["It did.", "Much."], "final_decision": "yes"}
        for n in some
    }
    write("pubmedqa/ori_pqal.json", json.dumps(asked))
    write("pubmedqa/test_ground_truth.json", json.dumps({"3": "yes", "7": "yes"}))
    head = ["question", "choices", "answer", "error_type"]
    for name, delimiter in (("anatomy", ","), ("marketing", ";"), ("elementary_mathematics", ","), ("philosophy", ",")):
        rows = [
            [f'"{n}. Which\none?"', "\"['a', 'b', 'c', 'd']\"", "2", "ok" if n else "bad_question_clarity"]
            for n in some
        ]
        write(f"mmlu_redux/mmlu_{name}.csv", "".join(delimiter.join(r) + "\n" for r in [head, *rows]))
    text = "".join(f"Profit rose {n} % at the {n}é mill, said x@y .@positive\n" for n in some)
    write("financial_phrasebank/Sentences_75Agree.txt", text, "latin-1")
    write(
        "tatqa/tatqa_dataset_dev.json",
        json.dumps(
            [
                {
                    "table": {"table": [["", "2019", "2018"], [f"Sales {n}", "$1,2", "7.5"], ["Costs", "3", "4 each"]]},
                    "questions": [
                        {"question": f"{n}: what were the sales in 2018?", "answer": ["7.5"], "answer_type": "span"},
                        {"question": "What was sold?", "answer": ["Sales"], "answer_type": "span"},
                        {"question": "By how much did it rise?", "answer": 3, "answer_type": "arithmetic"},
                    ],
                }
                for n in some
            ]
        ),
    )
    for name in (*INSTRUCTED, *KINDS):
        rows = [
            {"instruction": INSTRUCTED[KINDS.get(name, name)].replace("{n}", str(n)), "answer": "answer1"} for n in some
        ]
        for split in ("train", "test"):
            write(f"commonsense_mc/{name}/{split}.json", json.dumps(rows))
    return out


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
