"""The main job on the real pair: `make demo`'s claims, on the prompts that served for nothing else."""

from __future__ import annotations

import json

import pytest

import expertsteer_nnsight as es
from recipes.demo import main

ARMS = ["recommended", "untrained", "in_domain", "in_domain_untrained", "paper", "native", "permuted", "random"]


@pytest.mark.real
@pytest.mark.timeout(2400)
@pytest.mark.filterwarnings("ignore:The direction's correlation with the labels")  # the paper arm's finding
def test_the_demo_writes_its_files_and_keeps_its_claims(tmp_path, capsys):
    main(["--out", str(tmp_path)])
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    arms = receipt["arms"]
    assert list(arms) == ARMS
    keys = {"layers", "strength", "score_plus", "score_minus", "effect", "kl_p95", "nll"}
    assert all(keys <= set(arm) for arm in arms.values()) and {"score", "nll"} <= set(receipt["unsteered"])
    assert all(abs(arm["kl_p95"] / receipt["kl_budget"] - 1) < 0.05 for arm in arms.values())
    assert arms["permuted"]["draws"] >= 20 and arms["random"]["draws"] >= 20
    assert set(receipt["probe"]["prompts"]) == set(es.example("sentiment_probe")["test_prompts"])

    effect = {name: arm["effect"] for name, arm in arms.items()}
    assert effect["recommended"] >= 0.6 * effect["native"]
    assert effect["recommended"] >= 2 * effect["untrained"]
    assert effect["recommended"] > max(effect["permuted"], effect["random"])

    plan = es.SteeringPlan.load(tmp_path / "plan.safetensors")
    assert [[e, t] for e, t in arms["recommended"]["layers"] if t in plan.layers] == arms["recommended"]["layers"]
    assert plan.info["receipt"]["arms"]["recommended"]["effect"] == effect["recommended"]
    assert (tmp_path / "report.png").stat().st_size > 20_000
    out = capsys.readouterr().out
    assert "towards:" in out and "95th percentile of 20 draws" in out and "the expert added" in out
