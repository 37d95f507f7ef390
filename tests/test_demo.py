"""The main job on the real pair: `make demo`'s claims, on the prompts that served for nothing else."""

from __future__ import annotations

import pytest

import expertsteer_nnsight as es
from recipes.demo import main

ARMS = {
    "expert", "native", "untrained", "text_features", "permuted", "random", "paper",
}  # fmt: skip


@pytest.mark.real
@pytest.mark.timeout(2400)
@pytest.mark.filterwarnings("ignore:The direction's correlation with the labels")  # the paper arm's finding
def test_the_demo_writes_its_files_and_keeps_its_claims(tmp_path, capsys):
    main(["--out", str(tmp_path), "--anchors", "400", "--draws", "5"])  # fewer of each, for the time of it
    receipt = es.Receipt.load(tmp_path / "receipt.json")
    arms = receipt.arms
    assert set(arms) == ARMS
    assert all(abs(arm["kl_p95"] / receipt.kl_budget - 1) < 0.05 for arm in arms.values())
    assert arms["permuted"]["draws"] == arms["random"]["draws"] == 5 and arms["untrained"]["draws"] == 3
    assert arms["expert"]["n"] == 40 and arms["expert"]["interval"][0] > 0

    effect = {name: arm["effect"] for name, arm in arms.items()}
    assert receipt.shares["expert"][0] >= 0.6
    assert effect["expert"] >= 2 * max(arms["untrained"]["effects"])
    assert effect["expert"] > max(effect["permuted"], effect["random"], effect["text_features"])
    assert receipt.contributed and receipt.shares["beyond_untrained"][1] > 0.4

    plan = es.SteeringPlan.load(tmp_path / "plan.safetensors")
    assert [[e, t] for e, t in arms["expert"]["layers"] if t in plan.layers] == arms["expert"]["layers"]
    assert plan.dose == 1 and plan.info["receipt"]["verdict"] == receipt.verdict
    assert (tmp_path / "report.png").stat().st_size > 20_000
    out = capsys.readouterr().out
    assert (
        "towards:" in out and "95th percentile of |effect|, 5 draws" in out and "the expert contributed" in out.lower()
    )
