"""Vectors in files of other tools: what is read back is what was written, and it does the same to a model."""

from __future__ import annotations

import sys
import types

import nnsight
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PROMPTS, hooks

import expertsteer_nnsight as es
from expertsteer_nnsight.interop.formats import (
    EXPORTS,
    added,
    from_gguf,
    from_safetensors,
    from_steering_vectors,
    plan_from,
    to_gguf,
    to_lm_eval,
    to_safetensors,
)
from expertsteer_nnsight.models.identity import ModelIdentity
from expertsteer_nnsight.models.residual import Residual


def vector(layer, seed=0, **fields):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return es.SteeringVector(layer, direction, **{"strength": 0.5, "residual_norm": 3.0, **fields})


def plan(*layers):
    return es.SteeringPlan([vector(layer, layer) for layer in layers], ModelIdentity.of(tiny.tiny("llama")))


def logits(model, steering=None):
    with torch.no_grad(), model.trace(PROMPTS[0]):
        if steering is not None:
            steering.apply(model, any_id=True)
        found = nnsight.save(model.output.logits)
    return found


@pytest.mark.parametrize("name", ["gguf", "safetensors"])
def test_a_plan_comes_back_and_steers_the_same(name, tmp_path):
    model, mine = tiny.tiny("llama"), plan(1, 3)
    path = EXPORTS[name](mine, tmp_path / "folder" / f"v.{name}", model)
    back = {"gguf": from_gguf, "safetensors": from_safetensors}[name](path, model)
    assert back.layers == (1, 3) and back.target.n_layers == 4
    torch.testing.assert_close(logits(model, back), logits(model, mine))
    assert (logits(model, mine) - logits(model)).abs().max() > 1e-2
    assert list((tmp_path / "folder").iterdir()) == [path]  # nothing half-written stays


@given(
    sizes=st.dictionaries(st.integers(1, 40), st.floats(1e-3, 1e4), min_size=1, max_size=6), factor=st.floats(0.1, 10)
)
@settings(max_examples=25, deadline=None)
def test_every_vector_keeps_its_layer_and_length(sizes, factor, tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    vectors = {layer: size * torch.randn(8, generator=g) for layer, size in sizes.items()}
    made = plan_from(vectors)
    for layer, v in added(made).items():
        torch.testing.assert_close(v, vectors[layer], rtol=1e-5, atol=0)
    path = to_gguf(made, tmp_path_factory.mktemp("gguf") / "v.gguf")
    for layer, v in added(from_gguf(path, strength=factor)).items():
        torch.testing.assert_close(v, factor * vectors[layer], rtol=1e-5, atol=0)


def test_a_control_vector_has_the_fields_that_llama_cpp_asks_for(tmp_path):
    import gguf

    reader = gguf.GGUFReader(str(to_gguf(plan(1, 3), tmp_path / "v.gguf")))
    fields = {name: reader.get_field(name).contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert fields["general.architecture"] == "controlvector"
    assert (fields["controlvector.model_hint"], fields["controlvector.layer_count"]) == ("llama", 4)
    assert [(t.name, t.data.shape, str(t.data.dtype)) for t in reader.tensors] == [
        ("direction.1", (32,), "float32"),
        ("direction.3", (32,), "float32"),
    ]
    torch.testing.assert_close(torch.tensor(reader.tensors[0].data), added(plan(1, 3))[1])


def test_vectors_of_one_layer_are_added_up():
    both = es.SteeringPlan([vector(1, 1), vector(1, 2, residual_norm=None)])
    expected = vector(1, 1).direction * 1.5 + vector(1, 2).direction * 0.5
    torch.testing.assert_close(added(both)[1], expected)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"op": "project_out"}, "op='project_out'"),
        ({"where": "completion"}, "where='completion'"),
        ({"strength": torch.ones(2)}, "for 2 rows"),
    ],
)
def test_what_a_format_cannot_say_is_refused(fields, told, tmp_path):
    more = es.SteeringPlan([vector(1, **fields)])
    with pytest.raises(ValueError, match=f"layer 1 has .*{told}"):
        to_gguf(more, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_what_is_no_control_vector_is_refused(tmp_path):
    import gguf

    with pytest.raises(ValueError, match="steers layer 0, and llama"):
        to_gguf(es.SteeringPlan([vector(0)]), tmp_path / "v.gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds no control vector, but 'llama'"):
        from_gguf(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="width 32, but the model's residual stream has 64"):
        from_gguf(to_gguf(plan(1), tmp_path / "v.gguf"), wide())


def wide():
    from nnsight.modeling.transformers import TransformersModel
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**{**tiny.SMALL, "hidden_size": 64}, vocab_size=len(tiny.tokenizer()))
    return TransformersModel(
        AutoModelForCausalLM.from_config(config), tokenizer=tiny.tokenizer(), task="text-generation"
    )


def test_a_missing_library_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        to_gguf(plan(1), tmp_path / "v.gguf")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "neox", "opt", "qwen2"])
def test_lm_evals_steered_model_does_what_the_plan_does(arch, tmp_path):
    from lm_eval.models.hf_steered import SteeredModel

    model = tiny.build(arch)
    model._module.save_pretrained(tmp_path / "m")
    model.tokenizer.save_pretrained(tmp_path / "m")
    mine = es.SteeringPlan([vector(1, 1), vector(2, 2, op="clamp"), vector(1, 3)])
    path = to_lm_eval(mine, tmp_path / "v.pt", model)
    theirs = SteeredModel(str(tmp_path / "m"), steer_path=str(path), device="cpu", dtype="float32")
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = theirs.forward(ids).logits
    torch.testing.assert_close(found, logits(model, mine), rtol=1e-4, atol=1e-4)
    assert (found - logits(model)).abs().max() > 1e-2


def test_what_lm_eval_cannot_do_is_refused(tmp_path):
    model = tiny.tiny("llama")
    with pytest.raises(ValueError, match=r"by the ending \.pt"):
        to_lm_eval(plan(1), tmp_path / "v.bin", model)
    with pytest.raises(ValueError, match="one thing at a layer"):
        to_lm_eval(es.SteeringPlan([vector(1), vector(1, 1, op="clamp")]), tmp_path / "v.pt", model)
    with pytest.raises(ValueError, match="op='project_out'"):
        to_lm_eval(es.SteeringPlan([vector(1, op="project_out")]), tmp_path / "v.pt", model)


def test_safetensors_of_others(tmp_path):
    from safetensors.torch import save_file

    save_file({"14": torch.ones(4), "model.layers.2": 2 * torch.ones(4)}, tmp_path / "v.safetensors")
    back = from_safetensors(tmp_path / "v.safetensors", where="completion")
    assert back.layers == (2, 14) and float(back.vectors[0].length) == pytest.approx(4.0)
    assert {v.where for v in back.vectors} == {"completion"}
    save_file({"a": torch.ones(4)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"'a' in .* does not tell its layer"):
        from_safetensors(tmp_path / "w.safetensors")
    assert to_safetensors(back.with_(where="all"), tmp_path / "x.safetensors").exists()


def test_steering_vectors_objects_and_files(tmp_path, monkeypatch):
    layers = {1: torch.randn(32), 2: torch.randn(32)}
    theirs = types.SimpleNamespace(layer_activations=layers, layer_type="decoder_block")
    torch.save(layers, tmp_path / "v.pt")
    model = tiny.tiny("llama")
    residual = Residual(model)
    blocks = [residual.layers[i]._module for i in range(4)]
    for source in (theirs, layers, tmp_path / "v.pt"):
        back = from_steering_vectors(source, model, strength=2.0)
        with hooks(blocks, {layer: lambda h, _, v=v: h + 2 * v for layer, v in layers.items()}):
            by_hand = logits(model)
        torch.testing.assert_close(logits(model, back), by_hand)
    theirs.layer_type = "self_attn"
    with pytest.raises(ValueError, match="read at 'self_attn'"):
        from_steering_vectors(theirs)


class Evil:
    """What a file could hold: unpickling it runs something."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_a_file_runs_nothing(tmp_path, monkeypatch):
    torch.save(Evil(), tmp_path / "v.pt")
    monkeypatch.setitem(sys.modules, "steering_vectors", None)
    with pytest.raises(ImportError, match="pip install steering-vectors"):
        from_steering_vectors(tmp_path / "v.pt")
    monkeypatch.setitem(sys.modules, "steering_vectors", types.SimpleNamespace(SteeringVector=dict))
    with pytest.raises(Exception, match="Weights only load failed"):
        from_steering_vectors(tmp_path / "v.pt")


def test_vectors_of_another_shape_or_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layer 3 has shape \(2, 8\), and one of \[hidden\]"):
        plan_from({3: torch.ones(2, 8)})
    with pytest.raises(FileNotFoundError, match="No file at"):
        from_steering_vectors(tmp_path / "nowhere.pt")


def test_quantised_control_vectors_are_read(tmp_path):
    import gguf

    v = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for kind, rtol in ((gguf.GGMLQuantizationType.Q8_0, 0.02), (gguf.GGMLQuantizationType.F16, 1e-3)):
        path = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(str(path), "controlvector")
        writer.add_tensor("direction.2", gguf.quants.quantize(v.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        torch.testing.assert_close(added(from_gguf(path))[2], v, rtol=rtol, atol=0.02)
