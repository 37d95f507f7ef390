"""An expert that reads along does what plain hooks in both models do, and its controls are what they are called."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import nnsight
import numpy as np
import pytest
import torch
from planted import GENERAL
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import Ridge
from tiny import ARCHITECTURES, PROMPTS, bridge, build, hooks, tiny

import expertsteer_nnsight as es
from expertsteer_nnsight.fit import live_expert
from expertsteer_nnsight.fit.live_controls import AnotherPrompt, Mean, live_arms
from expertsteer_nnsight.fit.live_expert import LiveExpert
from expertsteer_nnsight.models.residual import Residual
from expertsteer_nnsight.states import collecting
from expertsteer_nnsight.steering.plan import stack_plans
from expertsteer_nnsight.texts.word_ends import continued_ends

QUESTIONS = es.MultipleChoice(
    [(p + " and", [" a dog", " the fox jumps", " hello"], n % 3) for n, p in enumerate(PROMPTS)]
)
FAST = {"progress": False}


def activations(model, texts, layer):
    """The output of a layer at every token of each text, by a plain hook; each text by itself."""
    found = []

    def keep(h, call):
        found.append(h[0].clone())
        return h

    with hooks(Residual(model).layers._module, {layer: keep}), torch.no_grad():
        for text in texts:
            model._module(**model.tokenizer(text, return_tensors="pt"))
    return found


def live_of(expert, target, **settings):
    return LiveExpert(**{"layers": [(2, 1)], **settings}).fit(expert, target, GENERAL, **FAST)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("amount", [1.0, 0.6])
def test_a_plan_equals_hooks_in_both_models(arch, amount):
    expert, target = tiny("gemma3", bos=True), tiny(arch)
    live = live_of(expert, target, amount=amount)
    one = live.maps_[2, 1]
    z = [h[-1] @ one.weight + one.bias for h in activations(expert, PROMPTS, 2)]

    def edit(h, call):
        new = h.clone()
        if call == 0:
            new[:, -1] = (1 - amount) * h[:, -1] + amount * torch.stack(z)
        return new

    enc = target.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with hooks(Residual(target).layers._module, {1: edit}), torch.no_grad():
        expected = target._module.generate(**enc, max_new_tokens=6, do_sample=False, pad_token_id=0)
    new = [
        itertools.takewhile(lambda t: t != target.tokenizer.eos_token_id, row)
        for row in expected[:, enc["input_ids"].shape[1] :].tolist()
    ]
    texts = [target.tokenizer.decode(list(row), skip_special_tokens=True) for row in new]
    assert live.generate(PROMPTS, 6) == live.generate(PROMPTS, 6, batch_size=1) == texts
    plan = live.plan(PROMPTS)
    with torch.no_grad(), plan.attach(target).trace(PROMPTS):
        steered = nnsight.save(target.output.logits[:, -1])
    with hooks(Residual(target).layers._module, {1: edit}), torch.no_grad():
        positions = (enc["attention_mask"].cumsum(1) - 1).clamp_min(0)
        extra = {} if arch == "opt" else {"position_ids": positions}
        torch.testing.assert_close(steered, target._module(**enc, **extra).logits[:, -1], rtol=1e-4, atol=1e-4)
    # a prompt in an invoke of its own
    with torch.no_grad(), target.trace() as tracer:
        found = nnsight.save([])
        for row, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                plan.take([row]).apply(target)
                found.append(target.output.logits[:, -1])
    torch.testing.assert_close(torch.cat(found), steered, rtol=1e-4, atol=1e-4)
    with (
        pytest.raises(ValueError, match="made for other prompts"),
        torch.no_grad(),
        plan.attach(target).trace(PROMPTS[::-1]),
    ):
        pass


def test_the_map_is_a_ridge_on_the_shared_ends():
    expert, target = build("gemma3", bos=True, seed=3), tiny("qwen2")
    live = live_of(expert, target, aligner=es.RidgeAligner(alpha=0.01))
    x, y = [], []
    for text, ours, theirs in zip(
        GENERAL, activations(expert, GENERAL, 2), activations(target, GENERAL, 1), strict=True
    ):
        own, other = (
            t(text, return_offsets_mapping=True)["offset_mapping"] for t in (expert.tokenizer, target.tokenizer)
        )
        for (n, (_, a)), (m, (_, b)) in itertools.product(enumerate(own), enumerate(other)):
            if a == b and n > 1 and m > 0:  # neither the prepended token nor what ends within a first one
                x.append(ours[n].double().numpy())
                y.append(theirs[m].double().numpy())
    x, y = np.array(x), np.array(y)
    centred = x - x.mean(0)
    expected = Ridge(0.01 * (centred**2).sum() / x.shape[1]).fit(x, y)
    one = live.maps_[2, 1]
    assert live.info_["data"]["pairs"] == len(x)
    np.testing.assert_allclose(one.weight.T.numpy(), expected.coef_, atol=1e-3 * np.abs(expected.coef_).max())
    mapped = expected.predict(x)
    np.testing.assert_allclose(one.mean.numpy(), mapped.mean(0), atol=1e-4)
    # what the target's own activation tells of the mapped one
    z = torch.as_tensor(y).float() @ one.predictor[:-1] + one.predictor[-1]
    assert ((z.numpy() - mapped) ** 2).sum() < 0.9 * ((mapped - mapped.mean(0)) ** 2).sum()


def edit_of(live, prompt, option, border):
    """The hook of the target that does what a live expert says, for one option after its prompt."""
    expert, target, one = live.expert_, live.target_, live.maps_[2, 1]
    (end,), (states,) = activations(expert, [prompt], 2), activations(expert, [prompt + option], 2)
    theirs, ours = (
        t(prompt + option, return_offsets_mapping=True)["offset_mapping"] for t in (expert.tokenizer, target.tokenizer)
    )
    shared = [
        (n, column)
        for n, (_, a) in enumerate(theirs)
        for column, (_, b) in enumerate(ours)
        if a == b and n > 1 and column > 0
    ]

    def edit(h, call):
        new = h.clone()

        def put(column, state, how, amount):
            own, z = h[0, column], state @ one.weight + one.bias
            known = {"blend": own, "innovation": own @ one.predictor[:-1] + one.predictor[-1], "add": one.mean}[how]
            new[0, column] = own + amount * (z - known)

        if live.where == "last_prompt":
            put(border - 1, end[-1], live.op, live.amount)
        for n, column in shared:
            if column >= border and live.follow:
                put(column, states[n], live.follow_op, live.follow_amount)
            elif column < border and live.where == "shared_ends":
                put(column, states[n], live.op, live.amount)
        return new

    return edit


@pytest.mark.parametrize("op", ["blend", "innovation", "add"])
@pytest.mark.parametrize("where", ["last_prompt", "shared_ends"])
@pytest.mark.parametrize("follow", [False, True])
def test_options_are_scored_as_with_hooks(op, where, follow):
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    settings = {
        "op": op,
        "where": where,
        "follow": follow,
        "amount": 0.7,
        "follow_op": "innovation",
        "follow_amount": 0.4,
    }
    live = live_of(expert, target, **settings)
    found = []
    for prompt, options, _ in QUESTIONS.items:
        for option in options:
            ids = target.tokenizer(prompt + option, return_tensors="pt")
            border = len(target.tokenizer(prompt)["input_ids"])
            edit = edit_of(live, prompt, option, border)
            with hooks(Residual(target).layers._module, {1: edit}), torch.no_grad():
                logits = target._module(**ids).logits[0].log_softmax(-1)
            new = ids["input_ids"][0, border:]
            found.append(float(logits[border - 1 : -1].gather(1, new[:, None]).sum()) / len(option.strip()))
    scored = QUESTIONS.options(target, [live])
    torch.testing.assert_close(torch.cat([x[1] for x in scored]), torch.tensor(found), rtol=1e-4, atol=1e-4)
    assert (torch.cat([x[0] for x in scored]) - torch.tensor(found)).abs().max() > 1e-3
    # with other arms in the same forward
    beside = QUESTIONS.options(target, [Mean(live), live, AnotherPrompt(live)])
    torch.testing.assert_close(torch.cat([x[2] for x in beside]), torch.tensor(found), rtol=1e-4, atol=1e-4)


def test_words_and_rollouts_take_a_live_expert():
    expert, target = tiny("qwen2"), tiny("llama")
    live = live_of(expert, target)
    words = es.Words(PROMPTS, ["dog"], ["fox"])
    scores = words.score(target, [live])
    up, down = (target.tokenizer(" " + w)["input_ids"][0] for w in ("dog", "fox"))
    with torch.no_grad(), live.plan(PROMPTS).attach(target).trace(PROMPTS):
        logits = nnsight.save(target.output.logits[:, -1])
    torch.testing.assert_close(scores[1], logits[:, up] - logits[:, down], rtol=1e-4, atol=1e-4)
    judged = es.Judged(PROMPTS, lambda texts: [float(len(t)) for t in texts], max_new_tokens=4).score(target, [live])
    assert judged[1].tolist() == [float(len(t)) for t in live.generate(PROMPTS, 4)]


def test_layers_and_amount_are_what_validation_items_like_best():
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    live = LiveExpert().fit(expert, target, GENERAL, QUESTIONS, **FAST)
    assert len(live.validation_) == len(live.maps_) + 2 and live.info_["validation"]["items"] == len(QUESTIONS)
    scores = {(tuple(layers), amount): score for layers, amount, score in live.validation_}
    assert scores[tuple(live.layers_), live.amount_] == max(scores.values())
    for layers, amount in ((live.layers_, live.amount_), ([next(iter(live.maps_))], 1.0)):
        alone = LiveExpert(layers=layers, amount=amount).fit(expert, target, GENERAL, **FAST)
        assert float(QUESTIONS.score(target, [alone])[1].mean()) == pytest.approx(
            scores[tuple(layers), amount], abs=1e-5
        )
    # without items: by depth, and all of it
    plain = LiveExpert().fit(expert, target, GENERAL, **FAST)
    assert plain.layers_ == [(3, 2)] and plain.amount_ == 1.0 and plain.validation_ == []


def test_chat_messages_are_read_with_each_models_template():
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    live = live_of(expert, target)
    chats = [[{"role": "user", "content": p}] for p in PROMPTS]
    written = [expert.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    plan = live.plan(chats)
    one = live.maps_[2, 1]
    for row, text in enumerate(written):
        ids = expert.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            h = expert._module(**ids, output_hidden_states=True).hidden_states[3][0, -1]
        torch.testing.assert_close(plan.vectors[0].direction[row], h @ one.weight + one.bias, rtol=1e-4, atol=1e-4)
    assert len(live.generate(chats, 3)) == 4
    with pytest.raises(ValueError, match="chat messages, whose templates differ"):
        live_of(expert, target, where="shared_ends").plan(chats)


def test_a_file_gives_the_same_plans(tmp_path):
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    for settings in (
        {},
        {"op": "innovation", "where": "shared_ends"},
        {"follow": True, "amount": 0.5, "layers": [(2, 1), (3, 2)]},
    ):
        live = live_of(expert, target, **settings)
        again = LiveExpert.load(live.save(tmp_path / "live.safetensors"), expert, target)
        assert again.layers_ == live.layers_ and again.amount_ == live.amount_ and again.info_ == live.info_
        for one, other in zip(live.plan(PROMPTS).vectors, again.plan(PROMPTS).vectors, strict=True):
            assert torch.equal(one.direction, other.direction)
        assert torch.equal(*(torch.cat(QUESTIONS.options(target, [x]), 1) for x in (live, again)))
    plan = live.plan(PROMPTS)
    found = es.SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert found.prompts == plan.prompts and found.vectors[0].where == "last_prompt"
    torch.testing.assert_close(found.vectors[0].direction, plan.vectors[0].direction)
    with pytest.raises(ValueError, match="read from a file without its models"):
        LiveExpert.load(tmp_path / "live.safetensors").plan(PROMPTS)
    with pytest.raises(ValueError, match=r"cannot have that model as its target.*width 32 against 64"):
        LiveExpert.load(tmp_path / "live.safetensors", expert, build("llama", hidden_size=64))
    with pytest.raises(ValueError, match="holds no live expert"):
        LiveExpert.load(tmp_path / "plan.safetensors")
    with pytest.raises(FileNotFoundError):
        LiveExpert.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda header, tensors: header.update(format_version=2), "newer than 1: upgrade"),
        (lambda header, tensors: header.update(amount="1"), "header of .* is damaged: amount"),
        (lambda header, tensors: header.update(amount=math.inf), "is damaged: amount"),
        (lambda header, tensors: header["settings"].update(op=3), "is damaged: settings.op"),
        (lambda header, tensors: header["settings"].update(op="x"), "op is 'x'"),
        (lambda header, tensors: header["settings"].update(more=3), "is damaged: settings.more"),
        (lambda header, tensors: header["maps"][0].pop("norm"), "is damaged: maps.0.norm"),
        (lambda header, tensors: header.update(maps=[]), "is damaged: maps"),
        (lambda header, tensors: header["info"].pop("target"), "is damaged"),
        (lambda header, tensors: header["info"].update(target=3), "is damaged"),
        (lambda header, tensors: tensors.pop("0.bias"), "Map 0 of .* is damaged"),
        (lambda header, tensors: tensors.update({"0.mean": torch.ones(31)}), "Map 0 of .* is damaged"),
        (lambda header, tensors: tensors["0.weight"].fill_(math.nan), "Map 0 of .* is damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    live = live_of(tiny("gemma3", bos=True), tiny("llama"))
    path = live.save(tmp_path / "live.safetensors")
    with safe_open(path, framework="pt") as file:
        meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    header = json.loads(meta["live_expert"])
    damage(header, tensors)
    save_file(tensors, path, metadata={**meta, "live_expert": json.dumps(header)})
    with pytest.raises(ValueError, match=message):
        LiveExpert.load(path)
    save_file(tensors, path, metadata={**meta, "live_expert": json.dumps(header)[:-5]})
    with pytest.raises(ValueError, match="is damaged"):
        LiveExpert.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"op": "clamp"}, "op is 'clamp': it must be \"blend\""),
        ({"follow_op": "x"}, "follow_op is 'x'"),
        ({"where": "all"}, "where is 'all'"),
        ({"amount": math.nan}, "amount is nan"),
        ({"follow_amount": math.inf}, "follow_amount is inf"),
        ({"anchor_ends": -1}, "anchor_ends is -1"),
        ({"layers": []}, r"layers is \[\]: give pairs"),
        ({"layers": [(2, 1), (2, 1)]}, "each once"),
        ({"layers": [(4, 1)]}, "layer pair \\(4, 1\\) was asked for, but the expert"),
        ({"layers": [(1, -1)]}, "layer pair \\(1, -1\\) was asked for, but the target"),
        ({"aligner": es.IdentityAligner()}, "width"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    expert = build("gemma3", bos=True, hidden_size=48, num_attention_heads=4)
    with pytest.raises(ValueError, match=message):
        LiveExpert(**settings).fit(expert, tiny("llama"), GENERAL, **FAST)


def test_controls_are_what_they_are_called():
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    live = live_of(expert, target, follow=True)
    prompts = [p for p in PROMPTS for _ in range(2)]
    options = [" a dog", " the fox"] * 4
    own, other, mean = (x.for_texts(prompts, options) for x in (live, AnotherPrompt(live), Mean(live)))
    ends = torch.stack([p.vectors[0].direction for p in own])
    moved = torch.stack([p.vectors[0].direction for p in other])
    assert torch.equal(moved[0::2], moved[1::2])  # one prompt, whatever its option
    match = torch.cdist(moved[0::2], ends[0::2]).argmin(1)
    assert sorted(match.tolist()) == [0, 1, 2, 3] and not (match == torch.arange(4)).any()
    torch.testing.assert_close(mean[0].vectors[0].direction, ends.mean(0))
    # the expert reads this item's option after the other prompt
    assert [p.vectors[1].at for p in other] == [p.vectors[1].at for p in own]
    places = continued_ends(expert.tokenizer, target.tokenizer, prompts[1], options[1])
    read = PROMPTS[int(match[0])] + options[1]
    (states,) = activations(expert, [read], 2)
    ends = [b for _, b in expert.tokenizer(read, return_offsets_mapping=True)["offset_mapping"]]
    shift = len(read) - len(prompts[1] + options[1])
    expected = [states[ends.index(end + shift)] for token, end in places.places if token >= places.prompt]
    one = live.maps_[2, 1]
    torch.testing.assert_close(
        other[1].vectors[1].direction, torch.stack(expected) @ one.weight + one.bias, rtol=1e-4, atol=1e-4
    )


def test_a_receipt_holds_every_control_on_the_same_items():
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    live = live_of(expert, target)
    found = live.receipt(QUESTIONS, GENERAL, untrained=2, **FAST)
    assert found.controls == ["another prompt", "mean", "untrained, seed 1", "untrained, seed 2", "own layer"]
    steered = QUESTIONS.options(target, [live])
    assert list(found.answers["live"]) == [int(x[1].argmax()) for x in steered]
    assert list(found.answers["unsteered"]) == [int(x[0].argmax()) for x in steered]
    alone = [x[0] for x in QUESTIONS.options(expert, [])]
    assert list(found.answers["expert alone"]) == [int(x.argmax()) for x in alone]
    assert list(found.answers["ensemble"]) == [int((x[0] + y).argmax()) for x, y in zip(steered, alone, strict=True)]
    own = live_of(target, target, layers=[(2, 1)])
    assert list(found.answers["own layer"]) == [int(x[1].argmax()) for x in QUESTIONS.options(target, [own])]
    said = replace(QUESTIONS, items=[
        (f"A colleague answered the next question with:{options[best]}\n\n{prompt}", options, right)
        for (prompt, options, right), best in zip(QUESTIONS.items, found.answers["expert alone"], strict=True)
    ])  # fmt: skip
    assert list(found.answers["told the expert's answer"]) == [int(x[0].argmax()) for x in said.options(target, [])]


def test_a_loaded_live_expert_has_the_controls_of_the_one_that_was_fitted(tmp_path):
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    live = live_of(expert, target, aligner=es.RidgeAligner(alpha=100.0, alpha_range=(1e-3, 1.0)))
    again = LiveExpert.load(live.save(tmp_path / "live.safetensors"), expert, target)
    for one in (live, again):
        arms = live_arms(one, GENERAL, untrained=1, cache=tmp_path / "cache", progress=False)
        assert list(arms) == ["another prompt", "mean", "untrained, seed 1", "own layer"]
        found = [arms[name].maps_[2, 1].weight.norm() for name in ("untrained, seed 1", "own layer")]
        assert all(float(n) < 0.3 for n in found)  # as strong a penalty as the live expert's own
    with pytest.raises(ValueError, match="fitted on other anchors than these"):
        live.receipt(QUESTIONS, GENERAL[:30], **FAST)

    class Own(es.RidgeAligner):
        """An aligner that a file cannot name."""

    other = live_of(expert, target, aligner=Own())
    loaded = LiveExpert.load(other.save(tmp_path / "other.safetensors"), expert, target)
    assert loaded.plan(PROMPTS).layers == (1,)
    with pytest.raises(ValueError, match="file does not keep its aligner"):
        loaded.receipt(QUESTIONS, GENERAL, **FAST)


def test_controls_of_one_cache_read_the_targets_anchors_once(tmp_path, monkeypatch):
    expert, target, read = tiny("gemma3", bos=True), tiny("llama"), []
    live = LiveExpert(layers=[(2, 1)]).fit(expert, target, GENERAL, cache=tmp_path, **FAST)
    forward = collecting.forward
    monkeypatch.setattr(collecting, "forward", lambda model, *more: (read.append(model), forward(model, *more))[1])
    live_arms(live, GENERAL, untrained=2, cache=tmp_path, progress=False)
    batches = -(-len(GENERAL) // 32)
    assert sum(model is target for model in read) == batches  # as its own expert, at the later layer
    assert sum(model is expert for model in read) == 0 and len(read) == 3 * batches


def test_a_receipt_tells_what_its_reader_has_to_know():
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    live = LiveExpert(layers=[(2, 3)]).fit(expert, target, GENERAL, QUESTIONS, **FAST)
    asked = replace(QUESTIONS, items=[*QUESTIONS.items[:2], ("a test of", [" a", " b"], 0)])
    found = live.receipt(asked, GENERAL, untrained=1, **FAST)
    assert "2 of the questions are among those that layers and amount were chosen on" in found.verdict
    assert "own layer" not in found.controls and "no later layer" in found.verdict
    with pytest.raises(ValueError, match="There are 1 different prompts"):
        live.receipt(replace(QUESTIONS, items=[("a dog", [" a", " b"], 0)] * 2), GENERAL, **FAST)


def test_rows_can_be_left_out_and_whole_prompts_are_needed():
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    plan = live_of(expert, target).plan(PROMPTS)
    fires = torch.tensor([True, False, True, False])
    found = []
    for steered in (None, plan):
        with torch.no_grad(), target.trace(PROMPTS):
            if steered is not None:
                steered.apply(target, es.Positions.read(target).only_rows(fires))
            found.append(nnsight.save(target.output.logits[:, -1]))
    changed = (found[0] - found[1]).abs().amax(1) > 1e-4
    assert changed.tolist() == fires.tolist()
    steered = plan.attach(target)
    with pytest.raises(ValueError, match="a prompt comes in several forwards"), torch.no_grad():
        with steered.generate(PROMPTS, max_new_tokens=2, prefill_chunk_size=2):
            pass


@pytest.mark.parametrize("op", ["blend", "innovation", "add"])
def test_one_predictor_travels_once(op):
    live = live_of(tiny("gemma3", bos=True), tiny("llama"), op=op, follow=True)
    plans = live.for_texts([p for p in PROMPTS for _ in range(4)], [f" dog {n}" for n in range(16)])
    stacked = [v for k in (0, 8) for v in stack_plans(plans[k : k + 8], True).vectors]
    for one in (v for v in [*(v for p in plans for v in p.vectors), *stacked] if v.op == "innovation"):
        kept = live.maps_[2, 1].known_mean if op == "add" and one.where == "last_prompt" else live.maps_[2, 1].predictor
        assert one.predictor is kept  # pickle writes one object once


def test_a_judge_sees_what_a_following_expert_writes():
    expert, target = tiny("qwen2"), tiny("llama")
    live = live_of(expert, target, follow=True, follow_amount=2.0)
    seen = []
    es.Judged(PROMPTS, lambda texts: (seen.append(texts), [0.0] * len(texts))[1], max_new_tokens=6).score(
        target, [live]
    )
    deaf = live_of(expert, target)
    assert seen[1] == live.generate(PROMPTS, 6) != deaf.generate(PROMPTS, 6)


def test_a_bridge_is_steered_by_hooks_and_generates_nothing_here(tmp_path):
    target = tiny("llama")
    wrapped = nnsight.NNsight(bridge(target, tmp_path))
    wrapped.tokenizer = target.tokenizer
    live = live_of(tiny("gemma3", bos=True), target)
    live.target_ = wrapped
    with pytest.raises(ValueError, match="generates outside of nnsight"):
        live.generate(PROMPTS, 2)
    live.gate_ = 0.0
    with pytest.raises(ValueError, match="TransformerBridge does not give here: take gate=None"):
        live.plan(PROMPTS[:1])


# -- the gate ----------------------------------------------------------------------------------------------------------


def next_entropies(model, texts):
    """Entropy of what comes after each text, nats, in plain PyTorch."""
    with torch.no_grad():
        logits = [model._module(**model.tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts]
    return torch.stack([torch.distributions.Categorical(logits=row).entropy() for row in logits])


@pytest.mark.parametrize("follow", [False, True])
def test_a_gate_steers_the_prompts_of_which_the_expert_is_surer(follow):
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    gaps = next_entropies(expert, PROMPTS) - next_entropies(target, PROMPTS)
    gate = float(gaps.double().quantile(0.5))
    how = {"follow": follow, "follow_amount": 20.0}  # so much that following shows in what is written
    live, free = (live_of(expert, target, gate=g, **how) for g in (gate, None))
    heard = (gaps <= gate).tolist()
    assert live.gate_ == gate and 0 < sum(heard) < len(heard)
    plan = live.plan(PROMPTS)
    assert [float(x) != 0 for x in plan.vectors[0].strength] == heard
    assert (
        plan.info["gate"] == {"nats": gate, "steered": sum(heard) / len(heard)}
        and "gate" not in free.plan(PROMPTS).info
    )
    asked = es.MultipleChoice([(p, (" a dog", " the fox jumps"), n % 2) for n, p in enumerate(PROMPTS)])
    scores, found = (asked.score(target, [one]) for one in (free, live))
    torch.testing.assert_close(found[1], torch.where(torch.tensor(heard), scores[1], scores[0]), rtol=1e-4, atol=1e-5)
    silent = live_of(expert, target, gate=float(gaps.min()) - 1, **how)
    said = [one.generate(PROMPTS, 8) for one in (live, free, silent)]
    assert not follow or any(steered != alone for on, steered, alone in zip(heard, *said[1:], strict=True) if not on)
    assert said[0] == [steered if on else alone for on, steered, alone in zip(heard, *said[1:], strict=True)]


def test_controls_steer_the_prompts_that_the_gate_lets_through():
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    gaps = next_entropies(expert, PROMPTS) - next_entropies(target, PROMPTS)
    live = live_of(expert, target, gate=float(gaps.double().quantile(0.5)))
    on = [float(p.vectors[0].strength) != 0 for p in live.for_texts(PROMPTS)]
    arms = live_arms(live, GENERAL, untrained=1, **FAST)
    assert {"another prompt", "mean", "untrained, seed 1"} <= set(arms)
    for name, arm in arms.items():
        assert [float(p.vectors[0].strength) != 0 for p in arm.for_texts(PROMPTS)] == on, name
    receipt = live.receipt(QUESTIONS, GENERAL, untrained=1, **FAST)
    asked = [p for p, _, _ in QUESTIONS.items]
    through = sum(live._setting().heard(asked, asked))
    assert f"the gate let the expert steer {through} of {len(asked)} questions" in str(receipt)


def test_a_gated_receipt_reads_the_entropies_of_each_model_once(monkeypatch):
    live, whole, read = live_of(tiny("gemma3", bos=True), tiny("llama"), gate=0.0), live_expert.in_rows, []

    def counted(model, plans, texts, *rest, **how):
        read.append(len(texts))
        return whole(model, plans, texts, *rest, **how)

    monkeypatch.setattr(live_expert, "in_rows", counted)
    live.receipt(QUESTIONS, GENERAL, untrained=1, **FAST)
    assert read == [len(QUESTIONS)] * 2


def test_a_gate_is_chosen_by_what_it_does_to_validation_items(tmp_path):
    expert, target = tiny("gemma3", bos=True), tiny("llama")
    live = LiveExpert(gate="validation").fit(expert, target, GENERAL, QUESTIONS, **FAST)
    free = LiveExpert(layers=live.layers_, amount=live.amount_).fit(expert, target, GENERAL, **FAST)
    asked = [p for p, _, _ in QUESTIONS.items]
    gaps = next_entropies(expert, asked) - next_entropies(target, asked)
    unsteered, steered = QUESTIONS.score(target, [free])
    means = {
        g: float(torch.where(gaps <= g + 1e-5, steered, unsteered).mean())
        for g in [-math.inf, *gaps.tolist(), math.inf]
    }
    mine = QUESTIONS.score(target, [live])[1].mean()
    assert float(mine) >= float(steered.mean()) - 1e-6 and any(
        float(mine) == pytest.approx(m, abs=1e-5) for m in means.values()
    )
    again = LiveExpert.load(live.save(tmp_path / "live.safetensors"), expert, target)
    assert again.gate_ == live.gate_
    torch.testing.assert_close(QUESTIONS.score(target, [again])[1].mean(), mine)
    with pytest.raises(ValueError, match="needs validation items"):
        LiveExpert(gate="validation").fit(expert, target, GENERAL, **FAST)
    for wrong in ("surer", math.nan, True):
        with pytest.raises(ValueError, match="gate is"):
            LiveExpert(gate=wrong).fit(expert, target, GENERAL, **FAST)


def test_a_gate_that_does_nothing_is_seldom_chosen():
    gen = torch.Generator().manual_seed(0)
    drawn = (torch.randn(3, 150, generator=gen) for _ in range(200))
    chosen = [live_expert._best_gate(gaps, a, b) is not None for gaps, a, b in drawn]
    assert np.mean(chosen) < 0.2


def test_the_best_gate_is_none_where_every_item_gains():
    gaps, zero = torch.linspace(-1, 1, 10), torch.zeros(10)
    assert live_expert._best_gate(gaps, zero, torch.ones(10)) is None
    gate = live_expert._best_gate(gaps, zero, -gaps)  # pays where the expert is surer
    assert gate is not None and -0.3 < gate < 0.3
