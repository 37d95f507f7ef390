"""Steering through nnsight does what a plain PyTorch forward hook does, for every op, place and architecture."""

from __future__ import annotations

import nnsight
import pytest
import torch
from tiny import ARCHITECTURES, PROMPTS, hooks, tiny

from expertsteer_nnsight.models.residual import Residual
from expertsteer_nnsight.steering.plan import SteeringPlan
from expertsteer_nnsight.steering.vectors import OPS, SteeringVector

LAYERS = (1, 2)


def vectors(rows=None, **kwargs):
    g = torch.Generator().manual_seed(0)
    shape = (32,) if rows is None else (rows, 32)
    return tuple(
        SteeringVector(layer, torch.randn(shape, generator=g), residual_norm=3.0, **{"strength": 0.7, **kwargs})
        for layer in LAYERS
    )


def reference_edit(vector, h, mask):
    """The formulas of SteeringVector's docstring, written out once more."""
    v, s = vector.direction.double(), vector.strength * (3.0 if vector.op != "project_out" else 1.0)
    x = h.double()
    along = (x @ v)[..., None] * v
    new = {
        "add": x + s * v,
        "add_keep_norm": (x + s * v) / (x + s * v).norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True),
        "project_out": x - s * along,
        "clamp": x - along + s * v,
    }[vector.op]
    return torch.where(mask[..., None], new, x).to(h.dtype)


def place(where, attention, call):
    """Positions that a hook must edit in forward number `call`, from the prompt's mask alone."""
    real = attention.bool()
    last = torch.zeros_like(real)
    last[:, -1] = True  # prompts are padded on the left
    if call > 0:
        return torch.full((len(real), 1), where != "prompt")
    return {"all": real, "prompt": real & ~last, "completion": last}[where]


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
@pytest.mark.parametrize("where", ["all", "prompt", "completion"])
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
@pytest.mark.parametrize("where", ["all", "prompt", "completion"])
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
