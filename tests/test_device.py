"""On a GPU: the numbers of the CPU. Runs with `EXPERTSTEER_TEST_DEVICE=cuda`, which other modules' tests heed too."""

from __future__ import annotations

import copy
import os

import pytest
import tiny
import torch
from harness import choices, close, ours, plain, plan_for
from nnsight.modeling.transformers import TransformersModel
from planted import GENERAL, PAIRS

import expertsteer_nnsight as es
from expertsteer_nnsight.models.packaged import load

WORDS = es.Words(tiny.PROMPTS, ("the", "dog"), ("test", "fox"))
DEVICE = os.environ.get("EXPERTSTEER_TEST_DEVICE")
pytestmark = pytest.mark.skipif(DEVICE is None, reason="EXPERTSTEER_TEST_DEVICE names no device")


def moved(arch, seed=0, dtype=torch.float32, **overrides):
    """A random model on the CPU, and its copy on the device."""
    here = tiny.build(arch, seed=seed, **overrides)
    module = copy.deepcopy(here._module).to(DEVICE, dtype)
    here._module.cpu()
    return here, TransformersModel(module, tokenizer=here.tokenizer, task="text-generation")


def logits(model, plan, prompts=tiny.PROMPTS):
    with torch.no_grad(), plan.attach(model).trace(prompts):
        found = model.output.logits.cpu().save()
    return found


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_a_steered_trace(arch):
    here, there = moved(arch)
    plan = plan_for(here)
    assert (logits(here, plan) - logits(there, plan)).abs().max() < 2e-3
    a, b = (es.collect(m, GENERAL, [0, 2, 3], progress=False) for m in (here, there))
    for layer in (0, 2, 3):
        assert torch.allclose(a[layer], b[layer].cpu(), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_is_that_of_a_hook(dtype):
    _, there = moved("llama", dtype=dtype)
    plan = plan_for(there)
    edits = {
        v.layer: lambda h, _, v=v: h + (v.strength * v.residual_norm * v.direction).to(h.device, h.dtype)
        for v in plan.vectors
    }
    batch = there.tokenizer(tiny.PROMPTS, return_tensors="pt", padding=True, padding_side="left").to(DEVICE)
    with torch.no_grad(), tiny.hooks(there._module.model.layers, edits):
        known = there._module(**batch).logits.cpu()
    unsteered = there._module(**batch).logits.detach().cpu()
    apart = (known - unsteered).abs().max()
    real = batch["attention_mask"].bool().cpu()
    assert (logits(there, plan) - known)[real].abs().max() < 0.05 * apart


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_steered_generation(arch):
    here, there = moved(arch)
    plan = plan_for(here)
    for where in ("all", "prompt", "completion"):
        found = []
        for model in (here, there):
            steered = plan.with_(where=where).attach(model)
            with steered.generate(tiny.PROMPTS[:2], max_new_tokens=8, do_sample=False) as tracer:
                ids = tracer.result.cpu().save()
            found.append(ids)
        assert torch.equal(*found)


@pytest.mark.parametrize("preset", ["recommended", "in_domain", "paper"])
def test_a_fit_a_calibration_and_a_receipt(preset):
    targets, experts = moved("llama", 2, num_hidden_layers=8), moved("neox", 1, num_hidden_layers=8)
    steer = [getattr(es.ExpertSteer, preset)(random_state=0) for _ in targets]
    made = [s.fit(e, t, PAIRS, GENERAL) for s, e, t in zip(steer, experts, targets, strict=True)]
    doses = [es.calibrate(p, t, tiny.PROMPTS, 0.1, rollout=4) for p, t in zip(made, targets, strict=True)]
    assert made[0].layers == made[1].layers
    for a, b in zip(doses[0].vectors, doses[1].vectors, strict=True):
        assert torch.cosine_similarity(a.direction.cpu(), b.direction.cpu(), dim=0) > 0.98
        assert a.strength == pytest.approx(b.strength, rel=0.1)
    if preset == "recommended":
        arms = steer[1].controls(experts[1], targets[1], PAIRS, GENERAL, untrained=1, draws=2)
        found = es.receipt(
            doses[1], targets[1], WORDS, tiny.PROMPTS, controls=arms, kl_budget=0.1, rollout=4, progress=False
        )
        assert {"native", "untrained", "permuted", "random"} <= {*found.arms}


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_log_likelihoods_of_tasks(arch):
    here, there = moved(arch)
    close(
        ours(there).loglikelihood(choices(), disable_tqdm=True),
        plain(there).loglikelihood(choices(), disable_tqdm=True),
    )
    plan = plan_for(here)
    mine, known = (ours(m, plan).loglikelihood(choices(), disable_tqdm=True) for m in (there, here))
    assert max(abs(a[0] - b[0]) for a, b in zip(mine, known, strict=True)) < 2e-3


def test_an_untrained_expert_is_on_the_device():
    _, there = moved("llama")
    assert es.untrained_like(there)._module.device == there._module.device


def test_models_load_on_the_device(tmp_path):
    model = tiny.build("llama")
    model._module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    here = load(str(tmp_path))
    assert here.device.type == here._module.device.type == torch.device(DEVICE).type
    with torch.no_grad(), here.trace(tiny.PROMPTS):
        found = here.output.logits.save()
    assert found.device.type == torch.device(DEVICE).type
