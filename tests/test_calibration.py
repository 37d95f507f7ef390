"""Costs, scores and calibrated strengths: sharing forwards changes nothing, and the budget is met."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import nnsight
import pytest
import torch
from tiny import ARCHITECTURES, PROMPTS, tiny

from expertsteer_nnsight.calibration import calibrate_many, costs, stack, total_strength, with_total, word_scores
from expertsteer_nnsight.expert_steer import random_plans
from expertsteer_nnsight.receipts import Probe, measure
from expertsteer_nnsight.steering import SteeringPlan, SteeringVector


def plans(n=3, layers=(1, 2), norm=5.0):
    g = torch.Generator().manual_seed(0)
    return [
        SteeringPlan([SteeringVector(i, torch.randn(32, generator=g), 0.5, norm) for i in layers]) for _ in range(n)
    ]


def single(model, plan, text):
    """Log-probabilities of one text on its own, steered by one plan."""
    with torch.no_grad(), model.trace(text):
        if plan is not None:
            plan.apply(model)
        out = nnsight.save(model.output.logits[0].float())
    return out.log_softmax(-1)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shared_forwards_equal_single_ones(arch, bos):
    model = tiny(arch, bos)
    chosen = [
        *plans(2),
        *plans(1, (0, 3)),
        *plans(2, (2,)),
    ]  # other layers: other groups, and one with no shared prefix
    kl, nll = costs(model, chosen, PROMPTS, rows=2)
    kl_row, nll_row = [], []
    for plan in [None, *chosen]:
        one_kl, one_nll = [], []
        for text in PROMPTS:
            base, steered = single(model, None, text)[int(bos) :], single(model, plan, text)[int(bos) :]
            ids = torch.tensor(model.tokenizer(text)["input_ids"])[int(bos) :]
            one_kl.append((steered.exp() * (steered - base)).sum(-1))
            one_nll.append(-steered[:-1].gather(-1, ids[1:, None])[:, 0])
        kl_row.append(torch.cat(one_kl))
        nll_row.append(torch.cat(one_nll))
    torch.testing.assert_close(kl, torch.stack(kl_row), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(nll, torch.stack(nll_row), rtol=1e-3, atol=1e-4)
    assert kl[0].abs().max() < 1e-6 and kl[1:].amax(1).min() > 1e-3


def test_word_scores_are_log_odds_of_next_words():
    model, chosen = tiny("llama"), plans(3)
    scores = word_scores(model, chosen, PROMPTS, ["the", "dog"], ["test"])
    up, down = (
        [model.tokenizer(" " + w)["input_ids"][0] for w in ("the", "dog")],
        model.tokenizer(" test")["input_ids"][:1],
    )
    for row, plan in enumerate([None, *chosen]):
        for column, text in enumerate(PROMPTS):
            p = single(model, plan, text)[-1].exp()
            expected = p[up].sum().log() - p[down].sum().log()
            torch.testing.assert_close(scores[row, column], expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="begin with the same token"):
        word_scores(model, chosen, PROMPTS, ["the"], ["the"])


def test_calibration_meets_the_budget_for_either_sign():
    model = tiny("llama")
    signed = [s * p for p in plans(2) for s in (1, -1)]
    found = calibrate_many(model, signed, PROMPTS, 0.2, tolerance=0.02)
    assert found.met.all()
    kl, nll = costs(model, [with_total(p, float(s)) for p, s in zip(signed, found.strength, strict=True)], PROMPTS)
    levels = torch.quantile(kl[1:], 0.95, dim=1)
    torch.testing.assert_close(levels, found.kl, rtol=1e-3, atol=1e-5)
    assert ((levels / 0.2).log().abs() < 0.025).all()
    torch.testing.assert_close(nll[1:].mean(1), found.nll, rtol=1e-4, atol=1e-4)
    assert found.strength[0] != found.strength[1]
    assert all(curve == sorted(curve) for curve in found.curve)


def test_a_budget_that_cannot_be_met_is_told():
    found = calibrate_many(tiny("llama"), plans(1), PROMPTS, 1e6, limit=2.0)
    assert not found.met.any() and float(found.strength[0]) <= 2.0


def test_total_strength_is_a_root_of_summed_squares():
    plan = plans(1)[0]
    assert math.isclose(total_strength(plan), 0.5 * math.sqrt(2))
    assert math.isclose(total_strength(with_total(-plan, 3.0)), 3.0)
    assert with_total(-plan, 3.0).vectors[0].strength < 0


def test_plans_that_cannot_share_a_forward_are_refused():
    a, b = plans(2)
    with pytest.raises(ValueError, match="same layers, ops and places"):
        stack([a, b.with_(op="clamp")])
    with pytest.raises(ValueError, match="none per row"):
        stack([a.with_(strength=torch.ones(3))])


def test_plans_with_other_norms_places_and_ops_are_measured_as_themselves():
    model, (a, b, c) = tiny("llama", True), plans(3)
    mixed = [
        a,
        SteeringPlan([replace(v, residual_norm=11.0) for v in b.vectors]),
        c.with_(op="clamp"),
        a.with_(where="prompt"),
        b.with_(skip_special=False),
        a + c,
    ]
    kl, _ = costs(model, mixed, PROMPTS)
    for row, plan in enumerate(mixed, 1):
        torch.testing.assert_close(kl[row], costs(model, [plan], PROMPTS)[0][1], rtol=1e-3, atol=1e-5)
    assert len({round(float(k), 4) for k in kl.sum(1)}) == 7
    base = single(model, None, PROMPTS[0])
    steered = single(model, mixed[2], PROMPTS[0])  # clamp of strength 0 is no "unsteered": row 0 must be left alone
    expected = (steered.exp() * (steered - base)).sum(-1)[1:]
    torch.testing.assert_close(kl[3, : len(expected)], expected, rtol=1e-3, atol=1e-5)


def test_a_completion_plan_is_calibrated_on_every_token_of_a_text():
    model, plan = tiny("llama"), plans(1)[0]
    kl, _ = costs(model, [plan, plan.with_(where="completion"), plan.with_(where="completion", from_step=2)], PROMPTS)
    torch.testing.assert_close(kl[1], kl[2])
    assert 0 < kl[3].sum() < kl[1].sum()
    with pytest.raises(ValueError, match="steer none of their tokens"):
        calibrate_many(model, [plan.with_(where="prompt")], ["a"])


def test_strengths_of_zero_cannot_be_scaled():
    with pytest.raises(ValueError, match="strength is zero"):
        calibrate_many(tiny("llama"), [plans(1)[0].with_(strength=0.0)], PROMPTS)


def test_a_receipt_holds_every_arm_at_equal_cost(tmp_path):
    model = tiny("gpt2")
    plan = plans(1)[0]
    probe = Probe(PROMPTS, ("the", "dog"), ("test", "fox"), PROMPTS)
    arms = {"one": plan, "other_way": -plan, "random": random_plans(plan, 6)}
    receipt = measure(model, arms, probe, 0.1, progress=False)
    assert all(abs(math.log(a["kl_p95"] / receipt.kl_budget)) < 0.05 for a in receipt.arms.values())
    one, other, random = (receipt.arms[k] for k in arms)
    assert math.isclose(one["effect"], -other["effect"], rel_tol=1e-3, abs_tol=1e-4)
    assert math.isclose(one["effect"], one["score_plus"] - one["score_minus"], abs_tol=1e-5)
    assert len(random["effects"]) == 6
    assert math.isclose(random["effect"], float(torch.tensor(random["effects"]).abs().quantile(0.95)), rel_tol=1e-5)
    stored = json.loads(receipt.save(tmp_path / "receipt.json").read_text())
    assert stored["arms"]["one"]["effect"] == one["effect"] and stored["probe"]["prompts"] == PROMPTS
    assert "95th percentile of 6 draws" in repr(receipt) and "unsteered" in repr(receipt)
    assert receipt.plot().axes[0].get_xlabel()
    with pytest.raises(ValueError, match="no arm"):
        measure(model, {"none": []}, probe)
    with pytest.raises(ValueError, match="needs prompts"):
        Probe((), ("a",), ("b",), ("c",))


def test_random_plans_are_reproducible_and_differ():
    plan = plans(1)[0]
    a, b, c = random_plans(plan, 2, 0), random_plans(plan, 2, 0), random_plans(plan, 2, 1)
    assert torch.equal(a[1].vectors[0].direction, b[1].vectors[0].direction)
    assert not torch.allclose(a[1].vectors[0].direction, c[1].vectors[0].direction)
    assert not torch.allclose(a[0].vectors[0].direction, a[1].vectors[0].direction)
