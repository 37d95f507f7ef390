"""Accuracies compared on the same items: statistics against other libraries, and what a receipt says of planted answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from expertsteer_nnsight.measure.answers import AnswersReceipt, compared, holm

rng = np.random.default_rng(0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_mcnemar_is_twice_the_tail_of_a_fair_coin(pairs):
    a, b = zip(*pairs, strict=True)
    found = compared(a, b)
    gained, lost = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    n = gained + lost
    tail = 2 * binom.cdf(min(gained, lost), n, 0.5) if n else 1.0
    assert (found["gained"], found["lost"]) == (gained, lost)
    assert found["p"] == pytest.approx(min(1.0, tail))
    assert found["difference"] == pytest.approx((gained - lost) / len(pairs))
    assert found["low"] <= found["difference"] + 1e-12 and found["high"] >= found["difference"] - 1e-12


def test_two_arms_on_the_same_items():
    found = compared([1, 1, 1, 0, 1, 1] * 10, [0, 1, 1, 0, 0, 1] * 10)
    assert found["difference"] == pytest.approx(1 / 3) and found["low"] < 1 / 3 < found["high"]
    assert found["p"] == pytest.approx(2 * 0.5**20)  # twenty items gained, none lost
    same = compared([1, 0], [1, 0])
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    # McNemar looks at the items that changed alone
    few = compared([1] * 3 + [0] * 1 + [1] * 96, [0] * 3 + [1] * 1 + [1] * 96)
    assert few["p"] == pytest.approx(2 * sum(math.comb(4, k) for k in (3, 4)) / 16)
    assert compared([1], [0])["difference"] == 1  # one item has no interval


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_its_definition(p):
    found, order = holm(p), np.argsort(p, kind="stable")
    for place, i in enumerate(order):
        assert found[i] == pytest.approx(max(min(1.0, p[j] * (len(p) - k)) for k, j in enumerate(order[: place + 1])))


def answers(right, accuracy):
    """Answers to questions of four options, rightly at a rate."""
    wrong = (right + 1 + rng.integers(0, 3, len(right))) % 4
    return np.where(rng.random(len(right)) < accuracy, right, wrong)


def planted(live, controls):
    right = rng.integers(0, 4, 800)
    expert = answers(right, 0.9)
    arms = {"unsteered": answers(right, 0.4), "expert alone": expert}
    arms["live"] = np.where(rng.random(800) < live, expert, arms["unsteered"])
    for name in ("another prompt", "untrained, seed 1", "own layer"):
        arms[name] = np.where(rng.random(800) < controls, expert, arms["unsteered"])
    return AnswersReceipt({k: v.tolist() for k, v in arms.items()}, right.tolist())


def test_transfer_is_said_where_live_exceeds_every_control_and_nowhere_else():
    good, beside, none = planted(0.5, 0.0), planted(0.5, 0.5), planted(0.0, 0.0)
    assert good.transferred and "reached the target" in good.verdict
    value, low, high = good.share
    assert low < 0.5 < high and value == pytest.approx(0.5, abs=0.1)
    assert beside.transferred is False and "no transfer is shown: live less " in beside.verdict
    assert none.transferred is False and none.comparisons["unsteered"]["p"] == 1.0
    assert good.moved["to the expert's"] > 5 * good.moved["away from it"] == 0
    right = good.right
    without = AnswersReceipt({k: v for k, v in good.answers.items() if not k.startswith("untrained")}, right)
    assert without.transferred is None and "does not say what the expert contributed" in without.verdict
    # one control that does as well is enough
    spoilt = AnswersReceipt({**good.answers, "own layer": good.answers["live"]}, right)
    assert spoilt.transferred is False and "own layer" in spoilt.verdict
    # the nearest is the one that is furthest ahead of live, however sure its p is
    ahead = AnswersReceipt({**good.answers, "own layer": good.answers["live"], "mean": right}, right)
    assert (
        ahead.comparisons["mean"]["holm"] < 1e-6
        and ahead.nearest(ahead.controls) == "mean"
        and "less mean" in ahead.verdict
    )
    # an expert on every prompt is no control
    every = AnswersReceipt({**good.answers, "every prompt by live expert 0": right}, right)
    assert every.transferred and every.controls == good.controls


def test_a_receipt_prints_and_goes_through_a_file(tmp_path):
    found = planted(0.5, 0.0)
    text = str(found)
    assert all(name in text for name in found.answers) and "Answers: " in text
    again = AnswersReceipt.load(found.save(tmp_path / "receipt.json"))
    assert str(again) == text and again.to_dict() == found.to_dict()


def test_what_is_no_receipt_is_refused():
    with pytest.raises(ValueError, match="no live"):
        AnswersReceipt({"unsteered": [0]}, [0])
    with pytest.raises(ValueError, match="arm live has 2 answers to 1 questions"):
        AnswersReceipt({"unsteered": [0], "live": [0, 1]}, [0])


def test_a_share_of_hardly_any_lead_is_not_told():
    right = [0] * 20
    arms = {"unsteered": [1] * 20, "live": [0] * 2 + [1] * 18, "expert alone": [0] * 3 + [1] * 17}
    found = AnswersReceipt(arms, right)
    assert found.share is None and "nan" not in str(found)
