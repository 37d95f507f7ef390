"""Steering through nnsight does what a plain PyTorch forward hook does, for every op, place and architecture."""

from __future__ import annotations

from dataclasses import replace

import nnsight
import pytest
import torch
from tiny import ARCHITECTURES, PROMPTS, hooks, tiny

from expertsteer_nnsight.models.prompts import Prompts
from expertsteer_nnsight.models.residual import Residual
from expertsteer_nnsight.steering.plan import SteeringPlan
from expertsteer_nnsight.steering.vectors import OPS, SteeringVector

LAYERS = (1, 2)


def vectors(rows=None, **kwargs):
    g = torch.Generator().manual_seed(0)
    shape = (32,) if rows is None else (rows, 32)
    more = {"predictor": torch.randn(33, 32, generator=g) / 6} if kwargs.get("op") == "innovation" else {}
    return tuple(
        SteeringVector(layer, torch.randn(shape, generator=g), residual_norm=3.0, **{"strength": 0.7, **more, **kwargs})
        for layer in LAYERS
    )


def reference_edit(vector, h, mask):
    """The formulas of SteeringVector's docstring, written out once more."""
    v, s = vector.direction.double(), vector.strength * (3.0 if "add" in vector.op or vector.op == "clamp" else 1.0)
    x = h.double()
    v = v[:, None] if v.ndim == 2 else v
    along = (x * v).sum(-1, keepdim=True) * v
    known = torch.eye(32, 33).T.double() if vector.predictor is None else vector.predictor.double()
    new = {
        "add": x + s * v,
        "add_keep_norm": (x + s * v) / (x + s * v).norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True),
        "project_out": x - s * along,
        "clamp": x - along + s * v,
        "blend": (1 - s) * x + s * v,
        "innovation": x + s * (v - torch.cat([x, torch.ones_like(x[..., :1])], -1) @ known),
    }[vector.op]
    return torch.where(mask[..., None], new, x).to(h.dtype)


def place(where, attention, call):
    """Positions that a hook must edit in forward number `call`, from the prompt's mask alone."""
    real = attention.bool()
    last = torch.zeros_like(real)
    last[:, -1] = True  # prompts are padded on the left
    if call > 0:
        return torch.full((len(real), 1), where in ("all", "completion"))
    return {"all": real, "prompt": real & ~last, "completion": last, "last_prompt": last}[where]


def encode(model, prompts):
    return model.tokenizer(prompts, return_tensors="pt", padding=True)


def hooked(model, prompts, plan, where, new_tokens=0):
    enc = encode(model, prompts)
    blocks = Residual(model).layers._module
    edits = {
        v.layer: lambda h, call, v=v: reference_edit(v, h, place(where, enc["attention_mask"], call))
        for v in plan.vectors
    }
    with hooks(blocks, edits), torch.no_grad():
        if new_tokens:
            return model._module.generate(**enc, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        positions = (enc["attention_mask"].cumsum(1) - 1).clamp_min(0)
        extra = {} if "OPT" in type(model._module).__name__ else {"position_ids": positions}
        return model._module(**enc, **extra).logits[:, -1]


def generated(model, prompts, plan, new_tokens):
    with torch.no_grad(), model.generate(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0) as tracer:
        with tracer.invoke(prompts):
            for _ in tracer.iter[:]:
                plan.apply(model)
        with tracer.invoke():
            ids = nnsight.save(tracer.result)
    return ids


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("where", ["all", "prompt", "completion", "last_prompt"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_forward_equals_a_hook(arch, op, where, batch):
    model, prompts = tiny(arch), PROMPTS[:batch]
    plan = SteeringPlan(vectors(op=op, where=where))
    with torch.no_grad(), model.trace(prompts):
        plan.apply(model)
        logits = nnsight.save(model.output.logits[:, -1])
    expected = hooked(model, prompts, plan, where)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.trace(prompts):
        plain = nnsight.save(model.output.logits[:, -1])
    assert (plain - expected).abs().max() > 1e-3  # the edit is no small thing


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("where", ["all", "prompt", "completion", "last_prompt"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_generation_equals_a_hook(arch, op, where, batch):
    model, prompts = tiny(arch), PROMPTS[:batch]
    plan = SteeringPlan(vectors(op=op, where=where))
    expected = hooked(model, prompts, plan, where, new_tokens=10)
    assert torch.equal(generated(model, prompts, plan, 10), expected)
    steered = plan.attach(model)
    with torch.no_grad(), steered.generate(prompts, max_new_tokens=10, do_sample=False, pad_token_id=0) as tracer:
        ids = nnsight.save(tracer.result)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_row_for_each_prompt_equals_a_hook(arch, op):
    model, prompts = tiny(arch), PROMPTS
    plan = SteeringPlan(vectors(rows=4, op=op, where="last_prompt"), prompts=prompts_of(model, prompts))
    expected = hooked(model, prompts, plan, "last_prompt", new_tokens=6)
    assert torch.equal(generated(model, prompts, plan, 6), expected)
    with (
        torch.no_grad(),
        plan.attach(model).generate(prompts, max_new_tokens=6, do_sample=False, pad_token_id=0) as tracer,
    ):
        ids = nnsight.save(tracer.result)
    assert torch.equal(ids, expected)
    one = generated(model, prompts[1:2], plan.take([1]), 6)  # by itself, without padding
    assert torch.equal(one[0, -6:], expected[1, -6:])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_given_places_equal_a_hook(arch, op):
    model, prompts = tiny(arch), PROMPTS[:3]
    at = [[0, 2], [], [1]]
    g = torch.Generator().manual_seed(4)
    (one, two) = vectors(op=op)
    shared = replace(one, where="given", at=at)
    own = replace(
        two, where="given", at=at, direction=torch.randn(3, 32, generator=g), strength=torch.tensor([0.5, 9.0, 2.0])
    )
    plan = SteeringPlan([shared, own], prompts=prompts_of(model, prompts))
    enc = encode(model, prompts)
    index = enc["attention_mask"].cumsum(1) - 1
    places = [(row, int((index[row] == t).nonzero()[-1])) for row, mine in enumerate(at) for t in mine]

    def edit(vector):
        def run(h, call):
            if call > 0:  # a decode step: every place lies in the prompt
                return h
            new = h.clone()
            for n, (row, column) in enumerate(places):
                v = vector.direction if vector.direction.ndim == 1 else vector.direction[n]
                s = float(torch.as_tensor(vector.strength).expand(3)[row])
                alone = replace(vector, where="all", at=None, direction=v, strength=s)
                new[row, column] = reference_edit(alone, h[row, column][None, None], torch.ones(1, 1, dtype=bool))[0, 0]
            return new

        return run

    with hooks(Residual(model).layers._module, {v.layer: edit(v) for v in plan.vectors}), torch.no_grad():
        expected = model._module.generate(**enc, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(generated(model, prompts, plan, 6), expected)
    with torch.no_grad(), plan.attach(model).generate(prompts, max_new_tokens=6, do_sample=False, pad_token_id=0,
                                                      use_cache=False) as tracer:  # fmt: skip
        assert torch.equal(nnsight.save(tracer.result), expected)


def test_a_plan_made_for_prompts_refuses_others():
    model = tiny("llama")
    plan = SteeringPlan(vectors(rows=2, op="blend", where="last_prompt"), prompts=prompts_of(model, PROMPTS[:2]))
    for prompts, found in (
        (PROMPTS[1::-1], "2 of 2 rows, the first of them row 0"),
        ([PROMPTS[0], PROMPTS[2]], "1 of 2 rows, the first of them row 1"),
        ([PROMPTS[0], PROMPTS[1][:-5]], "1 of 2 rows"),
        (PROMPTS[:3], "made for 2 prompts, but the batch has 3 rows"),
        (PROMPTS[:1], "made for 2 prompts, but the batch has 1 rows"),
    ):
        with pytest.raises(ValueError, match=found), torch.no_grad(), model.trace(prompts):
            plan.apply(model)
        with pytest.raises(ValueError, match=found), torch.no_grad(), plan.attach(model).trace(prompts):
            pass
    with torch.no_grad(), model.trace(PROMPTS[:2]):  # the same with more text, where the prompts' ends are known
        plan.apply(model)
        short = nnsight.save(model.model.layers[2].output)
    with torch.no_grad(), model.trace([p + " over the dog" for p in PROMPTS[:2]]):
        plan.apply(model)
        longer = nnsight.save(model.model.layers[2].output)
    more = len(model.tokenizer(PROMPTS[1] + " over the dog")["input_ids"]) - len(
        model.tokenizer(PROMPTS[1])["input_ids"]
    )
    torch.testing.assert_close(longer[1, :-more], short[1])


def test_rows_of_a_plan_are_taken_with_all_that_belongs_to_them():
    places = SteeringVector(1, torch.randn(3, 8), torch.tensor([1.0, 2.0, 3.0]), where="given", at=[[4], [], [0, 1]])
    prompts = Prompts.of([[5, 6], [7], [8, 9, 9]])
    found = SteeringPlan([places, SteeringVector(2, torch.randn(8))], prompts=prompts).take([2, 0])
    first, second = found.vectors
    assert first.at == ((0, 1), (4,)) and first.strength.tolist() == [3.0, 1.0] and second.rows is None
    torch.testing.assert_close(first.direction, places.direction[[1, 2, 0]])
    assert found.prompts == Prompts.of([[8, 9, 9], [5, 6]])
    with pytest.raises(IndexError, match="Row 3 was asked for, but the vector has 3 rows"):
        places.take([3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"where": "given"}, "need each other"),
        ({"at": [[0]]}, "need each other"),
        ({"where": "given", "at": [[-1]]}, "each once a row"),
        ({"where": "given", "at": [[2, 2]]}, "each once a row"),
        ({"where": "given", "at": [[0, 1]], "direction": torch.ones(3, 8)}, "3 directions but 2 places"),
        ({"where": "given", "at": [[0, 1]], "strength": torch.ones(2)}, "1 rows of places but 2 strengths"),
        ({"op": "innovation"}, "needs a predictor"),
        ({"predictor": torch.ones(9, 8)}, "no other op takes one"),
        ({"op": "innovation", "predictor": torch.ones(8, 8)}, r"\(9, 8\), or \[1, hidden\], but has \(8, 8\)"),
        ({"op": "innovation", "predictor": torch.full((9, 8), torch.inf)}, "predictor of layer 1 has NaN or infinity"),
        ({"op": "blend", "direction": torch.full((8,), torch.nan)}, "direction of layer 1 has NaN or infinity"),
    ],
)
def test_what_a_vector_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        SteeringVector(**{"layer": 1, "direction": torch.ones(8), **fields})


def test_a_blend_keeps_the_activation_as_it_is_and_replaces_at_a_share_of_one():
    z = torch.zeros(2, 8)
    z[1] = torch.arange(8.0) * 50
    vector = SteeringVector(0, z, 1.0, 7.0, op="blend")
    assert torch.equal(vector.direction, z) and vector.length == 1.0
    h = torch.randn(2, 3, 8)
    torch.testing.assert_close(vector.edit(h), z[:, None].expand(2, 3, 8))


def prompts_of(model, prompts):
    return Prompts.of([model.tokenizer(p)["input_ids"] for p in prompts])
