"""Question sets in their own file formats, with rows written for the tests."""

from __future__ import annotations

import hashlib
import json

INSTRUCTED = {
    "ARC-Easy": "Please choose the correct answer to the question: What falls? {n}\n\n"
    "Answer1: A stone. Answer2: Air. Answer3: Light.\n\nAnswer format: answer1/answer2/answer3",
    "piqa": "Please choose the correct solution to the question: How do I boil water? {n}\n\n"
    "Solution1: Heat it.\n\nSolution2: Cool it.\n\nAnswer format: solution1/solution2",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: {n} The cup did not fit "
    "the box, as _ was too large.\n\nOption1: the cup Option2: the box Answer format: option1/option2",
}
KINDS = {"ARC-Challenge": "ARC-Easy", "openbookqa": "ARC-Easy", "social_i_qa": "ARC-Easy"}


def said(*key):
    """Eight made-up words, so that no two questions of a set are variants of one."""
    found = hashlib.sha256(repr(key).encode()).hexdigest().translate(str.maketrans("0123456789", "ghijklmnop"))
    return " ".join(found[i : i + 8] for i in range(0, 64, 8))


def write_sets(out, count=12):
    """Writes a folder with a few rows of every set."""

    def write(path, text, encoding="utf-8"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text, encoding=encoding)

    def lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)

    some = range(count)
    write(
        "svamp/SVAMP.json",
        json.dumps(
            [
                {
                    "Body": f"{n} boys had {n + 5} marbles and lost 2 {said(n)}.",
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
                "question": f"What is {n} + 1? {said(file, n)}",
                "options": [f"{k}){n + i}" for i, k in enumerate("ABCDE")],
                "correct": "B",
            }
            for n in some
        ]
        write(f"aqua_rat/{file}.json", lines(rows))
    for name in ("medqa", "medmcqa"):
        rows = [
            {
                "question": f"{n}. What do bones hold? {said(n)}",
                "options": {"A": "air", "B": "calcium"},
                "answer_idx": "B",
            }
            for n in some
        ]
        write(f"{name}/test.jsonl", lines(rows))
    asked = {
        str(n): {
            "QUESTION": f"{n}: does it help? {said(n)}",
            "CONTEXTS": [f"It did {said(n)}.", "Much."],
            "final_decision": "yes",
        }
        for n in some
    }
    write("pubmedqa/ori_pqal.json", json.dumps(asked))
    write("pubmedqa/test_ground_truth.json", json.dumps({"3": "yes", "7": "yes"}))
    head = ["question", "choices", "answer", "error_type"]
    for name, delimiter in (("anatomy", ","), ("marketing", ";"), ("elementary_mathematics", ","), ("philosophy", ",")):
        rows = [
            [
                f'"{n}. Which\none? {said(name, n)}"',
                "\"['a', 'b', 'c', 'd']\"",
                "2",
                "ok" if n else "bad_question_clarity",
            ]
            for n in some
        ]
        write(f"mmlu_redux/mmlu_{name}.csv", "".join(delimiter.join(r) + "\n" for r in [head, *rows]))
    text = "".join(f"Profit rose {n} % at the {n}é mill, {said(n)} said x@y .@positive\n" for n in some)
    write("financial_phrasebank/Sentences_75Agree.txt", text, "latin-1")
    write(
        "tatqa/tatqa_dataset_dev.json",
        json.dumps(
            [
                {
                    "table": {"table": [["", "2019", "2018"], [f"Sales {n}", "$1,2", "7.5"], ["Costs", "3", "4 each"]]},
                    "questions": [
                        {
                            "question": f"{n}: what were the sales in 2018? {said(n)}",
                            "answer": ["7.5"],
                            "answer_type": "span",
                        },
                        {"question": "What was sold?", "answer": ["Sales"], "answer_type": "span"},
                        {"question": "By how much did it rise?", "answer": 3, "answer_type": "arithmetic"},
                    ],
                }
                for n in some
            ]
        ),
    )
    for name in (*INSTRUCTED, *KINDS):
        for split in ("train", "test"):
            text = INSTRUCTED[KINDS.get(name, name)]
            rows = [{"instruction": text.replace("{n}", f"{n} {said(split, n)}"), "answer": "answer1"} for n in some]
            write(f"commonsense_mc/{name}/{split}.json", json.dumps(rows))
    return out
