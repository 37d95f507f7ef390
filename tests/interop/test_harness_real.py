"""lm-evaluation-harness on the packaged models: three tasks, unsteered and steered, against `hf` without and with hooks."""

from __future__ import annotations

import functools
import logging

import pytest
import tiny
import torch
from lm_eval.models.huggingface import HFLM
from question_sets import write_sets

import expertsteer_nnsight as es
from benchmarks.harness import evaluated
from expertsteer_nnsight.interop.lm_eval import SteeredLM
from expertsteer_nnsight.models.packaged import model_path
from recipes.domain_texts import Tasks
from recipes.steer_on_ndif import load

TASKS = ["local_svamp", "local_medmcqa", "local_financial_phrasebank"]
MODELS = ["SmolLM2-135M-Instruct", "gemma-3-270m"]


@functools.cache
def packaged(name):
    return load(str(model_path(name)), here=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return Tasks(write_sets(tmp_path_factory.mktemp("sets"), 24))


def strong(model):
    """Vectors at two layers, as long as half of the residual stream there."""
    states = es.collect(model, ["The weekend was long.", "Nothing is known of it yet."], layers=[7, 11], progress=False)
    g = torch.Generator().manual_seed(0)
    vectors = [
        es.SteeringVector(k, torch.randn(states.model.hidden_size, generator=g), 0.5, states.norm(k)) for k in (7, 11)
    ]
    # hf's hook below knows of no special tokens
    return es.SteeringPlan(vectors).with_(skip_special=False)


@pytest.mark.real
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MODELS)
def test_real_models_have_the_numbers_of_hf(name, tasks):
    model = packaged(name)
    plan = strong(model)
    hf = HFLM(model._module, tokenizer=model.tokenizer, batch_size=8)
    edits = {v.layer: lambda h, _, v=v: h + v.length * v.direction for v in plan.vectors}
    for task in TASKS:
        found = {}
        for arm, steering in (("unsteered", None), ("steered", plan)):
            _, mine, accuracies = evaluated(SteeredLM(model, steering, batch_size=8), tasks, task, 4)
            with tiny.hooks(es.Residual(model).layers._module, {} if steering is None else edits):
                _, known, theirs = evaluated(hf, tasks, task, 4)
            assert mine == pytest.approx(known, abs=1e-3) and accuracies == theirs
            found[arm] = mine
        assert max(abs(a - b) for a, b in zip(*found.values(), strict=True)) > 0.5
