"""The measurement of live experts: it goes on where it stopped, measures each item once, and draws its tables from lines alone."""

from __future__ import annotations

import functools

import pytest
import tiny
from question_sets import write_sets

import expertsteer_nnsight as es
from evidence import live as study
from expertsteer_nnsight.fit.live_controls import answered, live_arms


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of question sets, and a study of tiny models."""
    write_sets(tmp_path / "data", 40)
    named = {"gemma": functools.partial(tiny.tiny, "gemma3", bos=True), "smol": functools.partial(tiny.tiny, "llama")}
    monkeypatch.setattr(study, "model", lambda name: named[name]())
    for name, value in {
        "GENERAL": 10,
        "TRAINING": 6,
        "SCREENED": 12,
        "VALIDATION": 4,
        "CHUNK": 5,
        "LEAD": -1.0,
    }.items():
        monkeypatch.setattr(study, name, value)
    return tmp_path


def test_a_study_goes_on_where_it_stopped_and_measures_each_item_once(small, monkeypatch):
    where = (small / "data", small / "out", ["gemma-smol"], ["arc_easy"], 10)
    done, whole = [], study.answered

    def interrupted(*args, **how):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return whole(*args, **how)

    monkeypatch.setattr(study, "answered", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run(*where)
    with (small / "out" / "live.jsonl").open("a") as file:
        file.write('{"version": 1, "pair"')  # cut off while it was written
    monkeypatch.setattr(study, "answered", whole)
    lines = study.run(*where)
    assert [line["stage"] for line in lines] == ["screen", "chosen", "test", "test"]
    assert study.run(*where) == lines == study.Results(small / "out" / "live.jsonl").lines
    test = study.questions("arc_easy", "test", small / "data", 10)
    chosen = lines[1]
    for setting, how in study.SETTINGS.items():
        found = study.receipts(lines)["gemma-smol", "arc_easy", setting]
        assert list(found.right) == [right for _, _, right in test.items]
        settings = {"layers": [tuple(p) for p in chosen["layers"]], "amount": chosen["amount"], **how}
        texts = study.anchors("arc_easy", small / "data")
        live = es.LiveExpert(**settings).fit(study.model("gemma"), study.model("smol"), texts, progress=False)
        arms = {"live": live, **live_arms(live, texts, progress=False)}
        for start in (0, 5):
            expected = answered(live, arms, test[start : start + 5], progress=False)
            assert expected == {arm: list(mine[start : start + 5]) for arm, mine in found.answers.items()}


def test_no_labelled_answer_is_among_the_anchors_and_no_item_serves_twice(small):
    texts = study.anchors("arc_easy", small / "data")
    asked = study.questions("arc_easy", "train", small / "data", study.TRAINING)
    for prompt, options, _ in asked.items:
        assert {f"{prompt}{o}" for o in options} <= set(texts)  # right and wrong alike
    prompts = {p for p, _, _ in asked.items}
    others = (
        study.screened("arc_easy", small / "data").items + study.questions("arc_easy", "test", small / "data", 99).items
    )
    assert not prompts & {p for p, _, _ in others}


def test_an_expert_that_does_not_lead_is_screened_alone(small, monkeypatch):
    monkeypatch.setattr(study, "LEAD", 1.01)
    lines = study.run(small / "data", small / "out", ["gemma-smol"], ["arc_easy", "piqa"], 10)
    assert [line["stage"] for line in lines] == ["screen", "screen"]
    assert "no" in study.tables(lines)["screen"] and study.receipts(lines) == {}


def test_a_page_is_drawn_from_lines_alone(small, capsys):
    study.run(small / "data", small / "out", ["gemma-smol"], ["arc_easy"], 10)
    page = small / "page.md"
    page.write_text("<!-- table: screen -->\n<!-- end -->\n<!-- table: test -->\n<!-- end -->\n")
    study.main(["--out", str(small / "out"), "--redraw", "--publish", str(page)])
    told = page.read_text()
    assert "| gemma-smol | arc_easy | last prompt token | 10 |" in told and "another prompt" in capsys.readouterr().out
    study.main(["--out", str(small / "page"), "--redraw", "--publish", str(page)])  # from what stands beside it
    assert page.read_text() == told
