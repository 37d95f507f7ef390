"""Plans in TransformerLens: hooks give what traces give, and vectors of its activations become plans."""

from __future__ import annotations

import nnsight
import pytest
import tiny
import torch
from tiny import PROMPTS

import expertsteer_nnsight as es
from expertsteer_nnsight.interop.transformer_lens import plan_of

KINDS = [
    {},
    {"where": "prompt"},
    {"where": "completion"},
    {"where": "completion", "from_step": 1},
    {"op": "clamp"},
    {"op": "add_keep_norm", "skip_special": False},
    {"op": "project_out"},
]
pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags are not valid")


@pytest.fixture(scope="module", params=[("llama", True), ("gpt2", False)], ids=["llama-bos", "gpt2"])
def pair(request, tmp_path_factory):
    """A model, and the bridge of the same weights, which takes texts as the model's tokenizer does."""
    arch, bos = request.param
    model = tiny.build(arch, bos=bos)
    bridge = tiny.bridge(model, tmp_path_factory.mktemp(arch))
    bridge.cfg.default_prepend_bos = bos
    return model, bridge


def plan_with(**settings):
    g = torch.Generator().manual_seed(0)
    return es.SteeringPlan(
        [es.SteeringVector(layer, torch.randn(32, generator=g), 0.8, residual_norm=2.0, **settings) for layer in (1, 2)]
    )


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_hooks_give_the_logits_of_a_trace_of_the_bridge(pair, settings, batch):
    _, bridge = pair
    plan, prompts, wrapped = plan_with(**settings), PROMPTS[:batch], nnsight.NNsight(bridge)
    with torch.no_grad():
        with wrapped.trace(prompts):
            plan.apply(wrapped)
            traced = nnsight.save(wrapped.output)
        hooked = bridge.run_with_hooks(prompts, fwd_hooks=plan.to_transformer_lens(bridge))
        unsteered = bridge(prompts)
    for row, prompt in enumerate(prompts):
        n = bridge.to_tokens(prompt).shape[1]
        torch.testing.assert_close(hooked[row, :n], traced[row, :n], rtol=1e-4, atol=1e-4)
        changed = (hooked[row, :n] - unsteered[row, :n]).abs().amax(-1) > 1e-3
        # no position before the first steered one changes, and the last does unless the completion is for later
        assert bool(changed[-1]) == (settings.get("from_step", 0) == 0)


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_bridges_own_generation_is_steered_like_a_trace(pair, settings, cache, batch):
    model, bridge = pair
    plan, prompts = plan_with(**settings), PROMPTS[:batch]
    with plan.attach(model, any_id=True).generate(prompts, max_new_tokens=6, do_sample=False) as tracer:
        expected = nnsight.save(tracer.result)
    with bridge.hooks(fwd_hooks=plan.to_transformer_lens(bridge)):
        found = bridge.generate(
            prompts if batch > 1 else prompts[0], max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False,
            use_past_kv_cache=cache, return_type="tokens",
        )  # fmt: skip
    assert torch.equal(found[:, -6:], expected[:, -6:])


@pytest.mark.parametrize("where", ["all", "prompt", "completion"])
def test_padded_ids_are_steered_like_single_texts(pair, where):
    _, bridge = pair
    wrapped, plan = nnsight.NNsight(bridge), plan_with(where=where)
    ids = bridge.to_tokens(PROMPTS)  # padded on the right
    with torch.no_grad():
        with wrapped.trace(ids):
            plan.apply(wrapped)
            traced = nnsight.save(wrapped.output)
        hooked = bridge.run_with_hooks(ids, fwd_hooks=plan.to_transformer_lens(bridge))
        for row, prompt in enumerate(PROMPTS):
            single = bridge.run_with_hooks(prompt, fwd_hooks=plan.to_transformer_lens(bridge))[0]
            for found in (traced, hooked):
                torch.testing.assert_close(found[row, : len(single)], single, rtol=1e-4, atol=1e-4)


def test_a_token_that_the_bridge_alone_prepends_is_left_as_it_is(tmp_path):
    bridge = tiny.bridge(tiny.build("gpt2"), tmp_path)  # its tokenizer prepends nothing
    wrapped, plan, ids = nnsight.NNsight(bridge), plan_with(), bridge.to_tokens(PROMPTS[0])
    assert int(ids[0, 0]) == bridge.tokenizer.bos_token_id
    with torch.no_grad():
        with wrapped.trace(PROMPTS[0]):
            plan.apply(wrapped)
            traced = nnsight.save(wrapped.output)
        hooked = bridge.run_with_hooks(PROMPTS[0], fwd_hooks=plan.to_transformer_lens(bridge))
        unsteered = bridge(PROMPTS[0])
        with wrapped.trace(PROMPTS[0], prepend_bos=False):
            plan.apply(wrapped)
            without = nnsight.save(wrapped.output)
    torch.testing.assert_close(hooked, traced)
    torch.testing.assert_close(hooked[0, 0], unsteered[0, 0])
    assert bool(((hooked - unsteered)[0, 1:].abs().amax(-1) > 1e-3).all())
    hooked = bridge.run_with_hooks(PROMPTS[0], prepend_bos=False, fwd_hooks=plan.to_transformer_lens(bridge))
    torch.testing.assert_close(hooked, without)
    assert hooked.shape[1] == ids.shape[1] - 1


def test_steered_and_unsteered_generations_differ(pair):
    _, bridge = pair
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    plain = bridge.generate(PROMPTS[1], **options)
    with bridge.hooks(fwd_hooks=(plan_with() * 4).to_transformer_lens(bridge)):
        assert not torch.equal(bridge.generate(PROMPTS[1], **options), plain)
    assert torch.equal(bridge.generate(PROMPTS[1], **options), plain)  # and nothing stays behind


def test_one_list_of_hooks_serves_several_texts(pair):
    _, bridge = pair
    plan = plan_with(where="completion")
    hooks = plan.to_transformer_lens(nnsight.NNsight(bridge))
    for prompts in (PROMPTS[:1], PROMPTS[1:3], PROMPTS[3:], PROMPTS[:1]):
        again = bridge.run_with_hooks(prompts, fwd_hooks=plan.to_transformer_lens(bridge))
        torch.testing.assert_close(bridge.run_with_hooks(prompts, fwd_hooks=hooks), again)


def test_a_vector_of_a_cache_becomes_a_plan_that_a_trace_takes(pair):
    model, bridge = pair
    states = []
    for texts in (PROMPTS[:2], PROMPTS[2:]):
        found = [bridge.run_with_cache(text)[1]["blocks.1.hook_resid_post"][0, -1] for text in texts]
        states.append(torch.stack(found).mean(0))
    v = (states[0] - states[1]).detach()
    plan = plan_of({"blocks.1.hook_resid_post": v}, bridge, strength=2.0)
    assert plan.layers == (1,) and plan.target.n_layers == 4
    torch.testing.assert_close(plan.vectors[0].direction * plan.vectors[0].length, 2 * v)
    # the same vector, read in traces
    expected = es.collect(model, PROMPTS, layers=[1], progress=False)[1]
    torch.testing.assert_close(v, expected[:2].mean(0) - expected[2:].mean(0), rtol=1e-4, atol=1e-4)

    def add(h, hook):
        return h + 2 * v

    by_hand = bridge.run_with_hooks(PROMPTS[0], fwd_hooks=[("blocks.1.hook_resid_post", add)])
    hooked = bridge.run_with_hooks(PROMPTS[0], fwd_hooks=plan.with_(skip_special=False).to_transformer_lens(bridge))
    torch.testing.assert_close(hooked, by_hand)


def test_names_of_places():
    v = torch.ones(4)
    layers = {
        "blocks.3.hook_resid_post": 3,
        "blocks.3.hook_out": 3,
        "blocks.3.hook_resid_pre": 2,
        "blocks.3.hook_in": 2,
    }
    for name, layer in layers.items():
        assert plan_of({name: v}).layers == (layer,)
    for name in ("blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out", "hook_embed"):
        with pytest.raises(ValueError, match="is not the residual stream after a block"):
            plan_of({name: v})
    one = plan_of({"blocks.3.hook_out": 5 * v}, strength=0.2, residual_norms={3: 7.0}, where="completion").vectors[0]
    assert (one.strength, one.residual_norm, one.where) == (0.2, 7.0, "completion")


def test_what_does_not_fit_is_refused(pair):
    model, bridge = pair
    with pytest.raises(TypeError, match="has no hook_dict: pass a TransformerBridge"):
        plan_with().to_transformer_lens(model)
    wide = es.SteeringPlan([es.SteeringVector(1, torch.ones(16))])
    with pytest.raises(ValueError, match="width 16, but the model's residual stream has 32"):
        wide.to_transformer_lens(bridge)
    rows = es.SteeringPlan([es.SteeringVector(1, torch.ones(32), torch.tensor([1.0, 2.0, 3.0]))])
    with pytest.raises(ValueError, match="for 3 rows, but the batch has 1"):
        bridge.run_with_hooks(PROMPTS[0], fwd_hooks=rows.to_transformer_lens(bridge))


@pytest.mark.real
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "gemma-3-270m"])
def test_real_models_have_the_same_logits_and_tokens_both_ways(name):
    from expertsteer_nnsight.models.packaged import model_path
    from recipes.steer_on_ndif import load

    folder = str(model_path(name))
    model = load(folder, here=True)
    bridge = tiny.boot(folder)
    bridge.cfg.default_prepend_bos = name.startswith("gemma")  # as the model's own tokenizer does
    states = es.collect(model, PROMPTS, layers=[9, 12], progress=False)
    g = torch.Generator().manual_seed(0)
    directions = {k: torch.randn(states.model.hidden_size, generator=g) for k in (9, 12)}
    plan = es.SteeringPlan([es.SteeringVector(k, v, 0.3, states.norm(k)) for k, v in directions.items()])
    wrapped, steered = nnsight.NNsight(bridge), plan.attach(model)
    with torch.no_grad():
        with wrapped.trace(PROMPTS[1]):
            plan.apply(wrapped, any_id=True)
            traced = nnsight.save(wrapped.output)
        with steered.trace(PROMPTS[1]):
            expected = nnsight.save(model.output.logits)
        hooked = bridge.run_with_hooks(PROMPTS[1], fwd_hooks=plan.to_transformer_lens(bridge, any_id=True))
        plain = bridge(PROMPTS[1])
    torch.testing.assert_close(hooked, traced, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(hooked, expected, rtol=1e-2, atol=5e-2)  # the bridge computes attention by itself
    assert (hooked - plain).abs().max() > 1
    with steered.generate(PROMPTS[1], max_new_tokens=8, do_sample=False) as tracer:
        ids = nnsight.save(tracer.result)
    with bridge.hooks(fwd_hooks=plan.to_transformer_lens(bridge, any_id=True)):
        found = bridge.generate(PROMPTS[1], max_new_tokens=8, do_sample=False, verbose=False, return_type="tokens")
    assert found[0, -8:].tolist() == ids[0, -8:].tolist()
