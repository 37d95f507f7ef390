"""A cache serves the model that it was made of, however it is changed, moved or loaded; and no other."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import tiny
import torch
import transformers as tr
from nnsight.modeling.transformers import TransformersModel
from torch import nn

import expertsteer_nnsight as es
from expertsteer_nnsight.states import fingerprint as module
from expertsteer_nnsight.states.fingerprint import files_of, fingerprint, tokenizer_fingerprint, untold

TEXTS = tiny.PROMPTS
LAST = 3


def states(model, cache=None):
    return es.collect(model, TEXTS, [LAST], cache=cache, progress=False)[LAST]


def saved(folder, seed=0, name="llama"):
    """A folder with a tiny model."""
    made = tiny.build(name, seed=seed)
    made._module.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def loaded(folder, **how):
    return TransformersModel(str(folder), task="text-generation", **how)


# -- what makes another model of it ------------------------------------------------------------------------------------


def _weight(change):
    def changed(model):
        with torch.no_grad():
            change(model._module.model.layers[1])

    return changed


def _submodule(model):
    model._module.model.layers[1].mlp.act_fn = nn.ReLU()


def _attribute(model):
    model._module.model.layers[2].self_attn.scaling *= 2


def _buffer(model):
    model._module.model.rotary_emb.inv_freq.mul_(1.5)


def _float64(model):
    model._module.double()


def _config(model):
    model._module.config.rms_norm_eps = 0.5


CHANGES = {
    "a head is ablated": _weight(lambda layer: layer.self_attn.o_proj.weight[:, 24:].zero_()),
    "through .data": _weight(lambda layer: layer.self_attn.o_proj.weight.data[:, 24:].zero_()),
    "half of an MLP is zeroed": _weight(lambda layer: layer.mlp.down_proj.weight[:, 32:].zero_()),
    "one weight": _weight(lambda layer: layer.mlp.up_proj.weight[17, 5].add_(1e-3)),
    "two rows are exchanged": _weight(
        lambda layer: layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[[1, 0, *range(2, 64)]].clone())
    ),
    "two layers are exchanged": lambda model: model._module.model.layers.insert(0, model._module.model.layers.pop(1)),
    "a norm": _weight(lambda layer: layer.input_layernorm.weight.mul_(1.01)),
    "a buffer": _buffer,
    "the dtype": _float64,
    "another activation function": _submodule,
    "an attention scale": _attribute,
    "the configuration": _config,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused_its_cache_and_served_it_again_when_it_is_as_it_was(change, tmp_path):
    model = tiny.build("llama")
    before = copy.deepcopy(model._module.state_dict())
    first = states(model, tmp_path / "c")
    other = tiny.build("llama")
    CHANGES[change](other)
    assert not torch.equal(states(other).double(), first.double()) or change == "the configuration"
    with pytest.raises(ValueError, match="made with another model"):
        states(other, tmp_path / "c")
    model._module.load_state_dict(before)
    torch.testing.assert_close(states(model, tmp_path / "c"), first)


HOOKS = {
    "a forward hook": lambda m: m.model.layers[1].register_forward_hook(lambda *_: None),
    "a hook before a forward": lambda m: m.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None),
    "a hook of all modules": lambda m: nn.modules.module.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooked_model_has_no_cache_until_the_hook_is_gone(hook, tmp_path):
    model = tiny.build("llama")
    states(model, tmp_path / "c")
    handle = HOOKS[hook](model._module)
    try:
        with pytest.raises(ValueError, match=r"No cache can tell this model from others, because .*hook"):
            states(model, tmp_path / "c")
        assert states(model).shape == (len(TEXTS), 32)
    finally:
        handle.remove()
    states(model, tmp_path / "c")


def test_a_forward_in_place_of_a_modules_own_is_told(tmp_path):
    raw = tr.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"](320)).eval()
    own = raw.model.layers[1].mlp
    own.forward = lambda x: 2 * type(own).forward(own, x)
    model = TransformersModel(raw, tokenizer=tiny.tokenizer(), task="text-generation")
    with pytest.raises(ValueError, match=r"its module model\.layers\.1\.mlp has another forward than its class"):
        states(model, tmp_path / "c")
    model = tiny.build("llama")
    model._module.model.layers[2].forward = lambda x, **_: x
    assert untold(model) == "its module model.layers.2 has another forward than its class"


def test_an_edited_model_has_no_cache(tmp_path):
    model = tiny.build("llama")
    plan = es.SteeringPlan([es.SteeringVector(1, torch.ones(32), 0.1)])
    with pytest.raises(ValueError, match="because it has lasting edits"):
        states(plan.attach(model), tmp_path / "c")


def test_an_adapter_that_is_switched_scaled_or_left_out_is_another_model(tmp_path):
    import peft

    made = tiny.build("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(made._module), config, adapter_name="one").eval()
    adapted.add_adapter("two", config)
    model = TransformersModel(adapted, tokenizer=made.tokenizer, task="text-generation")
    first = states(model, tmp_path / "c")

    def refused():
        with pytest.raises(ValueError, match="made with another model"):
            states(model, tmp_path / "c")

    adapted.set_adapter("two")
    assert not torch.allclose(states(model), first)
    refused()
    adapted.set_adapter("one")
    torch.testing.assert_close(states(model, tmp_path / "c"), first)
    with adapted.disable_adapter():
        refused()
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["one"] *= 2
    refused()
    layer.scaling["one"] /= 2
    adapted.merge_adapter()
    refused()
    adapted.unmerge_adapter()


# -- what leaves it the same -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_neither_running_nor_moving_nor_loading_makes_another_model(name, tmp_path):
    model = tiny.build(name)
    mine = fingerprint(model)
    states(model)
    with model.trace("a dog", output_hidden_states=True):
        model.output.save()
    folder = saved(tmp_path / "one", name=name)
    shutil.copytree(folder, tmp_path / "elsewhere")
    every = [model, loaded(folder), loaded(folder, dispatch=True), loaded(tmp_path / "elsewhere")]
    every.append(loaded(folder, attn_implementation="eager"))
    every.append(TransformersModel(copy.deepcopy(model._module), tokenizer=model.tokenizer, task="text-generation"))
    assert {fingerprint(one) for one in every} == {mine} and {untold(one) for one in every} == {None}
    assert fingerprint(tiny.build(name, seed=1)) != mine


def test_an_unloaded_model_is_known_by_its_files_and_stays_unloaded(tmp_path):
    folder, cache = saved(tmp_path / "m"), tmp_path / "c"
    first = states(loaded(folder), cache)
    again = loaded(folder)
    torch.testing.assert_close(states(again, cache), first)
    assert not again.dispatched  # nothing was read, and nothing loaded
    torch.testing.assert_close(states(loaded(folder, dispatch=True), cache), first)
    shutil.move(folder, tmp_path / "moved")  # known by its weights, and from then on by its files
    for dispatched in (True, False):
        again = loaded(tmp_path / "moved")
        torch.testing.assert_close(states(again, cache), first)
        assert again.dispatched == dispatched
    saved(tmp_path / "moved", seed=5)
    with pytest.raises(ValueError, match="made with another model"):
        states(loaded(tmp_path / "moved"), cache)
    with pytest.raises(ValueError, match="made with another model"):
        states(loaded(saved(tmp_path / "m", seed=5)), cache)
    with pytest.raises(ValueError, match="made with another model"):
        states(loaded(tmp_path / "moved", dtype=torch.float64), cache)


def test_a_fit_of_models_that_are_not_loaded_reads_nothing_twice_and_loads_nothing_the_second_time(tmp_path):
    folders = saved(tmp_path / "expert"), saved(tmp_path / "target", seed=1)
    pairs = [(f"{i} is so good", f"{i} is so bad") for i in range(9)]
    anchors, steer = [f"{text} {i}" for text in TEXTS for i in range(8)], es.ExpertSteer(layers=[(1, 2)])
    plans = []
    for first in (True, False):
        models = [loaded(folder) for folder in folders]
        plans.append(steer.fit(*models, pairs, anchors, cache=tmp_path / "c", progress=False))
        assert [model.dispatched for model in models] == [first, first]
    assert torch.equal(plans[0].vectors[0].direction, plans[1].vectors[0].direction)


def test_files_in_a_folder_of_the_model_count(tmp_path):
    folder = saved(tmp_path / "m")
    before = files_of(loaded(folder))
    (folder / "inner").mkdir()
    (folder / "inner" / "model.safetensors").write_bytes(b"1")
    assert files_of(loaded(folder)) not in (None, before)


def test_files_that_were_touched_in_the_same_size_are_another_state(tmp_path):
    folder = saved(tmp_path / "m")
    model = loaded(folder)
    before = files_of(model)
    assert before == files_of(loaded(folder)) and before is not None
    assert files_of(loaded(folder, dtype=torch.float64)) != before
    saved(folder, seed=5)
    assert files_of(model) not in (None, before)
    (folder / "adapter_config.json").write_text("{}")
    assert files_of(model) is None  # the model that it adapts lies elsewhere
    made = tiny.build("llama")
    in_memory = TransformersModel(copy.deepcopy(made._module), tokenizer=made.tokenizer, task="text-generation")
    assert files_of(made) is None and files_of(in_memory) is None


@pytest.mark.parametrize("lazy", [False, True])
def test_a_cache_whose_model_was_changed_after_it_was_loaded_is_not_known_by_its_files(lazy, tmp_path):
    folder = saved(tmp_path / "m")
    model = loaded(folder, dispatch=not lazy)
    if lazy:
        states(model, tmp_path / "before")
    with torch.no_grad():
        model._module.model.layers[1].mlp.down_proj.weight.zero_()
    states(model, tmp_path / "c")
    with pytest.raises(ValueError, match="made with another model"):
        states(loaded(folder), tmp_path / "c")


def test_a_sample_of_a_large_model_crosses_every_row_and_column(monkeypatch):
    monkeypatch.setattr(module, "WHOLE", 0)
    weight = torch.randn(600, 704, generator=torch.Generator().manual_seed(0))
    own = nn.Linear(1, 1)

    def digest(t):
        return b"".join(module._digested(t, True))

    before = digest(weight)
    assert digest(weight.clone()) == digest(weight.double().float()) == before
    for row in range(0, 600, 37):
        changed = weight.clone()
        changed[row : row + 3] = 0  # 1,056 words: longer than a step
        assert digest(changed) != before
    for column in range(0, 704, 29):
        changed = weight.clone()
        changed[:, column] = 0
        assert digest(changed) != before
    assert digest(own.weight.detach()) != digest(own.weight.detach() + 1)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64, torch.float64]
)
def test_any_tensor_has_a_digest_of_its_values(dtype):
    values = (torch.arange(3 * 701).reshape(3, 701) % 2).to(dtype)

    def digest(t):
        return b"".join(module._digested(t, False))

    assert digest(values) == digest(values.T.contiguous().T) == digest(torch.cat([values, values])[3:])
    for i in (0, 700, 1402, 2102):
        changed = values.clone()
        changed.view(-1)[i] = 1 - int(values.view(-1)[i].real)
        assert digest(changed) != digest(values)
    assert digest(values[:0]) == digest(values[:0])


def test_a_tokenizer_is_known_by_what_it_does():
    one, same, other = tiny.tokenizer(), tiny.tokenizer(), tiny.tokenizer(bos=True)
    same("padded", padding="max_length", max_length=9, truncation=True)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(same) != tokenizer_fingerprint(other)
    same.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(same)


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"version": 2}', "{", "[" * 5000, "9" * 5000, '{"version": 2, "model": 3}', "\ud800"]
)
def test_a_damaged_manifest_is_one_sentence(content, tmp_path):
    cache = tmp_path / "c"
    cache.mkdir()
    (cache / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*: delete the folder, or pass another one"):
        states(tiny.tiny("llama"), cache)


def test_a_cache_of_another_version_is_refused(tmp_path):
    model = tiny.build("llama")
    states(model, tmp_path / "c")
    file = tmp_path / "c" / "manifest.json"
    known = json.loads(file.read_text())
    del known["version"]
    file.write_text(json.dumps(known))
    with pytest.raises(ValueError, match="made by another version of expertsteer_nnsight: delete it"):
        states(model, tmp_path / "c")
