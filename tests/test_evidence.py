"""The study: its data are split without overlap, it goes on where it stopped, and its report is arithmetic on the lines."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest
from tiny import tiny

import evidence.models
import evidence.study
from evidence.__main__ import main
from evidence.concepts import REPORTING, SOURCES, TUNING, Data, concept
from evidence.report import Table, base_table, beats, draw, factor_table, medians, one, share
from evidence.study import Cell, Results, run
from expertsteer_nnsight.packaged_models import MODELS


@pytest.fixture
def small(monkeypatch):
    """Tiny models in the places of the real ones, and few items."""

    def model(name):
        base, _, seed = name.partition("~")
        arch = {"gemma": "gpt2", "smol": "llama"}[base]
        return tiny(arch, False, 10 + int(seed) if seed else 0)

    for module in (evidence.models, evidence.study):
        monkeypatch.setattr(module, "model", model)
    real = evidence.study.concept

    def few(name, data):
        c = real(name, data)
        return type(c)(name, c.pairs[:12], c.validation[:2], c.test[:3], c.in_domain[:30], c.instruction)

    monkeypatch.setattr(evidence.study, "concept", few)
    original = evidence.study.neutral_tokens
    monkeypatch.setattr(evidence.study, "neutral_tokens", lambda m, texts: original(m, [t[:60] for t in texts[:2]], 2))
    monkeypatch.setattr(evidence.study, "ALIGNERS", {"covariance": evidence.study.ALIGNERS["covariance"]})
    monkeypatch.setattr(evidence.study, "LAYERS", {"one_pair": {"n_pairs": 1}})
    for preset in ("recommended", "paper"):
        real_preset = getattr(evidence.study.es.ExpertSteer, preset)
        changed = functools.partial(lambda made, **kw: made(**{"band": (0.0, 1.0), "n_pairs": 2, **kw}), real_preset)
        monkeypatch.setattr(evidence.study.es.ExpertSteer, preset, changed)


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
    how = {"factors": False, "anchors": 40, "draws": 2, "own": True}
    first = run(Data(None), tmp_path / "a", ["gemma-smol"], ["sentiment"], **how)
    whos = [line["who"] for line in first.lines]
    assert (
        whos.count("untrained") == 3
        and whos.count("random") == 2
        and {"expert", "native", "text_features"} <= set(whos)
    )
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
    cell = Cell("gemma-smol", evidence.study.concept("sentiment", Data(None)), evidence.study.es.example("general")[:60],
                evidence.models.States(tmp_path))  # fmt: skip
    _, layers = cell.base(1)
    arms = list(cell.factors(layers))
    names = {(a.factor, a.level) for a in arms}
    assert {"preset", "aligner", "layers", "direction", "anchors", "labels", "noise", "labels, reads"} <= {
        f for f, _ in names
    }
    keys = [(a.factor, a.level, a.who, a.draw) for a in arms]
    assert len(keys) == len(set(keys))
    for factor, level in names:
        whos = [a.who for a in arms if (a.factor, a.level) == (factor, level)]
        assert whos.count("expert") == 1 and whos.count("untrained") == 2


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
    expert, untrained, beyond, own = medians(table, "p", names, "base", "recommended")
    assert abs(expert[0] - 0.75) < 0.03 and abs(untrained[0] - 0.25) < 0.03 and abs(beyond[0] - 0.5) < 0.03
    assert expert[1] < 0.75 < expert[2] and abs(own[0] - 1) < 1e-9
    assert base_table(table, "p", names).count("\n") == len(names) + 1 and "recommended" in factor_table(
        table, "p", names
    )
    assert beats(table, "p", names) == []
    draw(table, "p", names, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert share([np.ones(5)], None, [np.full(5, 2.0)]) == [0.5, 0.5, 0.5] and one(np.ones(4)) == [1.0, 1.0, 1.0]


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_a_slice_of_the_study_runs_on_the_real_pair(tmp_path, capsys):
    main(["--slice", "--out", str(tmp_path), "--anchors", "100", "--draws", "2", "--items", "12"])
    out = capsys.readouterr().out
    assert "gemma-smol, tuning concepts" in out and "| sentiment | 12 |" in out
