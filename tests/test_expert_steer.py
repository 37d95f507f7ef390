"""The estimator of the four steps: on planted states, on tiny models, and on the real pair."""

from __future__ import annotations

import nnsight
import pytest
import torch
from sklearn.base import clone
from tiny import PROMPTS, build, tiny

import expertsteer_nnsight as es
from expertsteer_nnsight.activations import Activations
from expertsteer_nnsight.identity import ModelIdentity, fingerprint

GENERAL = [f"{a} {b} {c}" for a in ("the quick", "a lazy", "one small", "this") for b in ("fox", "dog", "model", "test") for c in
           ("jumps over it", "is here", "jumps", "over the world", "is a test of one")]  # fmt: skip
PAIRS = [
    (f"the {w} is hello {i}", f"the {w} is jumps {i}")
    for i, w in enumerate(["fox", "dog", "test", "model", "world", "box"] * 6)
]


def planted(n_anchors=400, d_expert=24, d_target=16, seed=0):
    """States of two models that share a latent space; the concept is latent axis 0."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    latent, labelled = rand(n_anchors, 8), rand(120, 8)
    y = torch.tensor([1, 0] * 60)
    labelled[:, 0] += 3.0 * (2 * y - 1)
    expert, target = [rand(8, d_expert) for _ in range(4)], [rand(8, d_target) for _ in range(4)]
    e = {i: latent @ m + 0.1 * rand(n_anchors, d_expert) for i, m in enumerate(expert)}
    t = {i: latent @ m + 0.1 * rand(n_anchors, d_target) for i, m in enumerate(target)}
    memory = {f"layer.{i}": x for i, x in t.items()} | {f"norm.{i}": x.norm(dim=1) for i, x in t.items()}
    anchors = Activations(ModelIdentity("t", None, d_target, 4, "x"), (0, 1, 2, 3), n_anchors, "last", None, memory)
    return {i: labelled @ m for i, m in enumerate(expert)}, y, e, anchors, [m[0] for m in target]


def cosine(a, b):
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


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


def test_fit_reads_two_models_and_the_plan_steers(tmp_path):
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    steer = es.ExpertSteer(score="cka", n_pairs=2, band=(0.0, 1.0), strength=0.5)
    plan = steer.fit(expert, target, PAIRS, GENERAL, cache=tmp_path, progress=False)
    again = clone(steer).fit(expert, target, PAIRS, GENERAL, cache=tmp_path, progress=False)
    assert all(torch.equal(a.direction, b.direction) for a, b in zip(plan.vectors, again.vectors, strict=True))
    assert plan.target == ModelIdentity.of(target) and plan.info["expert"]["n_layers"] == 4
    assert plan.info["data"] == {
        "pairs": 36,
        "anchors": 80,
        **{k: plan.info["data"][k] for k in ("pairs_hash", "anchors_hash")},
    }
    with torch.no_grad(), plan.attach(target).trace(PROMPTS) as _:
        steered = nnsight.save(target.output.logits)
    assert torch.isfinite(steered).all()
    loaded = es.SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert loaded.info["pairs"] == plan.info["pairs"]


def test_layers_that_a_model_lacks_are_told_before_it_is_read():
    with pytest.raises(ValueError, match=r"pair \(1, 9\) was asked for, but the target gpt2 has layers 0 to 3"):
        es.ExpertSteer(layers=[(1, 9)]).fit(tiny("llama"), tiny("gpt2"), PAIRS, GENERAL)


def test_labelled_texts_may_not_be_anchors():
    with pytest.raises(ValueError, match="1 of the anchors are labelled texts"):
        es.ExpertSteer().fit(tiny("llama"), tiny("gpt2"), PAIRS, [*GENERAL, PAIRS[0][0].upper()])


def test_an_untrained_expert_has_the_shape_and_other_weights():
    model = build("qwen3", bos=True)
    state = torch.get_rng_state()
    control, again, other = (es.untrained_like(model, s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.shape for p in control._module.parameters()] == [p.shape for p in model._module.parameters()]
    assert fingerprint(control) == fingerprint(again) != fingerprint(other) != fingerprint(model)
    assert control.tokenizer is model.tokenizer
    assert es.collect(control, PROMPTS, [1], progress=False)[1].shape == (4, 32)


def test_public_names_are_few_and_all_there():
    assert len(es.__all__) <= 26 and all(getattr(es, name) is not None for name in es.__all__)
    assert set(es.__all__) <= set(dir(es))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        es.nothing  # noqa: B018
