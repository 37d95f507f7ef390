"""The recipes for each part, on the packaged pair. They share the states that `recipes.pair` keeps."""

from __future__ import annotations

import re

import pytest
import torch

from expertsteer_nnsight.measure.receipts import Receipt
from recipes import (
    align_models,
    calibrate_strength,
    live_expert,
    match_layers,
    measure_receipt,
    pair,
    paper_method,
    plan_by_hand,
    recommended_method,
    rfm_direction,
)

pytestmark = [pytest.mark.real, pytest.mark.recipes, pytest.mark.timeout(600)]


def test_reconstruction_is_not_alignment():
    found = align_models.align(seeds=1)
    target, expert, untrained = found["target"], found["expert"], found["untrained-1"]
    assert target["identity"].r2 == 1 and target["identity"].cosine == pytest.approx(1)
    assert "identity" not in expert  # the widths differ
    assert expert["ridge"].r2 > max(0, untrained["ridge"].r2)
    for name in ("ridge", "Procrustes, whitened"):
        assert 0.4 < expert[name].cosine < target[name].cosine
        assert expert[name].cosine > abs(untrained[name].cosine) + 0.2
    assert expert["auto-encoder"].reconstruction > 0.9 and abs(expert["auto-encoder"].cosine) < 0.3


def test_layers_match_above_their_null_and_at_like_depths(tmp_path, capsys):
    found = match_layers.main(["--scores", "mutual_knn", "cka", "--permutations", "3", "--out", str(tmp_path)])
    for scores in found.values():
        assert scores.matrix.max() > 2 * scores.null.max()
        gaps = [match_layers.depth_gap(scores, scores.pairs(5, select)) for select in ("highest", "lowest")]
        assert gaps[0] < 0.5 * gaps[1]
    assert (tmp_path / "match_layers.png").stat().st_size > 10_000 and "depth gap" in capsys.readouterr().out


def test_the_machine_tells_held_out_texts_apart(tmp_path, capsys):
    auc = rfm_direction.main(["--out", str(tmp_path)])
    assert auc["rfm"] > 0.8 and set(auc) == {"rfm", "mean_difference", "logistic"}
    assert (tmp_path / "rfm_spectrum.png").exists() and "first share of the spectrum" in capsys.readouterr().out
    shuffled = torch.randperm(240, generator=torch.Generator().manual_seed(0)).tolist()
    labels = [pair.pairs().labels[i] for i in shuffled]
    states = pair.states("expert", "pairs")[9]
    with pytest.warns(UserWarning, match="correlation with the labels"):
        _, found = rfm_direction.directions(states, labels, list(range(240)))
    assert found["rfm"].auc(pair.states("expert", "test")[9], pair.pairs("test").labels) < 0.75


def test_a_plan_by_hand_moves_the_next_words_either_way(capsys):
    (vector,) = plan_by_hand.build(14, 0.2).vectors
    norm = pair.states("target", "pairs").norm(14)
    assert vector.length == pytest.approx(0.2 * norm) and vector.layer == 14
    odds = list(plan_by_hand.main(["--tokens", "4"]).values())
    unsteered = float(pair.words().score(pair.target(), [])[0].mean())
    assert odds[2] == pytest.approx(unsteered, abs=1e-3) and odds[0] < unsteered - 1 < unsteered + 1 < odds[-1]
    assert "'She closed the book" in capsys.readouterr().out


def test_the_recommended_fit_is_the_shared_plan_and_outdoes_the_papers(capsys):
    steer, shared = recommended_method.fit(), pair.plan()
    assert steer.plan_.layers == shared.layers
    for one, other in zip(steer.plan_.vectors, shared.vectors, strict=True):
        assert float(one.direction @ other.direction) == pytest.approx(1, abs=1e-4)
    effect = recommended_method.main(["--tokens", "4"])
    told = capsys.readouterr().out
    assert effect > 5 and "towards" in told and "10>18" in told
    assert abs(paper_method.main(["--tokens", "4"])) < 0.5 * effect
    assert "Warned: The direction's correlation" in capsys.readouterr().out


def test_a_calibrated_plan_costs_its_budget(tmp_path, capsys):
    plan = calibrate_strength.main(["--kl", "0.5", "--doses", "0.5", "1", "--out", str(tmp_path)])
    assert plan.info["calibration"]["kl"] == pytest.approx(0.5, rel=0.05) and plan.dose == pytest.approx(1)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(" dose"))
    (half, whole) = ([float(x) for x in line.split()] for line in lines[start + 1 : start + 3])
    assert whole[2] == pytest.approx(0.5, rel=0.05) and half[2] < 0.5 * whole[2] and 0 < half[4] < whole[4]
    assert (tmp_path / "calibrate_strength.png").stat().st_size > 10_000


def test_a_receipt_is_measured_at_one_cost(tmp_path, capsys):
    found = measure_receipt.main(["--untrained", "1", "--draws", "2", "--prompts", "6", "--out", str(tmp_path)])
    assert set(found.arms) == {"expert", "native", "untrained", "text_features", "permuted", "random"}
    assert all(abs(arm["kl_p95"] / found.kl_budget - 1) < 0.05 for arm in found.arms.values())
    assert found.arms["expert"]["interval"][0] > max(
        found.arms["random"]["effect"], found.arms["text_features"]["effect"]
    )
    assert Receipt.load(tmp_path / "receipt.json").verdict == found.verdict
    assert (tmp_path / "receipt.png").stat().st_size > 20_000 and "text_features" in capsys.readouterr().out


def test_a_live_expert_written_by_hand_says_what_the_package_says(capsys):
    assert live_expert.main(["--tokens", "8"]) == len(live_expert.QUESTIONS)
    told = capsys.readouterr().out
    pairs = re.findall(r"unsteered: (.*)\nlive expert: (.*)\n", told)
    assert len(pairs) == len(live_expert.QUESTIONS) and any(a != b for a, b in pairs)
