"""The study: its data are split without overlap, it goes on where it stopped, and its report is arithmetic on the lines."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest
from tiny import tiny

import evidence.arms
import evidence.cell
import evidence.models
import evidence.study
from evidence.__main__ import main
from evidence.cell import Cell
from evidence.concepts import ASKED, REPORTING, SOURCES, TUNING, Data, concept
from evidence.report import Table, ahead, base_table, factor_table, filled, medians, one, publish, share, tables
from evidence.study import Measuring, Results, run
from expertsteer_nnsight import ExpertSteer, RidgeAligner, example
from expertsteer_nnsight.packaged_models import MODELS


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
    original = evidence.study.neutral_tokens
    monkeypatch.setattr(evidence.study, "neutral_tokens", lambda m, texts: original(m, [t[:60] for t in texts[:2]], 2))
    monkeypatch.setattr(evidence.arms, "ALIGNERS", {"ridge_rank_2": RidgeAligner(max_rank=2)})
    monkeypatch.setattr(evidence.arms, "LAYERS", {"one_pair": {"n_pairs": 1}})
    for preset in ("recommended", "paper"):
        real_preset = getattr(ExpertSteer, preset)
        changed = functools.partial(lambda made, **kw: made(**{"band": (0.0, 1.0), "n_pairs": 2, **kw}), real_preset)
        monkeypatch.setattr(ExpertSteer, preset, changed)
    monkeypatch.setattr(evidence.arms, "recommended", ExpertSteer.recommended)


def test_a_concepts_texts_are_in_one_place_only():
    assert not set(TUNING) & set(REPORTING) and len(TUNING) <= len(TUNING + REPORTING) / 2
    c = concept("sentiment", Data(None))
    places = [{t for pair in c.pairs for t in pair}, {t for item in c.validation for t in item[1:]},
              {t for item in c.test for t in item[1:]}, set(c.in_domain)]  # fmt: skip
    assert all(places) and len(set.union(*places)) == sum(map(len, places))


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
    assert whos.count("prompted") == 1
    assert all(line["n"] == 3 and np.isclose(line["effect"], np.mean(line["items"]), atol=1e-4) for line in first.lines)
    assert "dog" not in (tmp_path / "a" / "results.jsonl").read_text()
    # cut off in the middle of a line
    path = tmp_path / "a" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:30])
    path.write_text(path.read_text() + "\n")
    again = run(Data(None), tmp_path / "a", ["gemma-smol"], ["sentiment"], **how)
    assert len(again.lines) == len(first.lines) and len(again.keys) == len(first.keys)
    key = Results.key
    values = [{key(line): line["effect"] for line in r.lines} for r in (first, again)]
    assert all(np.isclose(values[0][k], values[1][k], atol=1e-4) for k in values[0])
    calls = []
    monkeypatch.setattr(evidence.study, "either_sign", lambda *a, **k: calls.append(1))
    run(Data(None), tmp_path / "a", ["gemma-smol"], ["sentiment"], **how)
    assert not calls


@pytest.mark.filterwarnings("ignore:.*")
def test_every_factor_makes_its_arms(small, tmp_path):
    cell = Cell("gemma-smol", evidence.study.concept("sentiment", Data(None)), example("general")[:60],
                evidence.models.States(tmp_path))  # fmt: skip
    measuring = Measuring(cell, Results(tmp_path / "results.jsonl"))
    _, layers = evidence.arms.base(cell, 1)
    arms = list(evidence.arms.factors(cell, layers, measuring.neutral, measuring.has))
    factors = {a.factor for a in arms}
    assert factors == {
        "preset",
        "aligner",
        "layers",
        "states",
        "direction",
        "anchors",
        "labelled pairs",
        "flipped labels",
        "labels",
    }
    keys = [(a.factor, a.level, a.who, a.draw) for a in arms]
    assert len(keys) == len(set(keys))
    for factor, level in {(a.factor, a.level) for a in arms}:
        whos = [a.who for a in arms if (a.factor, a.level) == (factor, level)]
        assert whos.count("expert") == 1
        # an arm where the map changes is compared with two untrained experts, one where native changes with native
        assert whos.count("untrained") == 2 * (
            factor in ("preset", "aligner") or (factor == "anchors" and level != "further ends")
        )
        changed = factor in ("layers", "direction", "states", "labelled pairs", "flipped labels", "labels")
        assert whos.count("native") == (changed or (factor, level) == ("preset", "in_domain"))
    measured = {k for k in keys if k[0] != "layers"}
    again = evidence.arms.factors(cell, layers, measuring.neutral, lambda *key: key in measured)
    assert {a.factor for a in again} == {"layers"}


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
    near = {"expert": 0.75, "untrained": 0.25, "beyond": 0.5, "own": 1.0, "ahead": -0.25}
    for name, value in near.items():
        middle, low, high = found[name] or (np.nan,) * 3
        assert abs(middle - value) < 0.03 and low <= middle <= high
    assert base_table(table, "p", names).count("\n") == len(names) + 2
    assert "recommended" in factor_table(table, "p", names) and ahead(table, "p") == []
    assert abs(table.null("p", names[0], "base", "recommended", "random") - 1.96 * 0.1) < 0.05
    assert share([np.ones(5)], None, [np.full(9, 2.0)]) == [0.5, 0.5, 0.5] and one(np.ones(4)) == [1.0, 1.0, 1.0]


def test_an_expert_ahead_of_native_is_found_on_the_tuning_concepts_and_looked_up_on_the_others():
    effects = {(n, w): m for n in TUNING for w, m in (("native", 1.0), ("expert", 1.5))}
    effects |= {(n, w): m for n in REPORTING for w, m in (("native", 1.0), ("expert", 0.9))}
    ((factor, level, first, second),) = ahead(Table(lines(effects)), "p")
    assert (factor, level) == ("base", "recommended") and second is not None
    assert abs(first[0] - 0.5) < 0.05 and abs(second[0] + 0.1) < 0.05


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
    with pytest.raises(KeyError, match="base q"):
        filled("<!-- table: base q -->\n<!-- end -->", Table(made))


def test_every_concept_has_its_instructions_and_its_question():
    assert set(ASKED) == {*TUNING, *REPORTING} and all(len(v) == 5 and all(v) for v in ASKED.values())


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_a_slice_of_the_study_runs_on_the_real_pair(tmp_path, capsys):
    main(["--slice", "--out", str(tmp_path), "--anchors", "100", "--draws", "2", "--items", "8"])
    out = capsys.readouterr().out
    assert "base gemma-smol tuning" in out and "| sentiment | 8 |" in out
