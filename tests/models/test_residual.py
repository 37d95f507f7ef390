"""`Residual` finds, reads and writes what a plain PyTorch hook on the decoder layer sees."""

from __future__ import annotations

import nnsight
import pytest
import torch
from tiny import ARCHITECTURES, PROMPTS, build, hooks, tiny
from tiny import bridge as bridge_of
from torch import nn

from expertsteer_nnsight.models.residual import Residual, hidden, layers_path
from expertsteer_nnsight.states.collecting import collect
from expertsteer_nnsight.steering.plan import SteeringPlan
from expertsteer_nnsight.steering.vectors import SteeringVector

PATHS = dict.fromkeys(ARCHITECTURES, "model.layers") | {
    "gpt2": "transformer.h",
    "neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


def blocks_of(model, path):
    return model._module.get_submodule(path)


def plain_logits(model, ids):
    with torch.no_grad():
        return model._module(ids).logits


def random_like(h, seed=0):
    return torch.randn(h.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_finds_the_layers(arch):
    model = tiny(arch)
    residual = Residual(model)
    assert residual.path == PATHS[arch]
    assert residual.layers._module is blocks_of(model, PATHS[arch])
    assert residual.n_layers == 4
    assert residual.hidden_size == 32
    wrapped = Residual(nnsight.NNsight(build(arch)._module))  # without nnsight's own knowledge of transformers
    assert (wrapped.path, wrapped.n_layers, wrapped.hidden_size) == (PATHS[arch], 4, 32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_read_equals_a_hook(arch):
    model = tiny(arch)
    residual = Residual(model)
    ids = model.tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    seen = {}
    with hooks(blocks_of(model, PATHS[arch]), {i: lambda h, _, i=i: seen.setdefault(i, h.clone()) for i in range(4)}):
        plain_logits(model, ids)
    with torch.no_grad(), model.trace({"input_ids": ids}):
        found = nnsight.save([])
        for layer in range(4):
            found.append(residual.read(layer))
    assert len(found) == 4
    for layer in range(4):
        assert found[layer].shape == (1, ids.shape[1], 32)
        torch.testing.assert_close(found[layer], seen[layer], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_write_equals_replacing_the_output_in_a_hook(arch):
    model = tiny(arch)
    residual = Residual(model)
    ids = model.tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with hooks(blocks_of(model, PATHS[arch]), {2: lambda h, _: random_like(h)}):
        expected = plain_logits(model, ids)
    with torch.no_grad(), model.trace({"input_ids": ids}):
        residual.write(2, random_like(residual.read(2)))
        logits = nnsight.save(model.output.logits)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (logits - plain_logits(model, ids)).abs().max() > 0.1


# layers that return more than the hidden state


class TupleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, h, count):
        return h + torch.tanh(self.mix(h)), count + 1


class TupleModel(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(depth))

    def forward(self, h):
        count = torch.zeros(1)
        for block in self.blocks:
            h, count = block(h, count)
        return h, count


def test_layers_that_return_tuples_keep_their_extra():
    torch.manual_seed(0)
    module = TupleModel().eval()
    model = nnsight.NNsight(module)
    residual = Residual(model)
    assert (residual.path, residual.n_layers, residual.hidden_size) == ("blocks", 3, None)
    x, new = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    seen = {}
    with torch.no_grad(), hooks(module.blocks, {1: lambda h, _: seen.setdefault(1, h)}):
        module(x)
    with torch.no_grad(), hooks(module.blocks, {1: lambda h, _: new}):
        expected, count = module(x)
    with torch.no_grad(), model.trace(x):
        before = nnsight.save(residual.read(1))
        residual.write(1, new)
        layer_output = nnsight.save(residual.layers[1].output)
        output = nnsight.save(model.output)
    assert torch.equal(before, seen[1])
    assert isinstance(layer_output, tuple) and torch.equal(layer_output[0], new) and layer_output[1] == 2
    assert torch.equal(output[0], expected)
    assert output[1] == count == 3


def test_a_plan_steers_layers_that_return_tuples():
    torch.manual_seed(0)
    module = TupleModel().eval()
    model = nnsight.NNsight(module)
    direction, x = torch.randn(8), torch.randn(2, 5, 8)
    plan = SteeringPlan((SteeringVector(1, direction, strength=0.5, residual_norm=2.0, skip_special=False),))
    with torch.no_grad(), hooks(module.blocks, {1: lambda h, _: h + direction / direction.norm()}):
        expected, _ = module(x)
    with torch.no_grad(), model.trace(x):
        plan.apply(model)
        output = nnsight.save(model.output)
    torch.testing.assert_close(output[0], expected)
    assert output[1] == 3


def test_what_is_no_residual_stream():
    h = torch.zeros(1, 2, 3)
    assert hidden(h) is h and hidden((h, None)) is h and hidden([h]) is h
    for wrong, shape in ((h[0], r"\(2, 3\)"), ("text", "str"), ((h[0], h), r"\(2, 3\)")):
        with pytest.raises(TypeError, match=rf"should put out \[row, position, hidden\], but this one gave {shape}"):
            hidden(wrong)


# TransformerLens


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    """A tiny Llama as a TransformersModel and as an nnsight-wrapped TransformerBridge of the same weights."""
    model = build("llama", bos=True)
    lens = bridge_of(model, tmp_path_factory.mktemp("llama"))
    return model, nnsight.NNsight(lens), lens


def test_bridge_reads_what_its_own_cache_holds(bridge):
    model, wrapped, lens = bridge
    residual = Residual(wrapped)
    assert (residual.path, residual.n_layers, residual.hidden_size) == ("blocks", 4, 32)
    ids = model.tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        _, cache = lens.run_with_cache(ids)
    with torch.no_grad(), wrapped.trace(ids):
        found = nnsight.save([])
        for layer in range(4):
            found.append(residual.read(layer))
    with torch.no_grad(), model.trace({"input_ids": ids}):
        other = nnsight.save([])
        for layer in range(4):
            other.append(Residual(model).read(layer))
    for layer in range(4):
        torch.testing.assert_close(found[layer], cache[f"blocks.{layer}.hook_resid_post"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[layer], other[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["add", "project_out"])
@pytest.mark.parametrize("where", ["all", "prompt", "completion"])
@pytest.mark.parametrize("batch", [1, 4])
def test_bridge_is_steered_like_the_transformers_model(bridge, op, where, batch):
    model, wrapped, _ = bridge
    prompts = PROMPTS[:batch]
    g = torch.Generator().manual_seed(0)
    plan = SteeringPlan(
        tuple(
            SteeringVector(layer, torch.randn(32, generator=g), residual_norm=2.0, strength=0.8, op=op, where=where)
            for layer in (1, 2)
        )
    )
    logits = {}
    for name, steer in (("plain", False), ("steered", True)):
        with torch.no_grad(), model.trace(prompts):
            if steer:
                plan.apply(model, any_id=True)
            ours = nnsight.save(model.output.logits)
        with torch.no_grad(), wrapped.trace(prompts):
            if steer:
                plan.apply(wrapped, any_id=True)
            theirs = nnsight.save(wrapped.output)
        logits[name] = ours, theirs
    for row, prompt in enumerate(prompts):
        n = len(model.tokenizer(prompt)["input_ids"])
        ours, theirs = (x[row] for x in logits["steered"])
        # TransformersModel pads on the left, the bridge on the right
        torch.testing.assert_close(theirs[:n], ours[-n:], rtol=1e-3, atol=1e-3)
        assert (ours[-n:] - logits["plain"][0][row, -n:]).abs().max() > 1e-2


@pytest.mark.parametrize("position", ["last", "mean", 0])
def test_bridge_gives_the_same_states(bridge, position):
    model, wrapped, _ = bridge
    found, expected = (collect(m, PROMPTS, position=position, batch_size=4, progress=False) for m in (wrapped, model))
    for layer in range(4):
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-4)
        assert found.norm(layer) == pytest.approx(expected.norm(layer), rel=1e-4)


# models that cannot be placed


class Towers(nn.Module):
    """Stacks of equal blocks under the given names."""

    def __init__(self, **depths):
        super().__init__()
        for name, depth in depths.items():
            setattr(self, name, nn.ModuleList(TupleBlock() for _ in range(depth)))

    def forward(self, h):
        count = torch.zeros(1)
        for _, stack in self.named_children():
            for block in stack:
                h, count = block(h, count)
        return h


def test_two_equally_long_stacks_need_a_path():
    torch.manual_seed(0)
    model = nnsight.NNsight(Towers(left=2, right=2).eval())
    with pytest.raises(
        ValueError, match=r"Looked in Towers .* found 2 .*left .2 x TupleBlock., right .2 x TupleBlock."
    ) as e:
        Residual(model)
    assert 'Residual(model, path="model.layers")' in str(e.value)
    residual = Residual(model, path="right")
    assert (residual.path, residual.n_layers) == ("right", 2)
    x, seen = torch.randn(1, 3, 8), {}
    with torch.no_grad(), hooks(model._module.right, {0: lambda h, _: seen.setdefault(0, h)}):
        model._module(x)
    with torch.no_grad(), model.trace(x):
        h = nnsight.save(residual.read(0))
    assert torch.equal(h, seen[0])
    assert Residual(model).path == "right"  # told once, it holds for collect, plans and all else


def test_a_model_without_stacks():
    model = nnsight.NNsight(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"and found 0 \(seen: no nn.ModuleList at all\). Pass the path yourself"):
        Residual(model)
    with pytest.raises(ValueError, match=r"Towers has no 'layers' on the path 'left.layers'"):
        Residual(nnsight.NNsight(Towers(left=2)), path="left.layers")
    with pytest.raises(ValueError, match=r"'left.0' of Towers is a TupleBlock, not a list of decoder layers"):
        Residual(nnsight.NNsight(Towers(left=2)), path="left.0")


def test_other_towers_and_lists_inside_blocks_are_not_taken():
    assert layers_path(Towers(vision_tower=2, text=2)) == "text"
    assert layers_path(Towers(left=2, right=3), depth=3) == "right"
    model = Towers(text=3)
    for block in model.text:
        block.experts = nn.ModuleList(TupleBlock() for _ in range(3))
    assert layers_path(model, depth=3) == "text"
    model.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))  # no blocks: they hold nothing
    assert layers_path(model, depth=3) == "text"
    hybrid = Towers()
    hybrid.layers = nn.ModuleList([TupleBlock(), nn.Sequential(nn.Linear(8, 8)), TupleBlock()])
    assert layers_path(hybrid, depth=3) == "layers"
    model.mixed = nn.ModuleList([TupleBlock(), nn.Sequential(nn.Linear(8, 8)), TupleBlock()])
    assert layers_path(model, depth=3) == "text"


def test_an_unwrapped_model_is_refused():
    with pytest.raises(TypeError, match="LlamaForCausalLM: wrap the model first"):
        Residual(tiny()._module)


def test_index():
    residual = Residual(tiny())
    assert [residual.index(i) for i in (0, 3, -1, -4)] == [0, 3, 3, 0]
    for wrong in (4, -5, 100):
        with pytest.raises(IndexError, match=rf"Layer {wrong} was asked for, but the model has 4 layers \(0 to 3\)"):
            residual.index(wrong)
