"""The estimator of the four steps: on planted states, on tiny models, and on the real pair."""

from __future__ import annotations

import re

import nnsight
import pytest
import torch
from planted import GENERAL, PAIRS, cosine, planted, shifted
from sklearn.base import clone
from tiny import PROMPTS, build, tiny

import expertsteer_nnsight as es
from expertsteer_nnsight.align.aligner import massive_coordinates, without_massive
from expertsteer_nnsight.directions.find import find_direction
from expertsteer_nnsight.fit.control_arms import control_arms
from expertsteer_nnsight.models.identity import ModelIdentity
from expertsteer_nnsight.texts.labelled import LabelledTexts
from expertsteer_nnsight.texts.texts import texts_hash


@pytest.mark.parametrize("direction", ["mean_difference", "rfm", "lda", "logistic"])
@pytest.mark.parametrize("space", ["expert", "target"])
def test_a_planted_concept_is_carried_over(direction, space):
    labelled, y, e, t, truth = planted()
    kind = "pattern" if direction != "mean_difference" else None
    steer = es.ExpertSteer(es.RidgeAligner(), layers=[(1, 2), (2, 1)], direction=direction, kind=kind, space=space)
    plan = steer.fit_activations(labelled, y, e, t)
    assert plan.layers == (1, 2)
    for v in plan.vectors:
        assert cosine(v.direction, truth[v.layer]) > 0.9
        assert v.residual_norm == t.norm(v.layer) and v.strength == pytest.approx(0.3 / 2**0.5)
    assert plan.info["pairs"][0]["held_out_r2"] > 0.9


def test_the_readouts_covariance_needs_no_map():
    labelled, y, e, t, truth = planted(2000)
    plan = es.ExpertSteer.in_domain(layers=[(1, 2)]).fit_activations(labelled, y, e, t)
    assert cosine(plan.vectors[0].direction, truth[2]) > 0.9


def test_an_auto_encoder_carries_nothing_over():
    labelled, y, e, t, truth = planted()
    found = [
        cosine(
            es.ExpertSteer.paper(layers=[(1, 2)], random_state=s)
            .fit_activations(labelled, y, e, t)
            .vectors[0]
            .direction,
            truth[2],
        )
        for s in range(5)
    ]
    assert abs(sum(found) / 5) < 0.5 and max(found) - min(found) > 0.2


def own_states(t, truth, y, seed=5):
    """Target states of labelled texts that differ along `truth`."""
    g = torch.Generator().manual_seed(seed)
    side = (2.0 * y - 1)[:, None]
    return {i: side * 3 * truth[i] + torch.randn(len(y), t[i].shape[1], generator=g, dtype=torch.float64) for i in t}


@pytest.mark.parametrize("space", ["expert", "target"])
def test_massive_activations_do_not_turn_the_map(space):
    labelled, y, e, t, truth = planted()
    steer = es.ExpertSteer(es.RidgeAligner(), layers=[(1, 2)], space=space)
    clean = steer.fit_activations(labelled, y, e, t)
    g = torch.Generator().manual_seed(9)
    few = 0.01 * t[2].norm(dim=1).median() * torch.randn(4, 16, generator=g, dtype=torch.float64)
    massive = {**t._memory, **{f"layer.{i}": torch.cat([t[i], 4e4 * few]) for i in t}}
    massive |= {f"norm.{i}": torch.cat([t._read(f"norm.{i}"), t._read(f"norm.{i}")[:4]]) for i in t}
    longer = {i: torch.cat([x, torch.randn(4, 24, generator=g, dtype=torch.float64)]) for i, x in e.items()}
    spoilt = type(t)(t.model, t.layers, t.n_texts + 4, "last", None, massive)
    other: es.ExpertSteer = clone(steer)
    plan = other.fit_activations(labelled, y, longer, spoilt)
    torch.testing.assert_close(plan.vectors[0].direction, clean.vectors[0].direction)
    assert plan.info["pairs"][0]["held_out_r2"] > 0.9
    # without the rule they do
    raw = es.RidgeAligner().fit(longer[1], spoilt[2])
    assert abs(cosine(raw.map_direction(labelled[1][0] - labelled[1][1], "displacement"), truth[2])) < 0.9
    # the shuffled anchors of the control are ordinary ones too
    found = [
        control_arms(s, labelled, y, a, b, draws=3)["permuted"] for s, a, b in ((steer, e, t), (other, longer, spoilt))
    ]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.vectors[0].direction, two.vectors[0].direction)


@pytest.mark.parametrize("direction", ["mean_difference", "rfm", "logistic"])
@pytest.mark.parametrize("space", ["expert", "target"])
def test_what_stands_in_massive_coordinates_has_no_say(direction, space):
    labelled, y, e, t, truth = planted()
    kind = "pattern" if direction != "mean_difference" else None
    steer = es.ExpertSteer(es.RidgeAligner(), layers=[(1, 2)], space=space, direction=direction, kind=kind)
    g = torch.Generator().manual_seed(3)

    def spoilt(x, share, scale):
        """Two coordinates of some rows are of any size up to hundreds of norms, as at a full stop in Qwen2.5."""
        sizes = scale * x.norm(dim=1).median() * torch.rand(len(x), 2, generator=g, dtype=torch.float64)
        rows = torch.rand(len(x), generator=g) < share
        return torch.cat([x[:, :4], torch.where(rows[:, None], sizes, 0.1 * sizes.sign()), x[:, 4:]], 1)

    plans, aucs = [], []
    for scale in (20.0, 20.0, 300.0):  # two draws, and another size
        other: es.ExpertSteer = clone(steer)
        plans.append(other.fit_activations({1: spoilt(labelled[1], 0.8, scale)}, y, {1: spoilt(e[1], 0.05, scale)}, t))
        aucs.append(plans[-1].info["pairs"][0]["held_out_auc"])
        permuted = control_arms(
            other, {1: spoilt(labelled[1], 0.8, scale)}, y, {1: spoilt(e[1], 0.05, scale)}, t, draws=2
        )
        assert all(torch.isfinite(p.vectors[0].direction).all() for p in permuted["permuted"])
    clean: es.ExpertSteer = clone(steer)
    wide = {1: torch.cat([labelled[1][:, :4], torch.zeros(len(y), 2, dtype=torch.float64), labelled[1][:, 4:]], 1)}
    anchors = {1: torch.cat([e[1][:, :4], torch.zeros(len(e[1]), 2, dtype=torch.float64), e[1][:, 4:]], 1)}
    expected = clean.fit_activations(wide, y, anchors, t)
    for plan in plans:
        torch.testing.assert_close(plan.vectors[0].direction, expected.vectors[0].direction)
        assert abs(cosine(plan.vectors[0].direction, truth[2])) > 0.8
    assert aucs == [expected.info["pairs"][0]["held_out_auc"]] * 3


def test_ordinary_activations_stay_as_they_are():
    labelled, _, e, _, _ = planted()
    anchors, x = without_massive(e[1], labelled[1])
    assert anchors is e[1] and x is labelled[1]
    # nor does a row that is large everywhere, a few rare anchors, a small width or a value that is not finite hide any
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(5000, 64, generator=g)
    loud, rare, broken = wide.clone(), wide.clone(), wide.clone()
    loud[0] *= 200
    rare[:3, 7] = 500.0
    broken[0, 3] = float("inf")
    for states in (wide, loud, rare, broken, torch.randn(5000, 4, generator=g)):
        assert not massive_coordinates(states).any()
    assert not massive_coordinates(wide, loud[:200]).any()
    assert massive_coordinates(wide, rare[:200]).nonzero().flatten().tolist() == [7]
    rare[:20, 7] = 500.0
    assert massive_coordinates(rare).nonzero().flatten().tolist() == [7]
    assert massive_coordinates((1e3 * rare).clamp(-6e4, 6e4).half()).nonzero().flatten().tolist() == [
        7
    ]  # norms beyond float16


def test_the_targets_own_direction_leaves_out_its_massive_coordinates_too():
    labelled, y, e, t, truth = planted()
    own, spoilt = own_states(t, truth, y), own_states(t, truth, y)
    sizes = torch.rand(len(y), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spoilt[2][:, 3] += 50 * t[2].norm(dim=1).median() * sizes
    steer = es.ExpertSteer.recommended(layers=[(1, 2)])
    for states in (own, spoilt):
        steer.fit_activations(labelled, y, e, t, labelled_target=states)
        native = control_arms(steer, labelled, y, e, t, labelled_target=states, draws=0)["native"]
        assert abs(cosine(native.vectors[0].direction, truth[2])) > 0.9
        cosines = steer.plan_.info["pairs"][0]["native_cosine"]
        assert cosines == pytest.approx(cosine(steer.plan_.vectors[0].direction, native.vectors[0].direction), abs=1e-5)
    assert float(native.vectors[0].direction[3]) == 0.0


@pytest.mark.parametrize("preset", ["recommended", "in_domain"])
def test_the_cosine_with_the_targets_own_direction_tells_whether_the_map_carries_the_concept(preset):
    labelled, y, e, t, truth = planted(2000)
    own = own_states(t, truth, y)
    steer = getattr(es.ExpertSteer, preset)(layers=[(1, 2), (2, 1)])
    blind = clone(steer).fit_activations(labelled, y, e, t)
    plan = steer.fit_activations(labelled, y, e, t, labelled_target=own)
    for told, untold in zip(plan.vectors, blind.vectors, strict=True):
        assert torch.equal(told.direction, untold.direction)
    assert [p["native_cosine"] for p in blind.info["pairs"]] == [None, None]
    # with the direction of the control that steers with it
    native = control_arms(steer, labelled, y, e, t, labelled_target=own, draws=0)["native"]
    assert isinstance(native, es.SteeringPlan)
    by_layer = {p["target_layer"]: p["native_cosine"] for p in plan.info["pairs"]}
    for mine, other in zip(plan.vectors, native.vectors, strict=True):
        assert by_layer[mine.layer] == pytest.approx(cosine(mine.direction, other.direction), abs=1e-6)
    assert min(p["native_cosine"] for p in plan.info["pairs"]) > 0.85
    assert "unlikely to steer" not in str(plan) and "unlikely to steer" not in str(blind)
    if preset == "in_domain":  # the target's own readout goes through the target's own covariance
        found = find_direction(own[1], y, "lda", folds=0)
        by_hand = es.CovarianceAligner().fit(t[1], t[1]).map_direction(found.vector, found.space)
        assert cosine(native.vectors[0].direction, by_hand) > 1 - 1e-6 > cosine(found.vector, by_hand)
    # anchors whose rows do not go together
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    lost = steer.fit_activations(labelled, y, {i: x[order] for i, x in e.items()}, t, labelled_target=own)
    assert sum(p["native_cosine"] for p in lost.info["pairs"]) < 0.8


def test_a_plan_whose_vectors_are_not_the_targets_says_so():
    labelled, y, e, t, truth = planted()
    other = {i: -v for i, v in enumerate(truth)}  # the concept lies the other way round in the target
    plan = es.ExpertSteer(es.RidgeAligner(), layers=[(1, 2)]).fit_activations(
        labelled, y, e, t, labelled_target=own_states(t, other, y)
    )
    assert re.search(r"unlikely to steer: its cosine with the target's own direction is -(0\.9|1\.0)", str(plan))


def test_a_direction_that_knows_the_experts_width_alone_has_no_cosine():
    labelled, y, e, t, truth = planted()
    own = own_states(t, truth, y)
    width = labelled[1].shape[1]
    known = torch.linalg.lstsq(e[1] - e[1].mean(0), t[2] - t[2].mean(0)).solution @ truth[2].to(e[1].dtype)

    def by_index(x, labels):  # fails where the states are narrower or wider than the expert's
        if x.shape[1] != width:
            raise IndexError("these are not the expert's states")
        return known

    for direction in (by_index, lambda x, labels: known):
        steer = es.ExpertSteer(es.RidgeAligner(), layers=[(1, 2)], direction=direction)
        plan = steer.fit_activations(labelled, y, e, t, labelled_target=own)
        assert plan.info["pairs"][0]["native_cosine"] is None and "unlikely to steer" not in str(plan)
    # labels that tell nothing in the target: its states are all the same
    plan = es.ExpertSteer(es.RidgeAligner(), layers=[(1, 2)]).fit_activations(
        labelled, y, e, t, labelled_target={2: torch.ones_like(own[2])}
    )
    assert plan.info["pairs"][0]["native_cosine"] is None


def test_presets_with_and_without_further_places_share_a_cache(tmp_path):
    expert, target = tiny("llama"), tiny("gpt2")
    for preset in (es.ExpertSteer.paper, es.ExpertSteer.recommended, es.ExpertSteer.in_domain):
        steer = preset(layers=[(1, 2)], direction="mean_difference")
        plan = steer.fit(expert, target, PAIRS, GENERAL, cache=tmp_path, progress=False)
        again = clone(steer).fit(expert, target, PAIRS, GENERAL, cache=tmp_path, progress=False)
        assert torch.equal(plan.vectors[0].direction, again.vectors[0].direction)


def test_layers_are_chosen_by_score_and_band():
    labelled, y, e, t, _ = planted()
    steer = es.ExpertSteer(score="cka", n_pairs=2, band=(0.3, 0.7)).set_params(select="highest")
    steer.fit_activations(labelled, y, e, t)
    assert steer.scores_ is not None and {p.target for p in steer.pairs_} == {1, 2} == {
        p.expert for p in steer.pairs_
    } | {1, 2}
    best = steer.scores_.pairs(k=2, select="highest", per="target", band=(0.3, 0.7))
    assert steer.pairs_ == best


def test_presets_are_estimators():
    for preset in (es.ExpertSteer.recommended, es.ExpertSteer.paper, es.ExpertSteer.in_domain):
        steer = preset(n_pairs=2)
        assert clone(steer).get_params(deep=False)["n_pairs"] == 2 and "ExpertSteer(" in repr(steer)
    assert isinstance(es.ExpertSteer.paper().aligner, es.AutoencoderAligner)
    assert es.ExpertSteer.recommended().anchor_ends and not es.ExpertSteer.paper().anchor_ends


def test_fit_reads_two_models_and_the_plan_steers(tmp_path):
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    steer = es.ExpertSteer(score="cka", n_pairs=2, band=(0.0, 1.0), strength=0.5)
    plan = steer.fit(expert, target, PAIRS, GENERAL, cache=tmp_path, progress=False)
    again = clone(steer).fit(expert, target, PAIRS, GENERAL, cache=tmp_path, progress=False)
    assert all(torch.equal(a.direction, b.direction) for a, b in zip(plan.vectors, again.vectors, strict=True))
    assert plan.target == ModelIdentity.of(target) and plan.info["expert"]["n_layers"] == 4
    assert plan.info["data"] == {
        "labels": "pairs",
        "labelled": 72,
        "labelled_hash": texts_hash(t for pair in PAIRS for t in pair),
        "anchors": 80,
        "anchors_hash": texts_hash(GENERAL),
        "anchors_labelled": 0,
    }
    with torch.no_grad(), plan.attach(target).trace(PROMPTS) as _:
        steered = nnsight.save(target.output.logits)
    assert torch.isfinite(steered).all()
    loaded = es.SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert loaded.info["pairs"] == plan.info["pairs"]


def test_a_shallow_model_gets_as_many_pairs_as_its_band_holds():
    labelled, y, e, t, _ = planted()
    for select in ("highest", "lowest"):
        steer = es.ExpertSteer.recommended(band=(0.0, 1.0), n_pairs=9, select=select)
        assert len(steer.fit_activations(labelled, y, e, t).vectors) == len(t.layers)
    with pytest.raises(ValueError, match="n_pairs is 0"):
        es.ExpertSteer(n_pairs=0).fit_activations(labelled, y, e, t)


def test_layers_that_a_model_lacks_are_told_before_it_is_read():
    with pytest.raises(ValueError, match=r"pair \(1, 9\) was asked for, but the target gpt2 has layers 0 to 3"):
        es.ExpertSteer(layers=[(1, 9)]).fit(tiny("llama"), tiny("gpt2"), PAIRS, GENERAL)


def test_labelled_texts_among_the_anchors_are_warned_of_and_counted():
    anchors = [*GENERAL, PAIRS[0][0].upper(), f"They say {PAIRS[3][1]}."]
    steer = es.ExpertSteer(layers=[(1, 2)])
    with pytest.warns(UserWarning, match=r"2 of the 82 anchors are labelled texts too, or nearly .*: take them out\."):
        plan = steer.fit(tiny("llama"), tiny("gpt2"), PAIRS, anchors, progress=False)
    assert plan.info["data"]["anchors_labelled"] == 2
    assert es.SteeringPlan(plan.vectors, info=plan.info).layers == (2,)


def test_fit_takes_labelled_texts_of_any_kind():
    expert, target, flat = tiny("llama"), tiny("gpt2"), [t for pair in PAIRS for t in pair]
    steer = es.ExpertSteer(layers=[(1, 2)])
    plan = steer.fit(expert, target, PAIRS, GENERAL, progress=False)
    given = LabelledTexts(flat, [5, -2] * 36, [i // 2 for i in range(72)], source="judge")
    same = clone(steer).fit(expert, target, given, GENERAL, progress=False)
    torch.testing.assert_close(same.vectors[0].direction, plan.vectors[0].direction)
    assert same.info["data"] == {**plan.info["data"], "labels": "judge"}
    unequal = LabelledTexts.of_classes([p for p, _ in PAIRS], [n for _, n in PAIRS[:20]])
    assert clone(steer).fit(expert, target, unequal, GENERAL, progress=False).info["data"]["labelled"] == 56


@pytest.mark.parametrize("direction", ["mean_difference", "rfm"])
def test_real_labels_find_the_direction_that_they_grow_along(direction):
    expert, texts = tiny("llama"), [t for pair in PAIRS for t in pair]
    states = es.collect(expert, texts, [2], progress=False)[2].double()
    truth = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[0]
    margin = (states - states.mean(0)) @ truth
    steer = es.ExpertSteer(es.IdentityAligner(), layers=[(2, 2)], direction=direction)
    kind = {"kind": "pattern"} if direction == "rfm" else {}
    steer.set_params(**kind)
    plan = steer.fit(expert, tiny("gpt2"), LabelledTexts(texts, margin), GENERAL, progress=False)
    assert cosine(plan.vectors[0].direction, truth) > 0.95
    assert plan.info["data"]["labels"] == "real" and plan.info["pairs"][0]["held_out_correlation"] > 0.5
    opposite = steer.fit(expert, tiny("gpt2"), LabelledTexts(texts, -margin), GENERAL, progress=False)
    assert cosine(opposite.vectors[0].direction, plan.vectors[0].direction) < -0.99


@pytest.mark.parametrize("direction", ["mean_difference", "pca"])
def test_expert_minus_base_recovers_what_the_expert_was_given(direction):
    base = tiny("gpt2")
    by = torch.randn(32, generator=torch.Generator().manual_seed(3))
    expert, texts = shifted(base, 1, by), [p for p, _ in PAIRS]
    steer = es.ExpertSteer(es.IdentityAligner(), layers=[(1, 2)], direction=direction)
    plan = steer.fit(expert, base, texts, [*GENERAL, *texts[:3]], base=base, progress=False)  # and no warning
    assert cosine(plan.vectors[0].direction, by) > 0.9999
    assert plan.info["base"] == ModelIdentity.of(base).to_dict() and plan.info["expert"]["n_layers"] == 4
    data = plan.info["data"]
    assert (data["labels"], data["labelled"], data["anchors_labelled"]) == ("expert_minus_base", 36, 0)
    assert data["labelled_hash"] == texts_hash(texts)


@pytest.mark.parametrize("direction", ["rfm", "lda", "logistic"])
def test_other_methods_tell_the_expert_from_its_base(direction):
    base, texts = tiny("gpt2"), [p for p, _ in PAIRS]
    expert = shifted(base, 1, torch.randn(32, generator=torch.Generator().manual_seed(3)))
    steer = es.ExpertSteer(layers=[(1, 2)], direction=direction)
    plan = steer.fit(expert, tiny("llama"), texts, GENERAL, base=base, progress=False)
    assert plan.info["pairs"][0]["held_out_auc"] > 0.95
    X = torch.cat([es.collect(m, texts, [1], progress=False)[1] for m in (expert, base)])
    assert steer.directions_[0].auc(X, [1] * 36 + [0] * 36) > 0.95


def test_a_base_model_must_fit_and_takes_plain_texts():
    expert, texts = tiny("gpt2"), [p for p, _ in PAIRS]
    with pytest.raises(
        ValueError, match=r"base model gpt2 \(3 layers, width 32\) and the expert gpt2 \(4 layers, .* shape"
    ):
        es.ExpertSteer().fit(expert, tiny("llama"), texts, GENERAL, base=build("gpt2", n_layer=3))
    for pairs in (es.ContrastPairs.of(PAIRS), LabelledTexts.of(PAIRS)):
        with pytest.raises(ValueError, match=r"the models are the labels: pass plain texts"):
            es.ExpertSteer().fit(expert, tiny("llama"), pairs, GENERAL, base=expert)


def test_public_names_are_few_and_all_there():
    assert len(es.__all__) <= 30 and all(getattr(es, name) is not None for name in es.__all__)
    assert set(es.__all__) <= set(dir(es))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        es.nothing  # noqa: B018


def test_a_sweep_takes_the_layers_that_steer_best_on_validation_items():
    from expertsteer_nnsight.fit.layer_sweep import Validation
    from expertsteer_nnsight.measure.effects import Words
    from expertsteer_nnsight.measure.measuring import measure
    from expertsteer_nnsight.steering.plan import SteeringPlan

    expert, target = tiny("gpt2"), tiny("llama")
    pairs = [(f"{a} dog", f"{a} test") for a in ("the lazy", "a quick", "this", "one small", "hello", "over the")]
    anchors = [
        f"{a} {b} {c}"
        for a in ("the", "a", "this")
        for b in ("quick", "lazy", "small")
        for c in ("fox", "world", "model")
    ]
    validation = Validation(Words(["the quick", "a lazy", "hello"], ["dog"], ["test"]), PROMPTS, 0.05, 4)
    steer = es.ExpertSteer.recommended(select="sweep", n_pairs=2, band=(0.0, 1.0))
    with pytest.raises(ValueError, match="needs fit"):
        steer.fit(expert, target, pairs, anchors, progress=False)
    plan = steer.fit(expert, target, pairs, anchors, validation=validation, progress=False)
    assert len(steer.sweep_) == 4 and [e for _, e in steer.sweep_] == sorted((e for _, e in steer.sweep_), reverse=True)
    assert set(plan.layers) == {p.target for p, _ in steer.sweep_[:2]}
    # what a candidate's effect is told to be, it is
    best = steer.sweep_[0][0]
    one = es.ExpertSteer.recommended(layers=[(best.expert, best.target)]).fit(
        expert, target, pairs, anchors, progress=False
    )
    again = measure(
        target, {"one": SteeringPlan(one.vectors)}, validation.effect, PROMPTS, 0.05, rollout=4, progress=False
    )
    assert again.arms["one"]["effect"] == pytest.approx(steer.sweep_[0][1], rel=0.1)


def told_of_pairs(pairs, anchors, direction="lda"):
    """What a fit of one layer pair tells of its step."""
    steer = es.ExpertSteer(es.RidgeAligner(), layers=[(1, 2)], direction=direction)
    return steer.fit(tiny("llama"), tiny("gpt2"), pairs, anchors, progress=False).info["pairs"][0]


def test_repeated_texts_make_no_diagnostic_better_and_are_said():
    texts = [f"{i} {'abcdefgh'[i % 8]}{i * i} {7 * i} {'xyz'[i % 3]}" for i in range(24)]
    pairs = [(texts[2 * i], texts[2 * i + 1]) for i in range(12)]  # labels at random
    once = told_of_pairs(pairs, GENERAL)
    with pytest.warns(UserWarning, match=rf"{2 * len(GENERAL)} of the {3 * len(GENERAL)} anchors repeat another one"):
        thrice = told_of_pairs(pairs * 3, GENERAL * 3)
    assert thrice["held_out_r2"] == pytest.approx(once["held_out_r2"], abs=1e-6)
    assert thrice.get("held_out_auc", 0.5) < 0.9


def test_a_text_that_all_pairs_share_leaves_the_pairs_as_they_are():
    pairs = [(f"{i} {i * i} xyz", "one and the same") for i in range(16)]
    # the negative text is in every pair, so that no fold can be held out
    assert "held_out_auc" not in told_of_pairs(pairs, GENERAL, "mean_difference")
    assert LabelledTexts.of(pairs).same[1::2] == es.ContrastPairs.of(pairs).same[1::2] == [1] * 16
