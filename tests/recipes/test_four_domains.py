"""The experiment on tasks: every arm by the same rule, paired statistics, and a run that goes on where it stopped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from lm_eval import evaluator
from question_sets import write_sets

from expertsteer_nnsight.measure import continuations
from expertsteer_nnsight.models.packaged import load
from recipes import four_domains
from recipes.domain_settings import SCALES, Domain
from recipes.domain_tables import overview, place, pooled, read_lines, summary
from recipes.domain_texts import Tasks, contrasted, texts_of
from recipes.four_domains import main

ROOT = Path(__file__).parents[2]
ARMS = {
    "expert_itself",
    "unsteered",
    "prompted",
    "expert",
    "expert_rfm",
    "paper",
    "native",
    "untrained",
    "text_features",
    "permuted",
    "random",
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A run on random models and a set of thirty questions."""
    out = tmp_path_factory.mktemp("four")
    for name, arch, seed in (("expert", "neox", 1), ("target", "llama", 2)):
        # deep enough for the bands of the presets to differ
        model = tiny.build(arch, seed=seed, num_hidden_layers=8)
        model._module.save_pretrained(out / name)
        model.tokenizer.save_pretrained(out / name)
    data = write_sets(out / "data", 200)
    return [
        "--data", str(data), "--domains", "medical", "--tasks", "local_medmcqa", "--expert", str(out / "expert"), "--target",
        str(out / "target"), "--out", str(out / "run"), "--anchors", "40", "--untrained", "2", "--draws", "2", "--doses", "0.5",
        "1", "--kl", "0.1", "--validation", "12", "--batch-size", "128", "--limit", "30",
    ]  # fmt: skip


def test_a_run_measures_every_arm_and_goes_on(command, capsys, monkeypatch):
    out = Path(command[command.index("--out") + 1])
    asked, evaluate = [], evaluator.evaluate
    # contexts of a few tokens are read with their options: the same numbers (test_lm_eval) in a fraction of the forwards
    monkeypatch.setitem(continuations.WORTH, "cpu", 10**9)

    def spy(lm, tasks, **options):
        asked.append((lm.model.config.model_type, options["system_instruction"]))
        return evaluate(lm, tasks, **options)

    monkeypatch.setattr(evaluator, "evaluate", spy)
    with pytest.raises(ValueError, match=r"There is no .*plans/medical-.* has nothing\): run --parts fit"):
        main([*command, "--parts", "measure"])
    main([*command, "--parts", "fit"])
    assert not asked and len([*(out / "plans").rglob("*.safetensors")]) == 11 and not (out / "table.md").exists()
    with monkeypatch.context() as patched:  # plans are measured where there is no expert
        expert = command[command.index("--expert") + 1]
        patched.setattr(four_domains, "load", lambda name, **more: None if name == expert else load(name, **more))
        main([*command, "--parts", "measure"])
        assert {line["arm"] for line in read_lines(out / "results.jsonl")} == ARMS - {"expert_itself"}
    main(command)
    assert asked[-1] == ("gpt_neox", None) and {model for model, _ in asked[:-1]} == {"llama"}
    assert not asked[0][1] and asked[1][1] and not any(instruction for _, instruction in asked[2:])
    lines = read_lines(out / "results.jsonl")
    tests = [line for line in lines if line["split"] == "test"]
    assert {line["arm"] for line in tests} == ARMS
    assert {line["draw"] for line in tests if line["arm"] in ("untrained", "permuted", "random")} == {0, 1}
    # every arm had the same doses to choose from, and took the better one on the validation items
    for line in tests:
        if line["arm"] not in ("expert_itself", "unsteered", "prompted"):
            place = (line["arm"], line["draw"])
            tried = {
                x["dose"]: np.mean(x["acc_norm"])
                for x in lines
                if x["split"] == "validation" and (x["arm"], x["draw"]) == place
            }
            assert set(tried) == {0.5, 1.0} and tried[line["dose"]] == max(tried.values())
    assert {line["n"] for line in lines if line["split"] == "validation"} == {12}
    (n,) = {line["n"] for line in tests}
    assert n > 12 and all(len(line["acc_norm"]) == n for line in tests)
    text = (out / "table.md").read_text()
    assert text.count("| local_") == len(tests) and text.count("| mmlu_medical, acc_norm |") == 0
    assert text.startswith("| task | n | unsteered | expert itself |") and "| medmcqa, acc_norm |" in text
    assert "over 1 tasks: medmcqa |" in text and all(f"| {arm} | " in text for arm in ARMS - {"unsteered"})
    assert (out / "differences.png").stat().st_size > 10_000 and "McNemar" in (out / "table.md").read_text()

    (out / "table.md").unlink()
    main([*command, "--redraw"])
    assert "McNemar" in (out / "table.md").read_text()
    with pytest.raises(ValueError, match="holds no results with these settings"):
        main([*command, "--redraw", "--out", str(out / "nothing")])
    with pytest.raises(ValueError, match="holds no results with these settings"):
        main([*command, "--redraw", "--doses", "1"])

    # what is there is not measured again; a line that was cut off is
    text = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(text[:-1]) + text[-1][:20])
    asked.clear()
    main(command)
    again = read_lines(out / "results.jsonl")
    assert len(asked) == 1 and len(again) == len(lines) and again[-1] == lines[-1]
    # plans of another fit, and other items, are measured anew
    assert {line["by"].split("-")[0] for line in lines if line["arm"] == "expert"} == {"medical"}
    monkeypatch.setattr(four_domains, "texts_hash", lambda texts: "another")
    next((out / "plans").iterdir()).rename(out / "plans" / "medical-another")
    asked.clear()
    main([*command, "--parts", "measure"])
    assert len(asked) == len([line for line in lines if line["by"].startswith("medical")])
    with pytest.raises(SystemExit):
        main([*command, "--tasks", "local_svamp"])
    assert "none of these domains has one of these tasks" in capsys.readouterr().err


def test_a_dry_run_resolves_names_and_shapes_without_weights(command, capsys):
    main([*command, "--dry-run"])
    told = capsys.readouterr().out
    assert "8 layers, width 32" in told and "pairs of local_medmcqa" in told and "test items, by acc_norm" in told


def test_labelled_questions_are_no_anchors(command):
    tasks = Tasks(Path(command[1]))
    pairs, anchors = texts_of(tasks, "local_medmcqa", 0)
    assert (
        len(pairs) >= 8 and pairs.positive[0].endswith("Answer: calcium") and pairs.negative[0].endswith("Answer: air")
    )
    assert not {text.rsplit(" ", 1)[0] for text in pairs.texts} & set(anchors)
    assert any("What do bones hold?" in text for text in anchors)


def settings(**changes):
    given = {"seed": 0, "kl": 1.0, "limit": None, "validation": None, "anchors": None, "doses": [1.0]}
    return SimpleNamespace(**{**given, **changes})


def results(args, domain, base, **arms):
    return [
        {
            **place(domain, args),
            "task": "task",
            "split": "test",
            "arm": arm,
            "draw": 0,
            "dose": 1.0,
            "items": "first",
            "by": "",
            "n": len(acc),
            "acc": acc,
        }
        for arm, acc in {"unsteered": base, **arms}.items()
    ]


def test_holms_correction_counts_the_experts_arms_of_all_domains():
    first, second = (Domain(name, "e", "t", "task", {"task": "acc"}, "") for name in "ab")
    arms = {"expert": [1] * 6 + [0] * 4, "paper": [1] * 5 + [0] * 5, "random": [1] * 9 + [0]}
    lines = results(settings(), first, [0] * 10, **arms)
    rows = {row["arm"]: row for row in summary(lines, [first, second], settings())}
    assert rows["expert"]["holm"] == pytest.approx(2 * rows["expert"]["p"])
    assert rows["paper"]["holm"] == pytest.approx(max(rows["paper"]["p"], rows["expert"]["holm"]))
    assert "holm" not in rows["random"]
    lines += results(settings(), second, [0] * 10, expert=[0] * 10)
    rows = [row for row in summary(lines, [first, second], settings()) if row["domain"] == "a"]
    assert {row["arm"]: row for row in rows}["expert"]["holm"] == pytest.approx(3 * rows[1]["p"])


def test_results_of_other_settings_and_models_are_left_alone():
    domain, other = (Domain("a", "e", target, "task", {"task": "acc"}, "") for target in "tu")
    lines = [
        *results(settings(), other, [1] * 10, expert=[0] * 10),
        *results(settings(kl=2.0), domain, [1] * 10, expert=[1] * 10),
        *results(settings(limit=5), domain, [1] * 5, expert=[1] * 5),
        *results(settings(doses=[0.5]), domain, [1] * 10, expert=[1] * 10),
        *results(settings(), domain, [0] * 10, expert=[1] * 10),
    ]
    rows = summary(lines, [domain], settings())
    assert [(row["arm"], row["acc"], row["difference"]) for row in rows] == [("unsteered", 0, 0), ("expert", 1, 1)]
    # of other items, or measured before: the last ones that answer what the unsteered model did
    stale = [{**line, "acc": [0] * 10} for line in lines[-1:]]
    others = [{**line, "items": "others"} for line in stale]
    assert summary([*lines[:-1], *stale, *lines[-1:], *others], [domain], settings()) == rows


def test_an_arms_mean_over_tasks():
    first, second = (Domain(name, "e", "t", "task", {name: "acc"}, "") for name in "ab")
    rng = np.random.default_rng(0)
    domains = [first, second]
    lines, gained = [], []
    for domain, share in zip(domains, (0.3, 0.1), strict=True):
        base = (rng.random(400) < 0.4).astype(int)
        steered = np.maximum(base, (rng.random(400) < share).astype(int))
        gained.append(float((steered - base).mean()))
        arms = {"expert": steered.tolist(), "untrained": steered.tolist(), "random": base.tolist()}
        for line in results(settings(), domain, base.tolist(), **arms):
            lines.append({**line, "task": domain.name})
    # an arm on one of the tasks alone makes that the only task of the comparison
    alone = pooled([line for line in lines if (line["arm"], line["task"]) != ("random", "b")], domains, settings())
    assert alone[0] == ["a"]
    # but not what is no plan
    itself = [{**line, "arm": "expert_itself"} for line in lines if (line["arm"], line["task"]) == ("expert", "a")]
    shared, some = pooled([*lines, *itself], domains, settings())
    assert shared == ["a", "b"] and "expert_itself" not in {row["arm"] for row in some}
    other = [{**line, "draw": 1, "acc": [1 - x for x in line["acc"]]} for line in lines if line["arm"] == "random"]
    rows = {row["arm"]: row for row in pooled([*lines, *other], domains, settings())[1]}
    assert rows["expert"]["difference"] == pytest.approx(np.mean(gained))
    variance = sum(g * (1 - g) / 400 for g in gained) / 4  # of a mean of two independent means
    width = rows["expert"]["high"] - rows["expert"]["low"]
    assert width == pytest.approx(2 * 1.96 * variance**0.5, rel=0.1)
    # draws are averaged item by item: half the items right, whatever the model does
    base = np.mean([np.mean(line["acc"]) for line in lines if line["arm"] == "unsteered"])
    assert rows["random"]["difference"] == pytest.approx(0.5 - base)
    # and the interval tells how far they are apart: none of it in one, all of it in the other
    assert rows["random"]["low"] == 0 and rows["random"]["high"] > 2 * (0.5 - base)
    # an arm less another one on the same items
    less = rows["expert less untrained"]
    assert (less["difference"], less["low"], less["high"]) == (0, 0, 0) and "expert less permuted" not in rows
    text = overview(summary(lines, domains, settings()), *pooled(lines, domains, settings()))
    assert "| a, acc | 400 |" in text and "over 2 tasks: a, b |" in text and text.count(" * |") == 2


def test_the_page_shows_what_the_stored_answers_give():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    lines = read_lines(ROOT / "docs" / "benchmarks" / "results.jsonl")
    args = settings(doses=[0.25, 1.0], limit=500, validation=100, anchors=700)
    rows = summary(lines, SCALES["small"], args)
    short = overview(rows, *pooled(lines, SCALES["small"], args)).splitlines()
    assert len(short) > 20 and [line for line in short if line.startswith("|") and line not in page] == []
    assert all(line["n"] == len(line["acc"]) >= 200 for line in lines)


def test_no_option_tells_the_label():
    rows = [
        {"question": f"q{i}", "options": ["no", "maybe", "yes"], "answer": int(i % 10 > 3) + (i % 10 > 8)}
        for i in range(300)
    ]
    chosen = contrasted(rows, 60, 0)
    right, wrong = (Counter(row["options"][k] for row in chosen.values()) for k in (0, 1))
    assert right == wrong and set(right) == {"no", "maybe", "yes"} and 50 < sum(right.values()) <= 60
    assert all(rows[i]["options"][rows[i]["answer"]] == row["options"][0] for i, row in chosen.items())
    # where options differ, the wrong one is drawn
    rows = [{"question": f"q{i}", "options": [f"r{i}", "a", f"b{i}"], "answer": 0} for i in range(300)]
    share = sum(row["options"][1] == "a" for row in contrasted(rows, 200, 0).values()) / 200
    assert 0.35 < share < 0.65


def test_every_named_task_and_metric_is_there(command):
    tasks = Tasks(Path(command[1]))
    for domain in (d for scale in SCALES.values() for d in scale):
        for name, metric in domain.tasks.items():
            assert metric in tasks(name)._metric_fn_list
        assert next(tasks.rows(domain.fit))["options"]
    assert sorted(SCALES) == ["paper", "small"]


@pytest.mark.parametrize(
    ("found", "chosen"), [([0.2, 0.5, 0.4], 0.5), ([0.6, 0.5, 0.4], 0.25), ([0.5, 0.3, 0.5], 0.25)]
)
def test_the_dose_is_what_does_best_on_validation_items_and_the_smaller_of_equals(found, chosen, tmp_path, monkeypatch):
    doses = [0.25, 0.5, 1.0]
    args = settings(out=tmp_path, doses=doses)
    measuring = four_domains.Measuring(Domain("d", "e", "t", "task", {"task": "acc"}, ""), None, None, args)
    asked = []

    def line(task, split, arm, draw, dose, plan):
        asked.append((split, dose, plan))
        return {"acc": [found[doses.index(dose)]]}

    monkeypatch.setattr(measuring, "line", line)
    measuring.arm("expert", 0, 8.0)
    assert asked == [*(("validation", d, 8 * d) for d in doses), ("test", chosen, 8 * chosen)]
