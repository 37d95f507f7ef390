"""Requests as lm-evaluation-harness makes them, its own `hf` model, and ours with the same settings."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import expertsteer_nnsight as es
from expertsteer_nnsight.interop.lm_eval import SteeredLM

CONTEXTS = [
    "the quick brown fox",
    "hello world, this is a test of one small model.",
    "",
    "a dog jumps over the lazy dog",
]
ENDS = [" a", " b", " the lazy dog.", " world, this", " one", " jumps over a test"]


def requests(kind, rows):
    return [Instance(kind, {}, row, i) for i, row in enumerate(rows)]


def choices(count=40, seed=0):
    rng = random.Random(seed)
    rows = [(rng.choice(CONTEXTS) + rng.choice(["", " and", " the fox"]), rng.choice(ENDS)) for _ in range(count)]
    return requests("loglikelihood", rows)


def plain(model, **options):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(model._module, tokenizer=model.tokenizer, batch_size=4, max_length=100, **options)


def ours(model, plan=None, **options):
    return SteeredLM(model, plan, batch_size=4, max_length=100, **options)


def close(mine, theirs):
    for (a, greedy_a), (b, greedy_b) in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert greedy_a == greedy_b


def plan_for(model, where="all", **more):
    torch.manual_seed(5)
    width = es.Residual(model).hidden_size
    return es.SteeringPlan([es.SteeringVector(k, torch.randn(width), 0.7, 3.0, where=where, **more) for k in (1, 2)])
