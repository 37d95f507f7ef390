"""The control arms of a fitted plan: what each is by hand, that they are reproducible, and what they read."""

from __future__ import annotations

import pytest
import torch
from planted import GENERAL, PAIRS, cosine, planted, shifted
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from tiny import PROMPTS, build, tiny, watching

import expertsteer_nnsight as es
from expertsteer_nnsight.align.controls import PermutedAligner
from expertsteer_nnsight.directions.find import find_direction
from expertsteer_nnsight.fit.control_arms import control_arms, text_features
from expertsteer_nnsight.models.untrained import untrained_like
from expertsteer_nnsight.states.fingerprint import fingerprint
from expertsteer_nnsight.steering.plan import random_plans
from expertsteer_nnsight.texts.labelled import ContrastPairs, LabelledTexts

ARMS = ["native", "untrained", "text_features", "permuted", "random"]
TEXTS = ContrastPairs.of(PAIRS)


class Counted:
    """How many forwards models make, by their first decoder layer."""

    def __init__(self, **blocks):
        self.of = dict.fromkeys(blocks, 0)
        for name, block in blocks.items():
            block.register_forward_hook(watching(lambda *_, name=name: self.of.__setitem__(name, self.of[name] + 1)))


def equal(a, b):
    return a.layers == b.layers and all(
        torch.equal(x.direction, y.direction) and x.strength == y.strength and x.residual_norm == y.residual_norm
        for x, y in zip(a.vectors, b.vectors, strict=True)
    )


def flat(arms):
    return [p for arm in arms.values() for p in ([arm] if isinstance(arm, es.SteeringPlan) else arm)]


@pytest.fixture(scope="module")
def fitted():
    """An estimator fitted on two models, their pairs of layers out of order, and its controls."""
    expert, target = tiny("qwen3", bos=True), tiny("gpt2")
    steer = es.ExpertSteer(
        layers=[(1, 3), (2, 0)], strength=0.5, op="add_keep_norm", where="completion", random_state=4
    )
    steer.fit(expert, target, PAIRS, GENERAL, progress=False)
    return expert, target, steer, steer.controls(expert, target, PAIRS, GENERAL, untrained=2, draws=3, progress=False)


def test_every_arm_is_there_and_differs_from_the_plan_in_its_directions_alone(fitted):
    *_, steer, arms = fitted
    assert list(arms) == ARMS
    assert [len(arms[k]) for k in ("untrained", "permuted", "random")] == [2, 3, 3]
    for name, arm in arms.items():
        for plan in [arm] if isinstance(arm, es.SteeringPlan) else arm:
            assert plan.layers == (0, 3) and plan.target == steer.plan_.target and plan.info["control"] == name
            for mine, theirs in zip(plan.vectors, steer.plan_.vectors, strict=True):
                assert abs(cosine(mine.direction, theirs.direction)) < 0.999
                for key in ("layer", "strength", "residual_norm", "op", "where", "skip_special"):
                    assert getattr(mine, key) == getattr(theirs, key)
    assert "control" not in steer.plan_.info


def test_the_same_call_gives_the_same_arms(fitted, tmp_path):
    expert, target, steer, arms = fitted
    again = clone(steer)
    again.fit(expert, target, PAIRS, GENERAL, cache=tmp_path, progress=False)
    other = again.controls(expert, target, PAIRS, GENERAL, untrained=2, draws=3, cache=tmp_path, progress=False)
    assert all(equal(a, b) for a, b in zip(flat(arms), flat(other), strict=True))
    names = {"expert", "untrained-1", "untrained-2"}
    assert {f.name for f in tmp_path.iterdir()} == {
        f"{n}-{k}" for n in {*names, "target"} for k in ("pairs", "anchors")
    }
    assert other["native"].save(tmp_path / "native.safetensors").exists()


def test_arms_may_be_left_out(fitted):
    expert, target, steer, _ = fitted
    arms = steer.controls(expert, target, PAIRS, GENERAL, untrained=0, draws=0, progress=False)
    assert list(arms) == ["native", "text_features"]
    with pytest.raises(NotFittedError):
        clone(steer).controls(expert, target, PAIRS, GENERAL)


def test_native_is_the_targets_own_direction(fitted):
    _, target, _, arms = fitted
    states = es.collect(target, TEXTS.texts, [0, 3], progress=False)
    for v in arms["native"].vectors:
        own = find_direction(states[v.layer], TEXTS.labels, "mean_difference", groups=TEXTS.groups).vector
        assert cosine(v.direction, own) > 1 - 1e-6


def test_untrained_is_the_same_fit_with_random_weights(fitted):
    expert, target, steer, arms = fitted
    for seed, plan in enumerate(arms["untrained"], 1):
        by_hand = clone(steer).fit(untrained_like(expert, seed), target, PAIRS, GENERAL, progress=False)
        assert equal(plan, by_hand)
        assert plan.info["expert"]["id"] == f"untrained-{seed}"


def test_permuted_is_the_experts_direction_through_shuffled_anchors(fitted):
    expert, target, steer, arms = fitted
    e, t = (es.collect(m, GENERAL, range(4), progress=False) for m in (expert, target))
    for pair, aligner, found in zip(steer.pairs_, steer.aligners_, steer.directions_, strict=True):
        at = arms["permuted"][0].layers.index(pair.target)  # a plan's vectors are in the order of layers
        shuffled = PermutedAligner(es.RidgeAligner(alpha=aligner.alpha_), 4).fit(e[pair.expert], t[pair.target])
        by_hand = shuffled.map_direction(found.vector, found.space)
        assert cosine(arms["permuted"][0].vectors[at].direction, by_hand) > 0.9999
    assert len({tuple(p.vectors[0].direction.tolist()) for p in arms["permuted"]}) == 3
    assert all(equal(a, b) for a, b in zip(arms["random"], random_plans(steer.plan_, 3, 4), strict=True))


def test_text_features_see_the_texts_alone(fitted):
    _, target, steer, arms = fitted
    other = es.ExpertSteer(**{**steer.get_params(deep=False), "layers": [(3, 3), (0, 0)]})
    other.fit(tiny("llama", seed=5), target, PAIRS, GENERAL, progress=False)
    with_other = other.controls(tiny("llama", seed=5), target, PAIRS, GENERAL, untrained=0, draws=0, progress=False)
    for a, b in zip(arms["text_features"].vectors, with_other["text_features"].vectors, strict=True):
        torch.testing.assert_close(a.direction, b.direction)


def test_text_features_keep_what_texts_share():
    chat = [{"role": "user", "content": "Good soup!"}, {"role": "assistant", "content": "yes"}]
    labelled, anchors = text_features(["good soup", chat], ["Good soup", "bad weather here", "Good soup! yes"], 8)
    assert labelled.shape == (2, 3) and anchors.shape == (3, 3) and labelled.dtype == torch.float64
    torch.testing.assert_close(labelled, anchors[[0, 2]])  # of two chats the roles do not count, nor does the case
    assert labelled[0] @ labelled[1] > 0.3 > abs(labelled[0] @ anchors[1])
    g = torch.Generator().manual_seed(0)
    letters = [["alpha", "beta", "gamma", "delta", "eta", "theta"][i] for i in torch.randint(6, (600,), generator=g)]
    texts = [" ".join(letters[i : i + 6]) for i in range(0, 600, 6)]
    x, y = text_features(texts[:50], texts[50:], 40)
    has = torch.tensor([float("gamma" in t) for t in texts])
    map_ = es.RidgeAligner().fit(y, has[50:, None])
    assert map_.score(x, has[:50, None]) > 0.5


def test_nothing_is_read_twice():
    expert, target = build("llama", seed=7), build("gpt2", seed=7)
    count = Counted(expert=expert._module.model.layers[0], target=target._module.transformer.h[0])
    steer = es.ExpertSteer(layers=[(1, 2)])
    steer.fit(expert, target, PAIRS, GENERAL, batch_size=8, progress=False)
    assert count.of == {
        "expert": 19,
        "target": 19,
    }  # the target's own states of the labelled texts tell the cosine, and `native`
    steer.controls(expert, target, PAIRS, GENERAL, batch_size=8, untrained=1, draws=2, progress=False)
    assert count.of == {"expert": 19, "target": 19}
    steer.controls(expert, target, PAIRS, GENERAL, batch_size=8, untrained=1, draws=2, progress=False)
    assert count.of == {"expert": 19, "target": 19}
    steer.controls(expert, target, PAIRS, GENERAL[:-1], batch_size=8, untrained=0, draws=0, progress=False)
    assert count.of == {"expert": 29, "target": 29}  # other anchors are read


def test_another_model_is_not_taken_for_the_one_that_was_read():
    target, steer = tiny("gpt2"), es.ExpertSteer(layers=[(1, 2)])
    steer.fit(tiny("llama"), target, PAIRS, GENERAL, progress=False)
    swapped = steer.controls(target, tiny("llama"), PAIRS, GENERAL, untrained=0, draws=0, progress=False)
    states = es.collect(tiny("llama"), TEXTS.texts, [2], progress=False)[2]
    own = find_direction(states, TEXTS.labels, "mean_difference").vector
    assert cosine(swapped["native"].vectors[0].direction, own) > 1 - 1e-6


def test_controls_of_an_expert_minus_its_base():
    base, target, texts = tiny("gpt2"), tiny("llama"), [p for p, _ in PAIRS]
    expert = shifted(base, 1, torch.randn(32, generator=torch.Generator().manual_seed(3)))
    steer = es.ExpertSteer(layers=[(1, 2)])
    steer.fit(expert, target, texts, GENERAL, base=base, progress=False)
    arms = steer.controls(expert, target, texts, GENERAL, base=base, untrained=1, draws=2, progress=False)
    assert list(arms) == ["untrained", "permuted", "random"]
    by_hand = clone(steer).fit(untrained_like(expert, 1), target, texts, GENERAL, base=base, progress=False)
    assert equal(arms["untrained"][0], by_hand)


def test_controls_of_real_labels():
    expert, target = tiny("llama"), tiny("gpt2")
    states = es.collect(expert, TEXTS.texts, [1], progress=False)[1]
    labelled = LabelledTexts(TEXTS.texts, states[:, 0])
    steer = es.ExpertSteer(layers=[(1, 2)], direction="rfm", kind="pattern")
    steer.fit(expert, target, labelled, GENERAL, progress=False)
    arms = steer.controls(expert, target, labelled, GENERAL, untrained=1, draws=2, progress=False)
    assert list(arms) == ARMS and arms["native"].info["pairs"][0]["method"] == "rfm"


@pytest.mark.parametrize("space", ["expert", "target"])
@pytest.mark.parametrize("aligner", [None, es.CovarianceAligner(), es.ProcrustesAligner()])
def test_from_states_chance_stays_below_what_was_planted(space, aligner):
    labelled, y, e, t, truth = planted()
    kind = {"direction": "lda"} if isinstance(aligner, es.CovarianceAligner) and space == "expert" else {}
    steer = es.ExpertSteer(aligner, layers=[(1, 2), (2, 1)], space=space, **kind)
    plan = steer.fit_activations(labelled, y, e, t)
    g = torch.Generator().manual_seed(1)
    noise = [
        tuple({i: torch.randn(x.shape, generator=g) for i, x in s.items()} for s in (labelled, e)) for _ in range(2)
    ]
    arms = control_arms(steer, labelled, y, e, t, untrained=noise, draws=12)
    assert list(arms) == ["untrained", "permuted", "random"] and steer.plan_ is plan

    def to_truth(p):
        return sum(abs(cosine(v.direction, truth[v.layer])) for v in p.vectors) / 2

    assert to_truth(plan) > 0.9
    for arm in arms.values():
        assert sum(map(to_truth, arm)) / len(arm) < 0.5
    if space == "target":  # draw n is the same fit with the n-th shuffling
        shuffled = PermutedAligner(steer.aligners_[0], 5).fit(e[1], t[2])
        by_hand = find_direction(shuffled.transform(labelled[1]), y, "mean_difference").vector
        assert cosine(arms["permuted"][5].vectors[1].direction, by_hand) > 1 - 1e-6


def test_shuffled_anchors_are_no_controls_only_where_the_map_ignores_them():
    """A large mean of the states must not make every shuffling look like the fit itself."""
    labelled, y, e, t, _ = planted()
    moved = {name: x + 1e4 if name.startswith("layer") else x for name, x in t._memory.items()}
    far = type(t)(t.model, t.layers, t.n_texts, t.position, None, moved)
    steer = es.ExpertSteer(layers=[(1, 2)], space="target")
    plan = steer.fit_activations(labelled, y, e, far)
    for draw in control_arms(steer, labelled, y, e, far, draws=3)["permuted"]:
        assert abs(cosine(draw.vectors[0].direction, plan.vectors[0].direction)) < 0.9


def test_an_auto_encoder_does_not_use_the_pairing():
    labelled, y, e, t, _ = planted()
    steer = es.ExpertSteer.paper(layers=[(1, 2)], direction="mean_difference", random_state=3)
    plan = steer.fit_activations(labelled, y, e, t)
    for draw in control_arms(steer, labelled, y, e, t, draws=2)["permuted"]:
        assert cosine(draw.vectors[0].direction, plan.vectors[0].direction) > 1 - 1e-6


def test_an_identity_has_no_anchors_to_shuffle():
    labelled, y, _, t, _ = planted(d_expert=16)
    steer = es.ExpertSteer(es.IdentityAligner(), layers=[(1, 2)])
    steer.fit_activations(labelled, y, t, t)
    texts = [f"{i} a" for i in range(120)], [f"{i} b" for i in range(400)]
    assert list(control_arms(steer, labelled, y, t, t, labelled_target=labelled, texts=texts)) == ["native", "random"]


def test_an_untrained_expert_has_the_shape_and_other_weights():
    model = build("qwen3", bos=True)
    state = torch.get_rng_state()
    control, again, other = (untrained_like(model, s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.shape for p in control._module.parameters()] == [p.shape for p in model._module.parameters()]
    assert fingerprint(control) == fingerprint(again) != fingerprint(other) != fingerprint(model)
    assert control.tokenizer is model.tokenizer
    assert es.collect(control, PROMPTS, [1], progress=False)[1].shape == (4, 32)
