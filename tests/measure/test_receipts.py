"""Receipts: arms at equal cost, intervals, and what is said of the expert."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny import PROMPTS, tiny

from expertsteer_nnsight.measure.calibration import calibrate, neutral_tokens
from expertsteer_nnsight.measure.effects import Choices, Judged, Words
from expertsteer_nnsight.measure.measuring import measure, receipt, shares_of_native
from expertsteer_nnsight.measure.receipts import Receipt, interval
from expertsteer_nnsight.measure.scoring import costs
from expertsteer_nnsight.steering.plan import SteeringPlan, random_plans, with_total
from expertsteer_nnsight.steering.vectors import SteeringVector

WORDS = Words(PROMPTS, ("the", "dog"), ("test", "fox"))
QUICK = {"progress": False, "rollout": 4}


def plan(seed=0):
    g = torch.Generator().manual_seed(seed)
    return SteeringPlan([SteeringVector(i, torch.randn(32, generator=g), 0.5, 5.0) for i in (1, 2)])


def useful(model, seed=1):
    """A plan along what the head reads of the words: it moves the effect, as no random direction does."""
    ids = {w: model.tokenizer(" " + w)["input_ids"][0] for w in ("the", "dog", "test", "fox")}
    rows = model._module.lm_head.weight.detach()
    v = rows[ids["the"]] + rows[ids["dog"]] - rows[ids["test"]] - rows[ids["fox"]]
    return SteeringPlan([SteeringVector(3, v, 0.5, 5.0)])


def test_every_arm_is_measured_at_equal_cost():
    model, one = tiny("gpt2"), plan()
    arms = {"one": one, "other_way": -one, "random": random_plans(one, 6), "untrained": random_plans(one, 2, 1)}
    found = measure(model, arms, WORDS, PROMPTS, 0.1, **QUICK)
    assert all(abs(math.log(a["kl_p95"] / found.kl_budget)) < 0.05 for a in found.arms.values())
    a, b, random, untrained = (found.arms[k] for k in arms)
    assert math.isclose(a["effect"], -b["effect"], rel_tol=1e-3, abs_tol=1e-4)
    assert math.isclose(a["effect"], a["score_plus"] - a["score_minus"], abs_tol=1e-5)
    assert a["wrong_way"] == np.mean(np.array(a["items"]) < 0) and a["interval"][0] <= a["effect"] <= a["interval"][1]
    assert math.isclose(random["effect"], float(torch.tensor(random["effects"]).abs().quantile(0.95)), rel_tol=1e-5)
    assert random["interval"] is None and untrained["interval"] is not None
    assert math.isclose(untrained["effect"], np.mean(untrained["effects"]), rel_tol=1e-5)
    # the effect is what the plan at the told strengths does
    plus, minus = (with_total(s * one, a[f"strength_{k}"]) for s, k in ((1, "plus"), (-1, "minus")))
    scores = WORDS.score(model, [plus, minus])
    assert math.isclose(float((scores[1] - scores[2]).mean()), a["effect"], rel_tol=1e-3)
    kl, nll = costs(model, [plus, minus], neutral_tokens(model, PROMPTS, 4))
    assert math.isclose(float(kl[1:].quantile(0.95, dim=1).max()), a["kl_p95"], rel_tol=1e-3)
    assert math.isclose(float(nll[1:].mean()), a["nll"], rel_tol=1e-3)


def test_null_draws_are_scored_on_fewer_items():
    found = measure(tiny("gpt2"), {"one": plan(), "random": random_plans(plan(), 3)}, WORDS, PROMPTS, 0.1,
                    null_items=2, **QUICK)  # fmt: skip
    assert found.arms["one"]["n"] == 4 and found.arms["random"]["n"] == 2
    all_items = measure(tiny("gpt2"), {"random": random_plans(plan(), 3)}, WORDS[:2], PROMPTS, 0.1, **QUICK)
    assert np.allclose(found.arms["random"]["effects"], all_items.arms["random"]["effects"], atol=1e-4)


def test_the_interval_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        _, low, high = interval(rng.normal(1.0, 2.0, 50))
        hits += low < 1 < high
    assert hits >= 85
    items = rng.normal(0, 1, (2, 400))
    ratio = interval(np.stack([items[0] + 3, items[1] + 2]), lambda a, b, axis=-1: a.mean(axis) / b.mean(axis))
    assert ratio[1] < 1.5 < ratio[2] and ratio[2] - ratio[1] < 0.4


@pytest.fixture(scope="module")
def good():
    model = tiny("llama")
    best = useful(model)
    controls = {"native": useful(model), "untrained": random_plans(best, 3, 5), "random": random_plans(best, 8)}
    return receipt(calibrate(best, model, PROMPTS, 0.05, rollout=4), model, WORDS, PROMPTS, controls, rollout_tokens=4,
                   instruction=("Say dog.", "Say fox."), **QUICK)  # fmt: skip


def test_a_receipt_says_what_the_expert_contributed(good):
    assert good.kl_budget == 0.05 and good.contributed is True and "contributed" in good.verdict
    assert "nothing" not in good.verdict
    assert math.isclose(good.shares["expert"][0], 1, rel_tol=0.05)
    beyond = (good.arms["expert"]["effect"] - good.arms["untrained"]["effect"]) / good.arms["native"]["effect"]
    assert math.isclose(good.shares["beyond_untrained"][0], beyond, rel_tol=1e-4)
    assert good.shares["expert"][1] <= good.shares["expert"][0] <= good.shares["expert"][2]
    assert set(good.arms) == {"expert", "native", "untrained", "random", "prompted"}
    assert good.arms["prompted"]["kl_p95"] is None


def test_doses_and_rollouts_are_told(good):
    rows = good.doses["expert"]
    assert [r[0] for r in rows] == [0.25, 0.5, 1.0, 1.5] and rows[2][1] == good.arms["expert"]["effect"]
    assert rows[0][1] < rows[1][1] < rows[2][1]
    assert all(low <= value <= high for _, value, low, high in rows)
    assert set(good.rollouts) == {"unsteered", "expert +", "expert -", "native +", "native -"}
    steered = good.rollouts["expert +"]
    assert steered["kl_p95"] > 0 and 0 <= steered["repetition"] <= 1 and len(steered["texts"]) == 4


def test_a_receipt_is_kept_in_the_plan_and_in_files(good, tmp_path):
    loaded = SteeringPlan.load(good.plan.save(tmp_path / "plan.safetensors"))
    again = Receipt.from_dict(loaded.info["receipt"])
    assert again.verdict == good.verdict and repr(again) == repr(good)
    assert Receipt.load(good.save(tmp_path / "receipt.json")).to_dict() == json.loads(json.dumps(good.to_dict()))
    assert "the expert contributed" in repr(loaded) and "untested" not in repr(loaded)
    assert "untested" in repr(2 * loaded)


def test_a_receipt_is_drawn(good):
    assert good.plot().axes[0].get_xlabel() and good.plot_doses().axes[0].get_xlabel()
    bare = Receipt(good.arms, good.unsteered, 1.0, "nats")
    with pytest.raises(ValueError, match="No doses"):
        bare.plot_doses()


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_plan_is_told_to_be_one(seed):
    model = tiny("llama")
    bad = random_plans(useful(model), 1, 100 + seed)[0]
    controls = {"native": useful(model), "untrained": random_plans(bad, 3, 5), "random": random_plans(bad, 10)}
    found = receipt(bad, model, WORDS, PROMPTS, controls, kl_budget=0.05, doses=(), rollout_tokens=0, **QUICK)
    assert found.contributed is False and "contributed nothing" in found.verdict
    assert f" could reach {found.bar:.3g})" in found.verdict
    assert "contributed nothing" in repr(found.plan)


def test_a_plan_no_better_than_its_controls_seldom_passes():
    """What README says of the verdict, if effects are normal."""
    rng = np.random.default_rng(0)

    def verdict(effect, mean=0.0, seeds=3, draws=20, spread=1.0):
        expert = {"effect": effect, "interval": [effect - 0.05, effect + 0.05], "items": []}
        arms = {"expert": expert, "untrained": {"effects": rng.normal(mean, size=seeds).tolist()}}
        arms |= {
            name: {"effects": (spread * rng.normal(size=draws)).tolist()} for name in ("random", "permuted") if draws
        }
        return Receipt(arms, {}, 1.0, "nats").contributed

    assert np.mean([verdict(x) for x in rng.normal(size=2000).tolist()]) < 0.015
    assert np.mean([verdict(10.0) for _ in range(200)]) > 0.95
    # untrained experts that do more than random directions, or no random ones at all
    for mean, seeds, draws, spread in ((4, 3, 20, 1), (4, 2, 20, 1), (1, 3, 20, 0.3), (0.6, 3, 0, 1), (0, 2, 0, 1)):
        passed = [verdict(x, mean, seeds, draws, spread) for x in rng.normal(mean, size=2000).tolist()]
        assert np.mean(passed) < 0.065


def test_without_an_untrained_expert_nothing_is_said_of_the_expert():
    model = tiny("llama")
    found = receipt(useful(model), model, WORDS, PROMPTS, draws=3, kl_budget=0.05, doses=(), rollout_tokens=0, **QUICK)
    assert found.contributed is None and "no untrained expert was measured" in found.verdict
    assert found.arms["random"]["draws"] == 3


def test_one_untrained_seed_is_compared_on_the_same_items():
    model = tiny("llama")
    found = receipt(useful(model), model, WORDS, PROMPTS, {"untrained": useful(model)}, draws=3, kl_budget=0.05, doses=(),
                    rollout_tokens=0, **QUICK)  # fmt: skip
    assert found.contributed is False


def test_what_text_features_reach_is_not_the_experts():
    model = tiny("llama")
    one = useful(model)
    controls = {"untrained": random_plans(one, 3, 5), "text_features": useful(model), "random": random_plans(one, 3)}
    found = receipt(one, model, WORDS, PROMPTS, controls, kl_budget=0.05, doses=(), rollout_tokens=0, **QUICK)
    assert found.contributed is False
    without = Receipt({k: v for k, v in found.arms.items() if k != "text_features"}, found.unsteered, 0.05, "nats")
    assert without.contributed is True


def test_anchors_that_are_labelled_texts_are_noted():
    model, one = tiny("llama"), useful(tiny("llama"))
    one = SteeringPlan(one.vectors, one.target, {"data": {"anchors_labelled": 7}})
    found = receipt(one, model, WORDS, PROMPTS, draws=2, kl_budget=0.05, doses=(), rollout_tokens=0, **QUICK)
    assert "7 of the anchors are labelled texts" in found.verdict


def test_seeds_that_differ_widen_the_share_beyond_them():
    model, arms = tiny("llama"), {}
    found = measure(model, {"expert": useful(model), "native": useful(model)}, WORDS, PROMPTS, 0.05, **QUICK)
    for spread in (0.0, 1.0):
        effects = [-spread, spread, 0.0]
        untrained = {**found.arms["native"], "items": [0.0] * 4, "effects": effects, "effect": 0.0}
        arms[spread] = shares_of_native({**found.arms, "untrained": untrained})["beyond_untrained"]
    native = found.arms["native"]["effect"]
    assert arms[0.0][0] == arms[1.0][0] and arms[0.0][1] == pytest.approx(1, abs=0.05)
    # Student's t with two degrees of freedom: 4.3 standard errors of the mean of three seeds
    assert arms[1.0][2] - arms[1.0][0] == pytest.approx(4.3 / 3**0.5 / native, rel=0.25)


def test_shares_of_a_native_that_steers_nothing_are_left_out():
    model, one = tiny("llama"), useful(tiny("llama"))
    random = random_plans(one, 4)
    found = receipt(one, model, WORDS, PROMPTS, {"native": random[0], "random": random[1:]}, kl_budget=0.05, doses=(),
                    rollout_tokens=0, **QUICK)  # fmt: skip
    assert found.shares == {} and "native does no more than random" in found.verdict and "nan" not in repr(found)
    steady = {"items": [1.0, 1.1, 0.9, 1.0], "effect": 1.0, "interval": [0.9, 1.1]}  # for certain above zero
    arms = {"expert": steady, "native": steady, "random": {"effect": 0.5}}
    assert shares_of_native(arms)["expert"][0] == 1 and shares_of_native({**arms, "random": {"effect": 1.5}}) == {}


def test_a_receipt_tells_at_what_strength_and_with_what_judge_it_was_made():
    class Judge:
        accuracy_ = 0.75

        def __call__(self, texts):
            return [len(text) / 10 - 1 for text in texts]

    model, one = tiny("llama"), useful(tiny("llama"))
    how = {"kl_budget": 0.05, "doses": (), "rollout_tokens": 0, "draws": 2, **QUICK}
    found = receipt(one, model, Judged(PROMPTS, Judge(), 4), PROMPTS, **how)
    assert f"residual norms, the plan has {0.5:.2g}" in found.verdict and "held-out accuracy is 0.75" in found.verdict
    calibrated = calibrate(one, model, PROMPTS, 0.05, rollout=4)
    same = receipt(calibrated, model, WORDS, PROMPTS, **how)
    assert "the plan has" not in same.verdict and "Items on the positive side" in repr(same)
    scores = WORDS.score(model, [calibrated, with_total(-calibrated, same.arms["expert"]["strength_minus"])])
    assert same.unsteered["agrees"] == float((scores[0] > 0).double().mean())
    assert same.arms["expert"]["agrees"] == [float((row > 0).double().mean()) for row in scores[1:]]
    with pytest.raises(ValueError, match="1 item has no interval"):
        receipt(one, model, WORDS[:1], PROMPTS, **how)


def test_the_same_seed_gives_the_same_receipt():
    model, arms = tiny("llama"), {"expert": useful(tiny("llama")), "random": random_plans(useful(tiny("llama")), 3)}
    items = Choices([("hello", " the", " a"), ("a dog", " test", " over"), ("this", " is", " the")])
    a, b = (measure(model, arms, items, PROMPTS, 0.05, **QUICK) for _ in range(2))
    assert a.to_dict() == b.to_dict()


def test_wrong_arms_are_refused():
    with pytest.raises(ValueError, match="no arm"):
        measure(tiny("gpt2"), {"none": []}, WORDS, PROMPTS, **QUICK)
    with pytest.raises(ValueError, match="cannot be called expert"):
        receipt(plan(), tiny("gpt2"), WORDS, PROMPTS, {"expert": plan()}, **QUICK)
