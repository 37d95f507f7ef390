"""The same call, remote and local, gives the same."""

from __future__ import annotations

import importlib.util
import re
import runpy

import nnsight
import pytest
import torch
from lab import BOS, REPOSITORY, SMOL, TINY, vector

import expertsteer_nnsight as es
from expertsteer_nnsight import Positions, Remote, SteeringPlan
from expertsteer_nnsight.measure.calibration import calibrate_many
from expertsteer_nnsight.measure.measuring import measure
from expertsteer_nnsight.measure.scoring import costs
from expertsteer_nnsight.models.prompts import Prompts
from expertsteer_nnsight.steering.plan import random_plans
from expertsteer_nnsight.texts.word_ends import shared_ends

PROMPTS = ["The capital of France is", "My favourite food is a big plate of", "Once upon a time"]
TEXTS = es.example("general")[:60]
REPOS = pytest.mark.parametrize("repo", [TINY, BOS, SMOL])
SETTINGS = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}


def plans(model):
    last, width = len(model.model.layers) - 1, model.config.hidden_size
    predictor = torch.randn(width + 1, width, generator=torch.Generator().manual_seed(9)) / width**0.5
    return {
        "everywhere": SteeringPlan([vector(model, 1, 0.6), vector(model, last, 0.4, 1, op="add_keep_norm")]),
        "prompt": SteeringPlan([vector(model, 1, 0.9, where="prompt", skip_special=False)]),
        "completion": SteeringPlan([vector(model, 1, 0.6, where="completion", from_step=1)]),
        "rows": SteeringPlan([vector(model, 1, torch.tensor([0.6, -0.7, 0.0]), rows=3, where="completion")]),
        "ops": SteeringPlan([vector(model, 1, 0.5, op="clamp"), vector(model, 1, 1.0, 2, op="project_out")]),
        "activations": SteeringPlan(
            [
                vector(model, 1, 0.6, rows=3, op="blend", where="last_prompt"),
                vector(model, 1, 0.5, 3, op="innovation", where="given", at=[[1, 2], [], [3]], predictor=predictor),
            ],
            prompts=Prompts.of([model.tokenizer(p)["input_ids"] for p in PROMPTS]),
        ),
    }


def unsteered(model, remote):
    with model.generate(PROMPTS, remote=remote, **SETTINGS) as tracer:
        ids = nnsight.save(tracer.result)
    return ids


def by_apply(model, plan, remote):
    with model.generate(remote=remote, **SETTINGS) as tracer:
        with tracer.invoke(PROMPTS):
            for _ in tracer.iter[:]:
                plan.apply(model)
        with tracer.invoke():
            ids = nnsight.save(tracer.result)
    return ids


def by_attach(model, plan, remote):
    steered = plan.attach(model)
    with steered.generate(PROMPTS, remote=remote, **SETTINGS) as tracer:
        ids = nnsight.save(tracer.result)
    return ids


def in_a_trace(model, plan, remote):
    return in_a_trace_of(PROMPTS, model, plan, remote)


def in_a_trace_of(prompts, model, plan, remote):
    with model.trace(prompts, remote=remote):
        plan.apply(model)
        logits = nnsight.save(model.output.logits[:, -1])
    return logits


def in_a_session(model, plan, remote):
    with model.session(remote=remote):
        found = nnsight.save([])
        with model.trace(PROMPTS):
            plan.apply(model)
            first = model.output.logits[:, -1]
        with model.trace(PROMPTS):
            plan.apply(model)
            found.append(first + model.output.logits[:, -1])
    return found[0]


def close(a, b):
    return float((a - b).abs().max() / b.abs().max()) <= 1e-4


@REPOS
@pytest.mark.parametrize("position", ["last", "mean", -2])
def test_collected_states_are_the_local_ones(repo, position, models, lean):
    lean(position != "last")
    far, near = models(repo)
    remote = Remote()
    a = es.collect(far, TEXTS, position=position, batch_size=25, remote=remote, progress=False)
    b = es.collect(near, TEXTS, position=position, progress=False)
    assert list(a) == list(b) == list(range(len(near.model.layers)))
    assert all(close(a[layer], b[layer]) for layer in a)
    assert all(a.norm(layer) == pytest.approx(b.norm(layer), rel=1e-4) for layer in a)
    assert remote.traffic.jobs == 3


def test_states_at_further_ends_are_the_local_ones(models):
    far, near = models(BOS)
    ends = shared_ends(TEXTS, [(near.tokenizer, 1)], 3)
    remote = Remote()
    a = es.collect(far, TEXTS, ends=ends, batch_size=30, remote=remote, progress=False)
    b = es.collect(near, TEXTS, ends=ends, progress=False)
    assert a.n_texts == b.n_texts > 2 * len(TEXTS) and a.text_of == b.text_of and remote.traffic.jobs == 2
    assert all(close(a[layer], b[layer]) for layer in a)


@REPOS
@pytest.mark.parametrize("name", ["everywhere", "prompt", "completion", "rows", "ops", "activations"])
def test_steered_generation_has_the_local_tokens(repo, name, models, lean):
    if repo == SMOL and name in ("ops", "prompt", "activations"):
        pytest.skip("the tiny models do")
    lean(
        (repo, name)
        not in [(TINY, "everywhere"), (TINY, "completion"), (BOS, "prompt"), (SMOL, "rows"), (BOS, "activations")]
    )
    far, near = models(repo)
    plan, plain = plans(near)[name], unsteered(near, False)
    local = by_apply(near, plan, False)
    assert not torch.equal(local, plain)
    assert torch.equal(by_apply(far, plan, True), local)
    assert torch.equal(by_attach(near, plan, False), local)
    assert torch.equal(by_attach(far, plan, True), local)


@REPOS
def test_unsteered_generation_has_the_local_tokens(repo, models):
    far, near = models(repo)
    assert torch.equal(unsteered(far, True), unsteered(near, False))


@REPOS
@pytest.mark.parametrize("name", ["everywhere", "completion", "rows"])
def test_traces_and_sessions_have_the_local_logits(repo, name, models, host, lean):
    lean((repo, name) not in [(TINY, "rows"), (BOS, "completion"), (SMOL, "everywhere")])
    far, near = models(repo)
    plan = plans(near)[name]
    local = in_a_trace(near, plan, False)
    assert close(in_a_trace(far, plan, True), local)
    assert close(in_a_trace(far, plan, host), local)
    assert close(in_a_session(far, plan, True), 2 * local)


def test_invokes_of_one_batch_are_steered_apart(models):
    far, near = models(TINY)
    up, down = plans(near)["everywhere"], -plans(near)["completion"]

    def run(model, remote):
        with model.generate(remote=remote, **SETTINGS) as tracer:
            with tracer.invoke(PROMPTS[:2]):
                for _ in tracer.iter[:]:
                    up.apply(model)
            with tracer.invoke(PROMPTS[2:]):
                for _ in tracer.iter[:5]:
                    down.apply(model)
            with tracer.invoke():
                ids = nnsight.save(tracer.result)
        return ids

    assert torch.equal(run(far, True), run(near, False))


def test_a_steered_model_composes_with_other_reads(models):
    far, near = models(TINY)
    plan = plans(near)["everywhere"]

    def run(model, remote):
        steered = plan.attach(model)
        with steered.generate(remote=remote, **SETTINGS) as tracer:
            with tracer.invoke(PROMPTS):
                found = nnsight.save([])
                for _ in tracer.iter[:4]:
                    found.append(steered.lm_head(steered.model.layers[2].output)[:, -1])
        return torch.stack(list(found))

    assert close(run(far, True), run(near, False))


def test_the_package_itself_can_be_named_in_a_block(models):
    far, near = models(BOS)
    plan = plans(near)["prompt"]

    def run(model, remote):
        with model.trace(PROMPTS, remote=remote):
            positions = es.Positions.read(model)
            before = nnsight.save(es.Residual(model).read(0))
            plan.apply(model, positions)
            logits = nnsight.save(model.output.logits)
        return before, logits

    for a, b in zip(run(far, True), run(near, False), strict=True):
        assert close(a, b)


@pytest.mark.parametrize("late_step", [0, 2])
def test_a_layer_that_was_passed_is_an_error_in_every_step(late_step, models):
    far, near = models(TINY)
    plan = plans(near)["everywhere"]

    def run(model, remote):
        with model.generate(remote=remote, **SETTINGS) as tracer:
            with tracer.invoke(PROMPTS):
                for step in tracer.iter[:]:
                    positions = Positions.read(model)
                    if step == late_step:
                        _ = model.model.layers[2].output
                    plan.apply(model, positions)
            with tracer.invoke():
                nnsight.save(tracer.result)

    for model, remote in ((near, False), (far, True)):
        with pytest.raises(Exception, match=f"layer 1, which the model has already run past in step {late_step}"):
            run(model, remote)


def test_a_users_own_error_shows_their_line(models):
    far, near = models(TINY)
    plan = plans(near)["everywhere"]
    with pytest.raises(Exception, match="IndexError") as caught, far.trace(PROMPTS, remote=True):
        plan.apply(far)
        far.model.layers[3].output[:, 9999]  # the line to be shown
    told = str(caught.value)
    assert "far.model.layers[3].output[:, 9999]" in told
    assert __file__ in told and "plan.py" not in told


def test_costs_effects_and_calibration_are_the_local_ones(models):
    far, near = models(SMOL)
    arms = [SteeringPlan([vector(near, 14, 0.3, seed)]) for seed in range(2)]
    probe = es.example("sentiment_probe")
    neutral, prompts = probe["neutral_texts"][:2], probe["test_prompts"][:3]
    remote = Remote()
    for a, b in zip(costs(far, arms, neutral, remote=remote), costs(near, arms, neutral), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert remote.traffic.jobs == 1
    words = es.Words(prompts, probe["positive_words"], probe["negative_words"])
    a, b = words.score(far, arms, remote=True), words.score(near, arms)
    assert torch.allclose(a, b, atol=1e-3)
    a, b = calibrate_many(far, arms, neutral, remote=True), calibrate_many(near, arms, neutral)
    assert torch.allclose(a.strength, b.strength, rtol=1e-3) and bool(a.met.all())
    a, b = es.calibrate(arms, far, neutral, rollout=4, remote=True), es.calibrate(arms, near, neutral, rollout=4)
    assert [p.vectors[0].strength for p in a] == pytest.approx([p.vectors[0].strength for p in b], rel=1e-3)
    items = es.Choices([(p, " great", " awful") for p in prompts])
    assert torch.allclose(items.score(far, a, remote=True), items.score(near, b), atol=1e-3)


def test_a_receipt_is_the_local_one(models, lean):
    lean(True)
    far, near = models(SMOL)
    data = es.example("sentiment_probe")
    words = es.Words(data["test_prompts"][:2], data["positive_words"], data["negative_words"])
    plan = SteeringPlan([vector(near, 14, 0.3)])
    arms, neutral = {"plan": plan, "random": random_plans(plan, 2)}, data["neutral_texts"][:1]
    settings = {"rollout": 4, "progress": False}
    a = measure(far, arms, words, neutral, remote=True, **settings)
    b = measure(near, arms, words, neutral, **settings)
    for name in arms:
        assert a.arms[name]["effect"] == pytest.approx(b.arms[name]["effect"], abs=1e-2)


@pytest.mark.parametrize("where", ["expert", "target", "both"])
def test_a_fit_is_the_local_one_wherever_the_models_are(where, models, host, lean):
    lean(where != "both")
    far_expert, near_expert = models(BOS)
    far_target, near_target = models(TINY)
    pairs = es.example("sentiment_pairs").split("train")[:20]
    recipe = es.ExpertSteer.recommended(n_pairs=2, band=(0.0, 1.0))
    local = recipe.fit(near_expert, near_target, pairs, TEXTS, progress=False)
    # two addresses of one server stand for two hosts
    elsewhere = Remote(host.replace("127.0.0.1", "localhost"))
    plan = recipe.fit(
        near_expert if where == "target" else far_expert,
        near_target if where == "expert" else far_target,
        pairs, TEXTS, progress=False,
        remote_expert=False if where == "target" else elsewhere,
        remote_target=False if where == "expert" else host,
    )  # fmt: skip
    assert plan.layers == local.layers
    for a, b in zip(plan.vectors, local.vectors, strict=True):
        assert torch.allclose(a.direction, b.direction, atol=1e-3)
        assert a.residual_norm == pytest.approx(b.residual_norm, rel=1e-4)


@pytest.mark.parametrize("where", ["expert", "target", "both"])
def test_a_live_expert_is_the_local_one_wherever_the_models_are(where, models, host, lean):
    lean(where != "both")
    far_expert, near_expert = models(BOS)
    far_target, near_target = models(TINY)
    settings = {"layers": [(2, 1)], "follow": True}
    local = es.LiveExpert(**settings).fit(near_expert, near_target, TEXTS[:20], progress=False)
    live = es.LiveExpert(**settings).fit(
        near_expert if where == "target" else far_expert,
        near_target if where == "expert" else far_target,
        TEXTS[:20], progress=False,
        remote_expert=False if where == "target" else Remote(host.replace("127.0.0.1", "localhost")),
        remote_target=False if where == "expert" else host,
    )  # fmt: skip
    assert live.generate(PROMPTS, 8) == local.generate(PROMPTS, 8)
    questions = es.MultipleChoice([(p, [" a dog", " the fox"], 0) for p in PROMPTS])
    found = questions.score(live.target_, [live], remote=live.remote_target_)
    torch.testing.assert_close(found, questions.score(near_target, [local]), rtol=1e-3, atol=1e-3)
    plan = live.plan(PROMPTS)
    with pytest.raises(Exception, match="made for other prompts"):
        in_a_trace_of(PROMPTS[::-1], live.target_, plan, live.remote_target_)


def test_what_comes_back_is_the_states_and_little_else(models, lean):
    lean(True)
    far, _ = models(SMOL)
    texts = es.example("general")[:200]
    remote = Remote()
    found = es.collect(far, texts, remote=remote, progress=False)
    own = sum(found[layer].nbytes for layer in found)
    print(f"\n{remote.traffic.received / 200:.0f} bytes a text, {own / 200:.0f} of states; {remote.traffic.jobs} jobs")
    assert remote.traffic.received <= 1.1 * own
    assert remote.traffic.jobs <= 4


def test_the_recipe_runs(models, capsys, lean):
    lean(True)
    # by its file: with the repository on the path the package would be found there, and not where it is installed
    spec = importlib.util.spec_from_file_location("steer_on_ndif", REPOSITORY / "recipes" / "steer_on_ndif.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    arguments = ["--target", SMOL, "--expert", BOS, "--remote-expert", "--anchors", "60", "--tokens", "4"]
    far, _ = models(SMOL)
    es.collect(far, TEXTS[:1], remote=True, progress=False)  # so that it runs there
    assert recipe.running(Remote()) in (TINY, BOS, SMOL)
    plan = recipe.main(arguments)
    told = capsys.readouterr().out
    assert plan.target.name == "SmolLM2-135M-Instruct" and told.count("towards:") == 3 and "MB received" in told


def test_the_readmes_code_runs(models, tmp_path, lean):
    lean(True)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python ndif\n(.*?)```", readme, flags=re.DOTALL))
    changes = {
        '"google/gemma-3-270m"': repr(BOS),
        '"meta-llama/Llama-3.1-8B"': repr(SMOL),
        'anchors=es.example("general")': 'anchors=es.example("general")[:200]',
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    (tmp_path / "readme.py").write_text(code, encoding="utf-8")
    found = runpy.run_path(str(tmp_path / "readme.py"))
    assert found["ids"].shape[1] > 20 and found["remote"].traffic.jobs > 3
