"""A task of lm-evaluation-harness, whose model runs on a server."""

from __future__ import annotations

import json

import lm_eval
import pytest
from lab import SMOL, vector
from lm_eval.tasks import TaskManager

import expertsteer_nnsight as es
from expertsteer_nnsight.interop.lm_eval import SteeredLM

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna", "Japan": "Tokyo",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo", "Cuba": "Havana",
}  # fmt: skip
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
"""


def evaluated(model, plan, folder, remote):
    lm = SteeredLM(model, plan, remote=remote, batch_size=8, max_length=256)
    found = lm_eval.simple_evaluate(
        lm, tasks=["capitals"], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    samples = sorted(found["samples"]["capitals"], key=lambda s: s["doc_id"])
    return found["results"]["capitals"]["acc,none"], [r[0] for s in samples for r in s["filtered_resps"]], lm


@pytest.mark.parametrize("steered", [False, True])
def test_a_tasks_accuracy_is_the_local_one(steered, models, tmp_path, lean):
    lean(steered)
    names = list(CAPITALS.values())
    rows = [
        {"country": country, "choices": [names[i], names[i - 1], names[i - 5]], "answer": 0}
        for i, country in enumerate(CAPITALS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    far, near = models(SMOL)
    plan = es.SteeringPlan([vector(near, 12, 0.5, where="completion")]) if steered else None
    accuracy, values, here = evaluated(near, plan, tmp_path, False)
    theirs, remote_values, there = evaluated(far, plan, tmp_path, True)
    assert theirs == accuracy
    assert remote_values == pytest.approx(values, abs=2e-3)
    assert steered or accuracy > 0.7
    until = [("The capital of France is", {"until": ["."], "max_gen_toks": 8})]
    asked = [lm_eval.api.instance.Instance("generate_until", {}, row, 0) for row in until]
    assert there.generate_until(asked, disable_tqdm=True) == here.generate_until(asked, disable_tqdm=True)
