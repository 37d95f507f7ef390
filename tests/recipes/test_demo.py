"""The main job on the real pair: `make demo`'s claims, on the prompts that served for nothing else."""

from __future__ import annotations

import contextlib
import io

import pytest

import expertsteer_nnsight as es
from expertsteer_nnsight.models.packaged import model_path
from expertsteer_nnsight.states.shards import VERSION as STATES
from recipes.demo import main
from recipes.steer_on_ndif import load

ARMS = {
    "expert", "native", "untrained", "text_features", "permuted", "random", "paper",
}  # fmt: skip


pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(2400),
    pytest.mark.filterwarnings("ignore:The direction's correlation with the labels"),  # the paper arm's finding
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo wrote and printed, with fewer anchors and draws, for the time of it."""
    out, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["--out", str(out), "--anchors", "400", "--draws", "5", "--untrained", "3"])
    return out, printed.getvalue()


def test_the_demo_writes_its_files_and_keeps_its_claims(demo):
    folder, out = demo
    receipt = es.Receipt.load(folder / "receipt.json")
    arms = receipt.arms
    assert set(arms) == ARMS
    assert all(abs(arm["kl_p95"] / receipt.kl_budget - 1) < 0.05 for arm in arms.values())
    assert arms["permuted"]["draws"] == arms["random"]["draws"] == 5 and arms["untrained"]["draws"] == 3
    assert arms["expert"]["n"] == 40 and arms["expert"]["interval"][0] > 0

    effect = {name: arm["effect"] for name, arm in arms.items()}
    assert receipt.shares["expert"][0] >= 0.6
    assert effect["expert"] >= 2 * max(map(abs, arms["untrained"]["effects"]))
    assert effect["expert"] > max(effect["permuted"], effect["random"], effect["text_features"])
    assert receipt.contributed and receipt.shares["beyond_untrained"][1] > 0.4

    plan = es.SteeringPlan.load(folder / "plan.safetensors")
    assert [[e, t] for e, t in arms["expert"]["layers"] if t in plan.layers] == arms["expert"]["layers"]
    assert plan.dose == 1 and plan.info["receipt"]["verdict"] == receipt.verdict
    assert (folder / "report.png").stat().st_size > 20_000
    assert (
        "towards:" in out and "95th percentile of |effect|, 5 draws" in out and "the expert contributed" in out.lower()
    )


def test_a_plan_from_an_untrained_expert_is_told_to_contribute_nothing(demo):
    folder, _ = demo
    expert, target = (load(str(model_path(name)), here=True) for name in ("gemma-3-270m", "SmolLM2-135M-Instruct"))
    pairs, probe = es.example("sentiment_pairs").split("train"), es.example("sentiment_probe")
    anchors, cache = es.example("general")[:400], folder / f"states-{STATES}" / "recommended"  # nothing is read again
    steer = es.ExpertSteer.recommended()
    steer.fit(expert, target, pairs, anchors, cache=cache)
    controls = steer.controls(expert, target, pairs, anchors, untrained=3, draws=0, cache=cache)
    words = es.Words(probe["test_prompts"][:16], probe["positive_words"], probe["negative_words"])
    bad, *others = controls["untrained"]
    arms = {"native": controls["native"], "untrained": others}
    found = es.receipt(bad, target, words, probe["neutral_texts"][:4], arms, draws=5, doses=(), rollout_tokens=0)
    assert found.contributed is False and "contributed nothing" in repr(found.plan)
