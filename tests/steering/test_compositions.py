"""Recipes that compose plans with other analyses: what must hold on any model, on tiny random ones and on the packaged pair."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from tiny import PROMPTS, build, hooks, tiny

import expertsteer_nnsight as es
from expertsteer_nnsight.measure.rollouts import rollouts
from recipes import pair
from recipes.activation_patching import GROUPS, patching
from recipes.adding_plans import TENSE, interference, own_plan
from recipes.attribution import attribution, gradients
from recipes.conditional_steering import Probe, fit_probe, generate_where
from recipes.logit_lens import lens, log_odds, output_parts, tuned_maps
from recipes.nearest_tokens import nearest_tokens, token_cosines
from recipes.steered_cache import cached, trail

REAL = [pytest.mark.real, pytest.mark.recipes, pytest.mark.timeout(900)]
PAIR = pytest.param("pair", marks=REAL)


class Case(NamedTuple):
    model: object
    plan: es.SteeringPlan
    words: es.Words
    last: int

    @property
    def prompts(self):
        return list(self.words.prompts)


def plan_of(width=32, layers=(1, 2), **settings):
    g = torch.Generator().manual_seed(0)
    settings = {"strength": 0.5, "residual_norm": 3.0, **settings}
    return es.SteeringPlan([es.SteeringVector(i, torch.randn(width, generator=g), **settings) for i in layers])


def case_of(name):
    if name == "pair":
        return Case(pair.target(), pair.plan(), pair.words(3), 29)
    return Case(tiny(*name), plan_of(), es.Words(PROMPTS, ["brown", "test"], ["lazy", "model"]), 3)


@pytest.fixture(scope="module", params=[("llama",), ("gpt2",), ("gemma3", True), PAIR], ids=str)
def case(request):
    return case_of(request.param)


# -- logit lens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "neox", "opt", "mixtral"])
def test_the_lens_of_the_last_layer_is_the_models_output(arch):
    found, logits = lens(tiny(arch), PROMPTS, [0, 3])
    torch.testing.assert_close(found[1], logits, rtol=1e-4, atol=1e-4)
    assert (found[0] - logits).abs().max() > 0.1


def test_a_steered_lens_differs_from_the_first_steered_layer_on(case):
    first = case.plan.layers[0]
    layers = [first - 1, first, case.last]
    plain, _ = lens(case.model, case.prompts, layers)
    steered, logits = lens(case.plan.attach(case.model), case.prompts, layers)
    assert torch.equal(plain[0], steered[0]) and not torch.allclose(plain[1], steered[1])
    torch.testing.assert_close(steered[2], logits, rtol=1e-4, atol=1e-4)
    expected = case.words.score(case.model, [case.plan])[1]
    torch.testing.assert_close(log_odds(case.model, case.words)(logits), expected, rtol=1e-3, atol=2e-3)


def test_a_map_is_applied_before_the_norm(case):
    width = case.plan.vectors[0].direction.shape[0]
    eye = SimpleNamespace(coef_=torch.eye(width).double(), intercept_=torch.zeros(width).double())
    plain, logits = lens(case.model, case.prompts, [0, case.last])
    same, _ = lens(case.model, case.prompts, [0, case.last], {0: eye})
    torch.testing.assert_close(same, plain)
    first = cached(case.model, case.prompts)[case.last, 0, -1]  # a map of every state to the first prompt's last one
    onto, _ = lens(
        case.model, case.prompts, [0, case.last], {0: SimpleNamespace(coef_=0 * eye.coef_, intercept_=first)}
    )
    torch.testing.assert_close(onto[0], logits[:1].expand_as(logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(onto[1], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.real
@pytest.mark.recipes
@pytest.mark.timeout(900)
def test_the_tuned_lens_is_nearer_to_the_output_than_the_logit_lens():
    model, prompts = pair.target(), list(pair.words(3).prompts)
    maps = tuned_maps(model, es.example("general")[-80:], [12, 24, 29], ends=2)
    assert sorted(maps) == [12, 24]
    gaps = []
    for fit in (None, maps):
        found, logits = lens(model, prompts, [12, 24], fit)
        p = logits.log_softmax(-1)
        gaps.append((p.exp() * (p - found.log_softmax(-1))).sum(-1).mean(1))
    assert (gaps[1] < 0.7 * gaps[0]).all()


# -- activation patching -----------------------------------------------------------------------------------------------


def test_patching_shares_out_the_effect(case):
    first, final = case.plan.layers[0], case.plan.layers[-1]
    layers = [first - 1, first, final, case.last]
    found = patching(case.model, case.plan, case.words, layers)
    score = case.words.score(case.model, [case.plan]).mean(1)
    assert found.layers == layers and found.effect == pytest.approx(float(score[1] - score[0]), abs=5e-3)
    for side in (found.recovered, found.removed):
        share = dict(zip(GROUPS, side, strict=True))
        assert share["all"][0] == pytest.approx(0, abs=1e-3) and share["last"][0] == pytest.approx(0, abs=1e-3)
        torch.testing.assert_close(share["all"][2:], torch.ones(2), rtol=0, atol=2e-3)
        # after the last layer nothing is read but the position that predicts
        assert share["last"][3] == pytest.approx(1, abs=2e-3) and share["prompt"][3] == pytest.approx(0, abs=2e-3)
        assert abs(share["all"][1] - 1) > 1e-3


def test_patching_is_what_plain_hooks_do():
    case = case_of(("llama",))
    words = es.Words(case.prompts[:1], case.words.positive, case.words.negative)
    blocks, odds = es.Residual(case.model).layers._module, log_odds(case.model, words)
    ids = case.model.tokenizer(words.prompts[0], return_tensors="pt")["input_ids"]

    def run(edits):
        with hooks(blocks, edits), torch.no_grad():
            return float(odds(case.model._module(ids).logits[:, -1]))

    kept = []
    steer = {v.layer: lambda h, _, v=v: h + v.length * v.direction for v in case.plan.vectors}
    high, low = run(steer | {1: lambda h, _: kept.append(steer[1](h, 0)) or kept[0]}), run({})
    last = run({1: lambda h, _: torch.cat([h[:, :-1], kept[0][:, -1:]], 1)})
    prompt = run({1: lambda h, _: torch.cat([kept[0][:, :-1], h[:, -1:]], 1)})
    found = patching(case.model, case.plan, words, [1])
    expected = torch.tensor([[prompt], [last]]).sub(low) / (high - low)
    torch.testing.assert_close(found.recovered[1:], expected, rtol=1e-3, atol=1e-3)


def test_a_plan_without_effect_has_no_shares():
    case = case_of(("llama",))
    with pytest.raises(ValueError, match="no effect that layers could share"):
        patching(case.model, 0.0 * case.plan, case.words)


# -- attribution -------------------------------------------------------------------------------------------------------


def test_gradients_are_finite_differences(case):
    slopes = gradients(case.model, case.words)
    assert len(slopes) == case.last + 1
    width = slopes.shape[1]
    for layer in (case.plan.layers[0], case.last):
        # along the gradient, and along something that has little to do with it
        for u in (slopes[layer], torch.randn(width, generator=torch.Generator().manual_seed(layer)) + slopes[layer]):
            u = torch.nn.functional.normalize(u, dim=0)
            step = 2e-3 * (case.plan.vectors[0].residual_norm or 1.0)
            moved = [es.SteeringPlan([es.SteeringVector(layer, u, s * step)]) for s in (1, -1)]
            up, down = case.words.score(case.model, moved)[1:].double().mean(1).tolist()
            expected = (up - down) / (2 * step)
            assert float(slopes[layer] @ u) == pytest.approx(expected, rel=0.03, abs=3e-3 * float(slopes[layer].norm()))


def test_the_first_order_foretells_a_small_dose(case):
    *rows, whole = attribution(case.model, case.plan, case.words, 0.01)
    steered = [row for row in rows if row.cosine is not None]
    assert [row.layer for row in steered] == list(case.plan.layers) and len(rows) == case.last + 1
    assert whole.predicted == pytest.approx(sum(row.predicted for row in steered))
    scale = 0.01 * sum(row.norm * v.length for row, v in zip(steered, case.plan.vectors, strict=True))
    for row in (*steered, whole):
        assert row.predicted == pytest.approx(row.measured, rel=0.05, abs=2e-3 * scale)
    for row, v in zip(steered, case.plan.vectors, strict=True):
        assert row.predicted == pytest.approx(0.01 * row.norm * row.cosine * v.length, rel=1e-4)


def test_gradients_keep_to_a_plans_places():
    case = case_of(("llama",))
    everywhere = gradients(case.model, case.words)
    parts = [gradients(case.model, case.words, {1: (where, 0, True)}) for where in ("prompt", "completion")]
    torch.testing.assert_close(parts[0][1] + parts[1][1], everywhere[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[0][2], everywhere[2])
    assert parts[0][1].norm() > 0 and parts[1][1].norm() > 0
    assert all(p.grad is None for p in case.model._module.parameters())


def test_only_added_vectors_have_a_first_order():
    case = case_of(("llama",))
    with pytest.raises(ValueError, match='op="add"'):
        attribution(case.model, case.plan.with_(op="clamp"), case.words)
    two = case.plan.with_(where="prompt") + case.plan
    with pytest.raises(ValueError, match="different positions"):
        attribution(case.model, two, case.words)


# -- nearest tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_cosines_are_those_after_the_norms_weight(arch):
    model = build(arch)
    norm, unembed = (part._module for part in output_parts(model))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.add_(torch.rand(32, generator=g))
        if arch == "gpt2":
            norm.bias.add_(torch.rand(32, generator=g))
    v, rows = torch.randn(3, 32, generator=g), unembed.weight.detach()
    centred = v - v.mean(1, keepdim=True) if arch == "gpt2" else v
    seen = centred * (norm.weight.detach() + (arch == "gemma3"))
    for centre in (True, False):
        against = rows - rows.mean(0) if centre else rows
        expected = torch.cosine_similarity(seen[:, None], against[None], dim=-1)
        torch.testing.assert_close(token_cosines(model, v, centre), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(token_cosines(model, 7 * v, centre), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", PAIR])
def test_the_nearest_token_of_an_unembedding_row_is_its_own(name):
    model = pair.target() if name == "pair" else tiny(name)
    norm, unembed = (part._module for part in output_parts(model))
    rows = unembed.weight.detach().float()
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (" brown", " lazy", "world")]
    for centre in (True, False):
        against = rows - rows.mean(0) if centre else rows
        cosines = token_cosines(model, against[ids] / norm.weight.detach().float(), centre)
        assert cosines.argmax(1).tolist() == ids
        torch.testing.assert_close(cosines.amax(1), torch.ones(3), rtol=0, atol=1e-3)
        high, _ = nearest_tokens(model, cosines[0], 2)
        _, low = nearest_tokens(model, -cosines[0], 2)
        assert high[0][0] == low[0][0] == model.tokenizer.decode([ids[0]]) and high[0][1] == -low[0][1]


# -- adding plans ------------------------------------------------------------------------------------------------------


def test_a_plan_and_its_negative_cancel(case):
    neutral = case.prompts[:2]
    found = interference(case.model, case.plan, -case.plan, {"words": case.words}, neutral)
    first, second, both = found.effects["words"]
    assert both == pytest.approx(0, abs=1e-3 * abs(first) + 1e-4) and abs(first) > 0.01
    assert found.beyond("words") == pytest.approx(both - first - second)
    assert found.kl[2] < 1e-4 < min(found.kl[:2])
    assert all(c == pytest.approx(-1, abs=1e-5) for c in found.cosines.values())
    assert tuple(found.cosines) == case.plan.layers


def test_two_halves_are_the_whole(case):
    half = 0.5 * case.plan
    found = interference(case.model, half, half, {"words": case.words}, case.prompts[:2])
    score = case.words.score(case.model, [case.plan]).mean(1)
    assert found.effects["words"][2] == pytest.approx(float(score[1] - score[0]), abs=2e-3)


@pytest.mark.parametrize("name", ["llama", PAIR])
def test_an_own_plan_is_the_mean_difference_of_the_models_own_states(name):
    case = case_of(("llama",) if name == "llama" else name)
    layers = case.plan.layers[:2]
    found = own_plan(case.model, TENSE, layers, [f"{p} {i}" for p in PROMPTS for i in range(6)], position="mean")
    states = es.collect(case.model, es.ContrastPairs.of(TENSE).texts, layers, "mean", progress=False)
    for vector in found.vectors:
        difference = (states[vector.layer][::2] - states[vector.layer][1::2]).mean(0)
        assert torch.cosine_similarity(vector.direction, difference, 0) == pytest.approx(1, abs=1e-4)


# -- conditional steering ----------------------------------------------------------------------------------------------


def new_tokens(model, prompts, plan, count):
    return [text.ids[text.prompt :] for text in rollouts(model, prompts, plan, count)]


def test_rows_are_steered_where_the_probe_fires_and_nowhere_else(case):
    check_rows(case, "add")


def test_rows_are_left_alone_by_ops_that_a_strength_of_zero_does_not_undo():
    check_rows(case_of(("llama",)), "clamp")


def check_rows(case, op):
    prompts, plan, layer = [*case.prompts, "hello world"], case.plan.with_(op=op), case.plan.layers[0] - 1
    states = es.collect(case.model, prompts, [layer], progress=False)[layer]
    direction = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(3))
    along = states @ direction
    never, always = (new_tokens(case.model, prompts, p, 8) for p in (None, plan))
    assert never != always
    for threshold in (float(along.sort().values[1:3].mean()), -1e9, 1e9):
        ids, margins = generate_where(case.model, plan, Probe(layer, direction, threshold), prompts, 8)
        torch.testing.assert_close(margins, along - threshold, rtol=1e-3, atol=1e-3 * float(along.abs().max()))
        fires = margins > 0
        assert fires.sum() == {-1e9: len(prompts), 1e9: 0}.get(threshold, len(prompts) - 2)
        for row, fire, steered, plain in zip(ids.tolist(), fires.tolist(), always, never, strict=True):
            told = steered if fire else plain
            assert row[: len(told)] == told  # what follows an end is padding


def test_a_probe_must_come_before_the_plan():
    case = case_of(("llama",))
    with pytest.raises(ValueError, match="steers from layer 1"):
        generate_where(case.model, case.plan, Probe(1, torch.ones(32), 0.0), case.prompts)


@pytest.mark.real
@pytest.mark.recipes
@pytest.mark.timeout(900)
def test_a_fitted_probe_tells_its_own_texts_apart():
    pairs = pair.pairs()[:20]
    probe = fit_probe(pair.target(), pairs, 13)
    along = es.collect(pair.target(), pairs.texts, [13], progress=False)[13] @ probe.direction
    right = (along > probe.threshold) == torch.tensor(pairs.labels).bool()
    assert right.float().mean() > 0.9 and 0.5 < probe.auc <= 1


# -- a steered cache ---------------------------------------------------------------------------------------------------


def test_the_cache_holds_what_plain_hooks_give(case):
    tokenizer, module = case.model.tokenizer, case.model._module
    encoded = tokenizer(case.prompts, return_tensors="pt", padding=True, padding_side="left")
    real = encoded["attention_mask"].bool()
    steered = real.clone()
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        steered &= real.cumsum(1) > 1  # the prepended token
    vectors, kept = {v.layer: v for v in case.plan.vectors}, []

    def edit(layer):
        def run(h, _call):
            v = vectors.get(layer)
            kept.append(h if v is None else h + steered[..., None] * v.length * v.direction)
            return kept[-1]

        return run

    with hooks(es.Residual(case.model).layers._module, {i: edit(i) for i in range(case.last + 1)}), torch.no_grad():
        module(**encoded, position_ids=(encoded["attention_mask"].cumsum(1) - 1).clamp_min(0))
    expected = torch.stack(kept)[:, real]
    found = cached(case.plan.attach(case.model), case.prompts)[:, real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_trail_begins_with_the_vector_itself(case):
    found, first = trail(case.model, case.plan, case.prompts), case.plan.layers[0]
    vector, before = case.plan.vectors[0], torch.arange(case.last + 1) < first
    assert found.along.isnan().equal(before) and (found.change[before] == 0).all()
    assert found.along[first] == pytest.approx(1, abs=1e-4) and found.kept[first] == pytest.approx(1, abs=1e-4)
    states = cached(case.model, case.prompts)[first, :, -1].double().norm(dim=-1)
    assert found.norm[first] == pytest.approx(float(states.median()))
    assert found.change[first] == pytest.approx(float((vector.length / states).median()), rel=1e-4)
    assert (found.cosine[before] > 1 - 1e-9).all() and found.cosine[first] < 1 - 1e-6
    with pytest.raises(ValueError, match='op="add"'):
        trail(case.model, case.plan.with_(op="project_out"), case.prompts)


# -- what they print ---------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.recipes
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("logit_lens", "--prompts 2 --texts 40 --step 20", "largest difference of a logit"),
        ("activation_patching", "--prompts 2 --step 30", "   29 100.0%    0.0%  100.0%    100.0%    0.0%  100.0%"),
        ("attribution", "--prompts 2", "At the whole strength the first order says"),
        ("nearest_tokens", "--draws 20", "Of 20 random directions"),
        ("adding_plans", "--prompts 2 --neutral 2", "Cosine of the two vectors: layer"),
        ("conditional_steering", "--rows 2 --tokens 6", "4 of 4 rows are what their gate says"),
        ("steered_cache", "--prompts 3", "`kept` near 1"),
    ],
)
def test_a_recipe_prints_its_table(name, options, line, capsys):
    importlib.import_module(f"recipes.{name}").main(options.split())
    assert line in capsys.readouterr().out
