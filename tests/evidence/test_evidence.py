"""The study: its data are split without overlap, it goes on where it stopped, and its report is arithmetic on the lines."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

import evidence.anchor_grid as anchor_grid
import evidence.arms
import evidence.cell
import evidence.models
import evidence.study
import expertsteer_nnsight as es
from evidence.__main__ import main
from evidence.cell import Cell
from evidence.concepts import ASKED, OPENINGS, REPORTING, SOURCES, TUNING, WRITTEN, Data, concept
from evidence.report import above_table, ahead, base_table, factor_table, filled, medians, publish, summary, tables
from evidence.shares import FEW, WIDENED, Table, mean_over, one, over
from evidence.splits import Apart
from evidence.study import Measuring, Results, run
from expertsteer_nnsight import ExpertSteer, RidgeAligner, example
from expertsteer_nnsight.models.packaged import MODELS


@pytest.fixture
def small(monkeypatch):
    """Tiny models in the places of the real ones, and few items."""

    def model(name):
        base, _, seed = name.partition("~")
        arch = {"gemma": "gpt2", "smol": "llama"}[base]
        return tiny(arch, False, 10 + int(seed) if seed else 0)

    for module in (evidence.models, evidence.cell, evidence.arms, evidence.study):
        monkeypatch.setattr(module, "model", model)
    real = evidence.study.concept

    def few(name, data):
        c = real(name, data)
        return type(c)(name, c.pairs[:12], c.validation[:2], c.test[:3], c.in_domain[:30], c.instruction, c.question)

    monkeypatch.setattr(evidence.study, "concept", few)
    monkeypatch.setattr(evidence.study, "OPENINGS", {})  # the judge is a real model: the slice has it
    original = evidence.study.neutral_tokens
    monkeypatch.setattr(evidence.study, "neutral_tokens", lambda m, texts: original(m, [t[:60] for t in texts[:2]], 2))
    monkeypatch.setattr(evidence.arms, "ALIGNERS", {"ridge_rank_2": RidgeAligner(max_rank=2)})
    monkeypatch.setattr(evidence.arms, "LAYERS", {"one_pair": {"n_pairs": 1}})
    for preset in ("recommended", "paper"):
        real_preset = getattr(ExpertSteer, preset)
        changed = functools.partial(lambda made, **kw: made(**{"band": (0.0, 1.0), "n_pairs": 2, **kw}), real_preset)
        monkeypatch.setattr(ExpertSteer, preset, changed)
    monkeypatch.setattr(evidence.arms, "recommended", ExpertSteer.recommended)


@pytest.mark.parametrize("name", ["sentiment", *WRITTEN])
def test_a_concepts_texts_are_in_one_place_only(name):
    assert not {*TUNING, *WRITTEN} & set(REPORTING) and len(TUNING) <= len(TUNING + REPORTING) / 2
    c = concept(name, Data(None))
    places = [{t for pair in c.pairs for t in pair}, {t for item in c.validation for t in item[1:]},
              {t for item in c.test for t in item[1:]}, set(c.in_domain)]  # fmt: skip
    assert all(places[:3]) and len(set.union(*places)) == sum(map(len, places))
    apart = Apart()
    assert all(apart.take(text) for place in places[:3] for text in sorted(place))  # no near copies either
    assert not any(map(apart.near, places[3]))
    assert len(c.pairs) >= 50 and len(c.test) >= 32 and not set.union(*places[:3]) & set(example("general"))


def test_every_model_of_a_pair_can_be_made():
    names = {name for pair in evidence.models.PAIRS.values() for name in pair}
    assert all(evidence.models.FILES[name] in MODELS for name in names)


def test_files_are_compared_with_their_hash(tmp_path):
    name = "repe/anger.json"
    with pytest.raises(FileNotFoundError, match="leave --data out"):
        Data(tmp_path).read(name)
    (tmp_path / "repe").mkdir()
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match="not the version of commit"):
        Data(tmp_path).read(name)
    assert all(re.fullmatch("[0-9a-f]{40}", v[1]) and re.fullmatch("[0-9a-f]{64}", v[3]) for v in SOURCES.values())


@pytest.mark.filterwarnings("ignore:The direction's correlation")
@pytest.mark.filterwarnings("ignore:.*")
def test_the_study_goes_on_where_it_stopped_and_repeats_itself(small, tmp_path, monkeypatch):
    how = {"vary": False, "anchors": 40, "draws": 2, "own": True}
    first = run(Data(None), tmp_path / "a", ["gemma-smol"], ["sentiment"], **how)
    whos = [line["who"] for line in first.lines]
    assert (
        whos.count("untrained") == 3
        and whos.count("random") == 2
        and {"expert", "native", "text_features"} <= set(whos)
    )
    assert whos.count("prompted") == whos.count("unsteered") == 1
    assert all(line["n"] == 3 and np.isclose(line["effect"], np.mean(line["items"]), atol=1e-4) for line in first.lines)
    assert "dog" not in (tmp_path / "a" / "results.jsonl").read_text()
    # cut off in the middle of a line
    path = tmp_path / "a" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:30])
    assert len(Results(path).lines) == 4 and path.read_text() == "".join(lines[:4])
    path.write_text("".join(lines[:4]) + lines[4][:30])
    again = run(Data(None), tmp_path / "a", ["gemma-smol"], ["sentiment"], **how)
    assert len(again.lines) == len(first.lines) and len(again.keys) == len(first.keys)
    key = Results.key
    values = [{key(line): line["effect"] for line in r.lines} for r in (first, again)]
    assert all(np.isclose(values[0][k], values[1][k], atol=1e-4) for k in values[0])
    calls = []
    monkeypatch.setattr(evidence.study, "either_sign", lambda *a, **k: calls.append(1))
    run(Data(None), tmp_path / "a", ["gemma-smol"], ["sentiment"], **how)
    assert not calls
    with pytest.raises(ValueError, match="take another --out"):
        run(Data(None), tmp_path / "a", ["gemma-smol"], ["sentiment"], **{**how, "anchors": 41})


@pytest.mark.filterwarnings("ignore:.*")
def test_every_factor_makes_its_arms(small, tmp_path, monkeypatch):
    cell = Cell("gemma-smol", evidence.study.concept("sentiment", Data(None)), example("general")[:60],
                evidence.models.States(tmp_path))  # fmt: skip
    measuring = Measuring("gemma-smol", "sentiment", Results(tmp_path / "results.jsonl"))
    _, layers = evidence.arms.base(cell, 1)
    arms = list(evidence.arms.factors(cell, layers, measuring.neutral, measuring.has))
    factors = {a.factor for a in arms}
    assert factors == {"preset", "aligner", "layers", "states", "direction", "anchors", "labels"}
    keys = [(a.factor, a.level, a.who, a.draw) for a in arms]
    assert len(keys) == len(set(keys))
    for factor, level in {(a.factor, a.level) for a in arms}:
        whos = [a.who for a in arms if (a.factor, a.level) == (factor, level)]
        drawn = level in ("8 pairs", "32 pairs", "30 % flipped")
        assert whos.count("expert") == (level != "native's sweep") + (drawn or level in ("50", "200"))
        # where labels could be carried over without the expert there are two untrained ones, where native changes there is native
        alone = factor == "preset" or level in ("200", "in_domain", "generic+in_domain", "own view")
        assert whos.count("untrained") == 2 * (alone or drawn)
        changed = factor in ("preset", "layers", "direction", "states", "labels")
        assert whos.count("native") == changed * (1 + drawn)
        assert whos.count("text_features") == 2 * drawn + ((factor, level) == ("anchors", "in_domain"))
    (a, b) = (arm.plan for arm in arms if (arm.level, arm.who) == ("8 pairs", "expert"))
    assert not np.allclose(a.vectors[0].direction, b.vectors[0].direction)  # a draw is of pairs
    wider = list(evidence.arms.widened(cell, measuring.has))
    assert [a.who for a in wider] == ["expert"] + 3 * ["untrained"] + ["text_features"]
    assert all(a.plan.layers == wider[0].plan.layers and a.items is None for a in wider)
    (plain,) = (a for a in arms if (a.level, a.who) == ("generic+in_domain", "expert"))
    assert torch.equal(wider[0].plan.vectors[0].direction, plain.plan.vectors[0].direction) == (
        wider[0].plan.layers == plain.plan.layers
    )
    monkeypatch.setattr(evidence.arms, "FEW_ANCHORS", 30)
    some = list(evidence.arms.few(cell, measuring.has))
    assert [a.who for a in some] == [a.who for a in wider] and {a.level for a in some} == {FEW}
    assert not torch.equal(some[0].plan.vectors[0].direction, arms[0].plan.vectors[0].direction)
    # further places are rows of their texts, for states and for text features
    states, texts = cell.read("gemma"), cell.anchor_texts()
    assert states.n_texts == len(texts) > 3 * len(cell.anchors)
    rows = cell.read("gemma", texts=[3, 5])
    assert set(rows.text_of or ()) == {3, 5} and rows.whole.n_texts == 2
    assert torch.equal(rows.whole[1], cell.read("gemma", "ends alone")[1][[3, 5]])
    cell.concept.in_domain.clear()
    assert not list(evidence.arms.widened(cell, measuring.has))  # some concepts have no such texts
    measured = {k for k in keys if k[0] != "layers"}
    again = evidence.arms.factors(cell, layers, measuring.neutral, lambda *key: key in measured)
    assert {a.factor for a in again} == {"layers"}


def test_near_copies_are_kept_apart():
    apart = Apart()
    assert apart.take("I think it's important to help.") and not apart.take("I think it\u2019s important to help!")
    assert apart.near("They say: I think it's important to help, always.") and apart.take("No such thing.")
    assert list(apart.pairs(["one two", "one two", "three four"], ["five six", "seven eight", "nine ten"])) == [
        ("one two", "five six"), ("three four", "seven eight")]  # fmt: skip


def test_questions_of_yes_or_no_are_left_out_and_the_positive_side_does_not_give_in():
    stems = [f"{word} question about it?" for word in ("alpha", "beta", "gamma", "delta", "epsilon")]
    options = [("Yes.", "Never at all."), ("No, thanks.", "Rule them."), ("*No, I decline.", "Take it."),
               ("I would not.", "I would."), ("Give it back to people.", "Keep all of it for myself.")]  # fmt: skip
    rows = [{"question": f"Question: {stem}\n\nChoices:\n (A) {a}\n (B) {b}\n\nAnswer:", "answer_matching_behavior": " (A)",
             "answer_not_matching_behavior": " (B)"} for stem, (a, b) in zip(stems, options, strict=True)]  # fmt: skip

    class Rows(Data):
        def json(self, name):
            return rows

    assert concept("power", Rows(None)).test == [(stems[-1], " Keep all of it for myself.", " Give it back to people.")]


def lines(effects):
    rng = np.random.default_rng(0)
    for (name, who), mean in effects.items():
        items = (mean + 0.1 * rng.normal(size=50)).tolist()
        yield {"pair": "p", "concept": name, "factor": "base", "level": "recommended", "who": who, "draw": 0,
               "items": items, "effect": float(np.mean(items)), "n": 50}  # fmt: skip


def test_the_report_is_arithmetic_on_the_lines(tmp_path):
    names = list(REPORTING)
    whos = {"native": 2.0, "expert": 1.5, "untrained": 0.5, "text_features": 0.2, "permuted": 0.1, "random": 0.1}
    table = Table(json.loads(json.dumps(list(lines({(n, w): m for n in names for w, m in whos.items()})))))
    found = medians(table, "p", names, "base", "recommended")
    near = {
        "expert": 0.75,
        "untrained": 0.25,
        "beyond": 0.5,
        "beyond_text": 0.65,
        "own": 1.0,
        "ahead": -0.25,
        "change": 0.0,
    }
    assert set(found) == set(near)
    for name, value in near.items():
        middle, low, high = found[name] or (np.nan,) * 3
        assert abs(middle - value) < 0.03 and low <= middle <= high
    assert base_table(table, "p", names).count("\n") == len(names) + 2
    assert factor_table(table, "p", names).count("\n") == 1 and ahead(table, "p") == []  # no factor was varied
    # one draw of 0.1: Student's t with one degree of freedom
    assert abs(table.null("p", names[0], "base", "recommended", "random") - 12.7 * 0.1) < 0.4
    assert one(np.ones((1, 4))) == [1.0, 1.0, 1.0]
    assert over({"a": np.ones((1, 5))}, {"a": np.full((1, 9), 2.0)}) == [0.5, 0.5, 0.5]


def test_wider_anchors_have_a_table_of_their_own_in_units_of_the_same_native_effect():
    whos = {"native": 2.0, "expert": 1.0, "untrained": 0.0, "text_features": 0.0, "random": 0.01}
    made = list(lines({("happiness", w): m for w, m in whos.items()}))
    better = lines({("happiness", w): m for w, m in {"expert": 3.0, "untrained": 1.0, "text_features": 0.5}.items()})
    made += [{**line, "level": WIDENED} for line in better]
    found = tables(Table(made))
    assert "| 0.5" in found["base p reporting"] and f"{WIDENED} p reporting" in found
    row = found[f"{WIDENED} p reporting"].splitlines()[2]
    assert "| 1.5" in row or "| 1.4" in row


def test_a_factor_on_few_items_is_told_in_units_of_all_items():
    def line(who, factor, level, items):
        return {"pair": "p", "concept": TUNING[0], "factor": factor, "level": level, "who": who, "draw": 0, "items": items,
                "effect": float(np.mean(items)), "n": len(items)}  # fmt: skip

    half = 32 * [2.0]  # native does more on the items that factors are compared on
    made = [line("native", "base", "recommended", half + 32 * [1.0]), line("random", "base", "recommended", 64 * [0.01]),
            line("expert", "base", "recommended", half + 32 * [0.5]), line("expert", "labels", "few", 32 * [1.0])]  # fmt: skip
    rows = {row.split(" | ")[1]: row for row in factor_table(Table(made), "p", TUNING).splitlines()}
    assert "| 1 | 1.00 [1.00, 1.00] | 0.00 [0.00, 0.00] |" in rows["recommended"]  # as native on the same items
    assert "| 1 | 0.33 [" in rows["few"] and "| -0.67 [" in rows["few"]  # 1 - 1 / 1.5


def test_concepts_that_native_does_not_steer_count_in_no_median():
    whos = {"native": 2.0, "expert": 1.0, "untrained": 0.0, "text_features": 0.0, "random": 0.01}
    weak = {**whos, "native": 0.05, "expert": 5.0}
    table = Table(
        lines({(n, w): m for n, arms in zip(REPORTING[:2], (whos, weak), strict=True) for w, m in arms.items()})
    )
    assert table.steerable("p", REPORTING) == [REPORTING[0]]
    text = base_table(table, "p", REPORTING)
    assert "| **median** |  |  |  | 0.5" in text and "| (15" in text and "with those in brackets" in text


def test_where_the_expert_exceeds_native_is_told_for_tuning_and_reported_concepts_apart():
    whos = {"native": 1.0, "random": 0.01}
    made = list(lines({(n, w): m for n in (*TUNING[:2], *REPORTING[:2]) for w, m in whos.items()}))
    ahead_of = {TUNING[0]: 5.0, TUNING[1]: 6.0, REPORTING[0]: 5.0, REPORTING[1]: -4.0}
    made += lines({(n, "expert"): m for n, m in ahead_of.items()})
    header, _, tuning, reported = above_table(Table(made), "p").splitlines()
    assert "p (above 0)" in header and f"| {TUNING[0]}, {TUNING[1]} | none |" in tuning
    assert f"| {REPORTING[0]} | {REPORTING[1]} |" in reported and "above p" in tables(Table(made))


@given(st.integers(0, 1000))
def test_an_interval_holds_the_spread_of_draws(seed):
    x = np.random.default_rng(seed).normal(size=(3, 40)) + np.array([[-1.0], [0.0], [1.0]])
    value, low, high = one(x)
    assert low <= value <= high and high - low > 1  # three draws this far apart
    assert (one(x, x, np.ones((1, 40)))[0]) == 0.0


def test_draws_and_items_are_covered_as_often_as_said():
    """Three seeds whose spread is larger than that of the items, and two draws that both sides share."""
    rng = np.random.default_rng(0)
    seeds, paired, false = [], [], []
    for _ in range(300):
        nets = rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(3, 40))
        _, low, high = one(np.ones((1, 40)), nets)
        seeds.append(low < 1 < high)
        draws = 2 * rng.normal(size=(2, 1)) + rng.normal(size=(2, 40))  # what pairs were drawn matters for both alike
        gap = 0.3 + 0.02 * rng.normal(size=(2, 1))
        _, low, high = one(draws + gap, draws)
        paired.append(low > 0)
        rows = {n: rng.normal(size=(2, 1)) + rng.normal(size=(2, 40)) for n in "abc"}
        found = mean_over(rows, {n: np.zeros((1, 40)) for n in "abc"})
        assert found is not None
        false.append(found[1] < 0.05)
    assert np.mean(seeds) > 0.92 and np.mean(paired) > 0.6 and np.mean(false) < 0.08


def test_the_mean_over_concepts_is_tested_for_these_concepts():
    rows = {n: np.full((1, 8), 1.5) for n in "ab"}
    units = {n: np.ones((1, 8)) for n in "ab"}
    found = mean_over(rows, units)
    assert found is not None and found[0] == [0.5, 0.5, 0.5] and found[1] < 0.001 and found[2]
    below = mean_over({**rows, "b": np.zeros((1, 8))}, units)
    assert below is not None and not below[2] and below[1] == 1.0
    assert mean_over({}, units) is None


def test_an_expert_ahead_of_native_is_found_on_the_tuning_concepts_and_tested_on_the_others():
    base = {"native": 1.0, "expert": 1.0, "random": 0.001}
    effects = {(n, w): m for n in (*TUNING, *REPORTING) for w, m in base.items()}
    made = list(lines(effects))
    for level, better in (("good", (1.5, 1.4)), ("lucky", (1.5, 0.9)), ("bad", (0.5, 1.5))):
        for concepts, mean in zip((TUNING, REPORTING), better, strict=True):
            made += [{**x, "factor": "labels", "level": level} for x in lines({(n, "expert"): mean for n in concepts})]
    found: dict[str, Any] = {level: rest for _, level, *rest in ahead(Table(made), "p")}
    assert set(found) == {"good", "lucky"}
    assert abs(found["good"][0][0] - 0.5) < 0.06 and abs(found["good"][1][0] - 0.4) < 0.06
    assert found["good"][3] < 0.01 and found["lucky"][3] > 0.5
    rare = [x for x in made if x["level"] != "good" or x["concept"] in (TUNING[0], REPORTING[0])]
    assert {level for _, level, *_ in ahead(Table(rare), "p")} == {"lucky"}  # not on every concept
    assert factor_table(Table(made), "p", TUNING).count("\n") == 1 + 1 + 3  # the base is the first row


def test_a_page_is_filled_with_tables_and_filling_it_again_changes_nothing(tmp_path):
    whos = {"native": 2.0, "expert": 1.5, "untrained": 0.5, "text_features": 0.2, "permuted": 0.1, "random": 0.1}
    made = list(lines({(n, w): m for n in REPORTING for w, m in whos.items()}))
    page = tmp_path / "evidence.md"
    page.write_text("before\n<!-- table: base p reporting -->\nold\n<!-- end -->\nafter\n")
    publish(made, page)
    text = page.read_text()
    assert "old" not in text and tables(Table(made))["base p reporting"] in text and text.endswith("after\n")
    stored = [json.loads(line) for line in (tmp_path / "evidence" / "results.jsonl").read_text().splitlines()]
    assert filled(text, Table(stored)) == text and (tmp_path / "evidence" / "base.png").stat().st_size > 5000
    with pytest.raises(SystemExit):  # nothing to draw
        main(["--out", str(tmp_path / "none"), "--redraw", "--publish", str(page)])
    assert page.read_text() == text
    unmet = [{**made[0], "met": False}, *made[1:]]
    assert Table(unmet).unmet == 1 and "1 arms met no KL budget" in summary(Table(unmet))
    # tables of an earlier base, on the same page
    page.write_text(
        "<!-- table: earlier base p reporting -->\n<!-- end -->\n<!-- table: base p reporting -->\n<!-- end -->\n"
    )
    whole = [{**line, "effect": 3 * line["effect"], "items": [3 * x for x in line["items"]]} for line in made]
    (tmp_path / "evidence" / "earlier.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole))
    publish(made, page)
    both = [tables(Table(x))["base p reporting"] for x in (whole, made)]
    assert both[0] != both[1] and page.read_text().index(both[0]) < page.read_text().index(both[1])
    with pytest.raises(KeyError, match="base q"):
        filled("<!-- table: base q -->\n<!-- end -->", Table(made))


def test_what_a_judge_made_of_continuations_is_told_beside_what_they_cost():
    means = {"native": 1.0, "expert": 1.5, "untrained": 0.0, "text_features": 0.2, "random": 0.01, "prompted": 0.3}
    made = [
        {
            **line,
            "factor": "judge",
            "level": "rollouts",
            "judge_accuracy": 0.9,
            "rollout_nll": [2.0, 3.0],
            "repetition": [0.1, 0.3],
        }
        for line in lines({(n, w): m for n in ("happiness", "finance") for w, m in means.items()})
    ]
    text = tables(Table(made))["judge p reporting"]
    row = next(line for line in text.splitlines() if "finance" in line)
    assert (
        "| 50 | 0.90 | 0.99 [" in row
        and "| 1.50 [" in row
        and "| 2.50 / 2.50 | 0.20 / 0.20 |" in row
        and "| 0.29 |" in row
    )
    assert "p = 0.0005" in text.splitlines()[-1]  # the least that 2000 resamples can tell
    stopped = [x for x in made if (x["concept"], x["who"]) != ("finance", "native")]
    assert "| finance |" not in tables(Table(stopped))["judge p reporting"]
    assert tables(Table(x for x in made if x["who"] != "native"))["judge p reporting"] == "Not measured yet."


def test_openings_hold_no_labelled_text():
    probe = es.example("sentiment_probe")
    assert set(OPENINGS) < set(ASKED) and all(len(set(texts)) == 24 for texts in OPENINGS.values())
    assert not set(OPENINGS["sentiment"]) & set(probe["test_prompts"])


def test_every_concept_has_its_instructions_and_its_question():
    assert set(ASKED) == {*TUNING, *REPORTING, *WRITTEN} and all(len(v) == 5 and all(v) for v in ASKED.values())


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_a_slice_of_the_study_runs_on_the_real_pair(tmp_path, capsys):
    main(["--slice", "--out", str(tmp_path), "--anchors", "100", "--draws", "1", "--items", "4"])
    out = capsys.readouterr().out
    assert "base gemma-smol tuning" in out and "judge gemma-smol tuning" in out and out.count("| sentiment | 4 |") == 2


@pytest.mark.filterwarnings("ignore:.*")
def test_the_grid_of_anchors_fits_maps_on_rows_of_the_anchors_and_goes_on(small, tmp_path, monkeypatch):
    monkeypatch.setattr(anchor_grid, "model", evidence.models.model)
    monkeypatch.setattr(anchor_grid, "ANCHORS", (20, 40))
    monkeypatch.setattr(anchor_grid, "PLACES", (0, 2))
    monkeypatch.setattr(anchor_grid, "UNTRAINED", {"ridge": ((20, 2),)})
    monkeypatch.setattr(anchor_grid, "MIXED", ((20, 2),))
    monkeypatch.setattr(anchor_grid, "ALIGNERS", {"ridge": RidgeAligner()})
    monkeypatch.setattr(anchor_grid, "CONCEPTS", ("sentiment",))
    known = {name: evidence.study.concept(name, Data(None)) for name in ("sentiment", "politeness")}
    grid = anchor_grid.Grid("gemma-smol", example("general")[:50], known, tmp_path / "states")
    states = grid.anchors("gemma")
    rows = grid.rows(20, 2)
    counts = np.bincount([states.text_of[i] for i in rows])
    assert (counts > 0).sum() == 20 and counts.max() == 3 and len(grid.rows(20, 0)) == 20
    # the same as reading the texts at those places
    ends = anchor_grid.shared_ends(grid.texts, grid.known, 2)
    read = es.collect(evidence.models.model("gemma"), grid.texts, list(states.layers), ends=ends, progress=False)
    mine = [i for i, text in enumerate(read.text_of) if counts[text : text + 1].sum()]
    torch.testing.assert_close(states[states.layers[0]][rows], read[states.layers[0]][mine])
    results = Results(tmp_path / "anchors.jsonl")
    anchor_grid.measure(grid, results, ["sentiment"])
    whos = [line["who"] for line in results.lines]
    assert whos.count("expert") == 5 and whos.count("untrained") == 2 and whos.count("native") == 1
    assert all(abs(x - 1) < 1e-5 for line in results.lines if line["who"] == "native" for x in line["cosine"])
    some = Results(tmp_path / "some.jsonl")
    anchor_grid.measure(grid, some, ["sentiment"], [anchor_grid.REGISTERS])
    assert {line["factor"] for line in some.lines} == {"native", anchor_grid.REGISTERS}
    monkeypatch.setattr(evidence.study, "either_sign", lambda *a, **k: pytest.fail("measured again"))
    anchor_grid.measure(grid, Results(tmp_path / "anchors.jsonl"), ["sentiment"])
    # other registers are the other concepts' texts, unlabelled: a map of both is that of the two stacked
    x, y = (grid.anchors(who)[layer][rows] for who, layer in zip(("gemma", "smol"), grid.pairs[0], strict=False))
    mine = [
        grid.labelled(who, "politeness")[layer] for who, layer in zip(("gemma", "smol"), grid.pairs[0], strict=False)
    ]
    v = (
        RidgeAligner()
        .fit(torch.cat([x, mine[0]]), torch.cat([y, mine[1]]))
        .map_direction(grid.difference("gemma", "sentiment", grid.pairs[0].expert), "displacement")
    )
    plan = grid.plans("gemma", (anchor_grid.REGISTERS, 20, 2))["sentiment"]
    vector = next(one for one in plan.vectors if one.layer == grid.pairs[0].target)
    assert torch.cosine_similarity(v.double(), vector.direction.double(), dim=0) > 0.9999
    page = tmp_path / "anchors.md"
    page.write_text("<!-- table: ridge gemma-smol -->\n<!-- end -->\n")
    anchor_grid.main(["--redraw", "--out", str(tmp_path), "--publish", str(page)])
    assert (
        "| anchors | 0 further places | 2 further places |" in page.read_text()
        and (tmp_path / "anchors" / "anchors.png").stat().st_size > 5000
    )
    (tmp_path / "anchors" / "anchors.jsonl").write_text('{"pair": "of an earlier grid"}\n')
    anchor_grid.main(["--redraw", "--out", str(tmp_path), "--publish", str(page)])
    stored = (tmp_path / "anchors" / "anchors.jsonl").read_text()
    assert stored == (tmp_path / "anchors.jsonl").read_text()
    with pytest.raises(SystemExit):
        anchor_grid.main(["--redraw", "--out", str(tmp_path / "none")])


def test_a_grids_tables_are_shares_of_the_native_effect():
    def line(who, factor, level, effect):
        return {"pair": "p", "concept": "sentiment", "factor": factor, "level": level, "who": who, "draw": 0,
                "cosine": [effect / 2], "effect": effect, "items": 8 * [effect]}  # fmt: skip

    made = [line("native", "native", "native", 2.0), line("expert", "ridge", anchor_grid.level(300, 2), 1.0),
            line("untrained", "ridge", anchor_grid.level(300, 6), 0.2)]  # fmt: skip
    found = anchor_grid.tables(made)
    assert "| 300 |  | 0.50 [0.50, 0.50] |" in found["ridge p"]
    assert "| 300 |  |  |  | 0.10 [0.10, 0.10] |" in found["untrained, ridge p"]


def test_the_cosine_is_told_beside_the_share_that_it_predicts():
    def line(who, cosine, effect):
        return {"pair": "p", "concept": "c", "factor": "f", "level": str((cosine, effect)), "who": who, "draw": 0,
                "cosine": [cosine], "effect": effect, "items": [effect]}  # fmt: skip

    made = [line("native", 1.0, 2.0), *(line("expert", c, e) for c, e in ((0.65, 2.0), (0.62, 3.0), (0.05, 0.2)))]
    table = anchor_grid.tables(made)["cosine p"].splitlines()
    assert "| -1 to 0.1 | 1 | 0.10 [" in table[2] and table[2].endswith("| 100% |")
    assert "| 0.6 to 0.7 | 2 | 1.25 [" in table[3] and table[3].endswith("| 0% |")
