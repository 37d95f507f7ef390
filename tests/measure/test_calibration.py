"""Costs, scores and calibrated strengths: sharing forwards changes nothing, and the budget is met."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import nnsight
import pytest
import torch
from tiny import ARCHITECTURES, PROMPTS, tiny

from expertsteer_nnsight.measure.calibration import (
    calibrate,
    calibrate_many,
    neutral_tokens,
)
from expertsteer_nnsight.measure.effects import Words
from expertsteer_nnsight.measure.scoring import costs
from expertsteer_nnsight.steering.plan import SteeringPlan, stack_plans, total_strength, with_total
from expertsteer_nnsight.steering.vectors import SteeringVector


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
    scores = Words(PROMPTS, ["the", "dog"], ["test"]).score(model, chosen)
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
        Words(PROMPTS, ["the"], ["the"]).score(model, chosen)


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
        stack_plans([a, b.with_(op="clamp")], True)
    with pytest.raises(ValueError, match="none per row"):
        stack_plans([a.with_(strength=torch.ones(3))], True)


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


def test_what_has_no_strength_to_be_calibrated_is_refused():
    for budget in (0, -1):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            calibrate(plans(1)[0], tiny("llama"), PROMPTS, budget)
    rows = plans(1)[0].with_(strength=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="no one strength"):
        calibrate(rows, tiny("llama"), PROMPTS)


def test_the_dose_of_a_plan_is_told_by_a_vector_that_has_a_strength():
    first, second = plans(1)[0].vectors[0], plans(1, (2,))[0].vectors[0]
    one = SteeringPlan([replace(first, strength=0.0), second])
    half = 0.5 * calibrate(one, tiny("llama"), PROMPTS, 0.05, rollout=2)
    assert half.dose == pytest.approx(0.5) and "dose 0.5" in repr(half)


def test_a_word_counts_with_its_own_token_where_the_tokenizer_puts_a_space_before_a_text(monkeypatch):
    model = tiny("llama", False, 91)
    own, space = model.tokenizer, model.tokenizer(" ", add_special_tokens=False)["input_ids"]

    class Spaced:
        """Puts a token for a space before what it is given, as SentencePiece does."""

        def __call__(self, text, **how):
            found = own(text, **how)
            return {**found, "input_ids": [*space, *found["input_ids"]]} if isinstance(text, str) else found

        def __getattr__(self, name):
            return getattr(own, name)

    words = Words(PROMPTS, ["dog"], ["fox"])
    expected = words.score(model, [])
    monkeypatch.setattr("expertsteer_nnsight.measure.effects.tokenizer_of", lambda _: Spaced())
    torch.testing.assert_close(words.score(model, []), expected)


def test_strengths_of_zero_cannot_be_scaled():
    with pytest.raises(ValueError, match="strength is zero"):
        calibrate_many(tiny("llama"), [plans(1)[0].with_(strength=0.0)], PROMPTS)


def test_calibrate_gives_the_plan_at_dose_one():
    model, (a, b) = tiny("llama"), plans(2)
    one = calibrate(a, model, PROMPTS, 0.2, rollout=6)
    told = one.info["calibration"]
    assert one.dose == 1 and (2 * one).dose == 2 and math.isclose((-0.5 * one).dose, -0.5)
    assert told["met"] and told["tokens"] == sum(len(t.ids) for t in neutral_tokens(model, PROMPTS, 6))
    assert told["curve"] == sorted(told["curve"]) and len(told["curve"]) >= 4
    # measured again with a plain trace of every text by itself
    kl = []
    for text in neutral_tokens(model, PROMPTS, 6):
        ids = torch.tensor([text.ids])
        logits = []
        for plan in (None, one):
            with torch.no_grad(), model.trace(ids):
                if plan is not None:
                    plan.apply(model)
                logits.append(nnsight.save(model.output.logits[0].float().log_softmax(-1)))
        base, steered = logits
        kl.append((steered.exp() * (steered - base)).sum(-1))
    assert abs(float(torch.quantile(torch.cat(kl), 0.95)) / 0.2 - 1) < 0.035
    both = calibrate([a, b], model, PROMPTS, 0.2, rollout=6)
    assert math.isclose(total_strength(both[0]), total_strength(one), rel_tol=0.03) and both[1].dose == 1


def test_a_dose_is_lost_where_the_plan_is_no_longer_the_calibrated_one():
    plan = calibrate(plans(1)[0], tiny("llama"), PROMPTS, 0.2, rollout=0)
    assert plan.with_(where="completion").dose is None and plan.with_(strength=0.1).dose is None
    assert "dose 1" in repr(plan) and "untested: no receipt" in repr(plan)
    assert "not calibrated" in repr(plans(1)[0])


def test_dose_and_curve_survive_a_file(tmp_path):
    plan = 0.5 * calibrate(plans(1)[0], tiny("llama"), PROMPTS, 0.2, rollout=0)
    loaded = SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert loaded.dose == 0.5 and loaded.info["calibration"]["curve"] == plan.info["calibration"]["curve"]


def test_a_budget_out_of_reach_warns_and_is_kept():
    with pytest.warns(UserWarning, match="use another budget"):
        plan = calibrate(plans(1)[0], tiny("llama"), PROMPTS, 1e6, limit=2.0)
    assert not plan.info["calibration"]["met"] and "misses the budget" in repr(plan)


def test_few_plans_need_few_rounds(monkeypatch):
    import expertsteer_nnsight.measure.calibration as module

    calls = []
    real = module.costs
    monkeypatch.setattr(module, "costs", lambda *args, **kw: calls.append(len(args[1])) or real(*args, **kw))
    assert calibrate(plans(1)[0], tiny("llama"), PROMPTS, 0.2).info["calibration"]["met"]
    assert len(calls) <= 4 and calls[0] == 4


@pytest.mark.parametrize("bos", [False, True])
def test_neutral_tokens_are_the_prompts_and_the_unsteered_greedy_continuation(bos):
    model = tiny("gpt2", bos)
    for prompt, text in zip(PROMPTS, neutral_tokens(model, PROMPTS, 5), strict=True):
        ids = model.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            made = model._module.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected = made[0].tolist()
        end = next((i for i, t in enumerate(expected) if i >= len(ids) and t == 2), len(expected))
        assert text.ids == expected[:end] and text.prefix == int(bos)


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("limit", [0.01, 0.2, 0.9])
def test_no_strength_beyond_the_limit_is_tried_or_given(limit, several):
    made = plans(1 if several else 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = calibrate_many(tiny("llama"), made, PROMPTS, 50.0, limit=limit, rounds=6)
    assert max(size for curve in found.curve for size, _ in curve) <= limit * (1 + 1e-9)
    assert float(found.strength.max()) <= limit * (1 + 1e-9)


WRONG = {
    "kl_budget": (float("nan"), float("inf"), 0, -1, True),
    "quantile": (float("nan"), 0.0, 1.5),
    "tolerance": (float("nan"), 0.0, float("inf")),
    "limit": (float("nan"), 0, -2, float("inf")),
    "start": (float("nan"), 0.0),
    "rounds": (0, -1),
    "rows": (0, -3),
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_number_out_of_its_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}: it must be a (finite|whole) number"):
        calibrate_many(tiny("llama"), plans(1), PROMPTS[:1], **{"kl_budget": 0.1, name: value})
