"""Several experts that read along: each prompt is steered as by its surest expert alone."""

import nnsight
import numpy as np
import pytest
import torch
from planted import GENERAL
from sklearn.exceptions import NotFittedError
from tiny import PROMPTS, build, tiny

import expertsteer_nnsight as es
from expertsteer_nnsight.fit.live_expert import LiveExpert

QUESTIONS = es.MultipleChoice([(p, [" a dog", " the fox jumps", " hello"], n % 3) for n, p in enumerate(PROMPTS)])
FAST = {"progress": False}


def entropies(model, texts):
    """Of what comes after each text, nats, in plain PyTorch."""
    with torch.no_grad():
        logits = [model._module(**model.tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts]
    return torch.stack([torch.distributions.Categorical(logits=row).entropy() for row in logits])


def experts_of(target, layers=((2, 1), (2, 1)), **settings):
    """Two live experts, of which either is the surest of some of `PROMPTS`."""
    models = tiny("gemma3", bos=True, seed=1), tiny("gpt2")
    return [
        LiveExpert(layers=[pair], **settings).fit(model, target, GENERAL, **FAST)
        for model, pair in zip(models, layers, strict=True)
    ]


def surest(experts):
    found = torch.stack([entropies(live.expert_, PROMPTS) for live in experts]).argmin(0).tolist()
    assert set(found) == {0, 1}
    return found


def test_the_surest_is_the_one_of_least_entropy():
    experts = experts_of(tiny("llama"))
    for mine in (experts, experts[::-1]):
        assert es.LiveEnsemble(mine).surest(PROMPTS) == surest(mine)


@pytest.mark.parametrize("layers", [((2, 1), (2, 1)), ((1, 2), (2, 0))])
@pytest.mark.parametrize("follow", [False, True])
def test_each_prompt_is_steered_as_by_its_expert_alone(layers, follow, tmp_path):
    target = tiny("llama")
    experts = experts_of(target, layers, follow=follow)
    ensemble, two = es.LiveEnsemble(experts), surest(experts)

    def logits(plan):
        with torch.no_grad(), plan.attach(target).trace(PROMPTS):
            found = nnsight.save(target.output.logits[:, -1])
        return found

    alone = torch.stack([logits(live.plan(PROMPTS)) for live in experts])
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    plan = ensemble.plan(PROMPTS)
    steered = logits(plan)
    torch.testing.assert_close(steered, alone[two, range(len(PROMPTS))], rtol=1e-4, atol=1e-4)
    again = es.SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))
    torch.testing.assert_close(logits(again), steered)
    assert again.info["surest"] == two and "surest" in str(again)
    said = [live.generate(PROMPTS, 5) for live in experts]
    assert ensemble.generate(PROMPTS, 5) == [said[k][i] for i, k in enumerate(two)]
    scores = QUESTIONS.score(target, [ensemble, *experts])
    torch.testing.assert_close(scores[1], scores[2:][two, range(len(QUESTIONS))], rtol=1e-4, atol=1e-5)


def test_the_gate_of_the_surest_expert_counts():
    target = tiny("llama")
    silent, free = experts_of(target)
    two = surest([silent, free])
    silent.gate_ = -100.0  # steers nothing
    plan = es.LiveEnsemble([silent, free]).plan(PROMPTS)
    strengths = torch.stack([v.strength for v in plan.vectors])
    assert strengths.tolist() == [[0.0] * len(PROMPTS), [float(k == 1) for k in two]]


def test_a_receipt_has_the_answers_of_the_surest_experts_and_their_controls(tmp_path):
    target = tiny("llama")
    experts = experts_of(target)
    two = surest(experts)
    made = es.LiveEnsemble(experts).receipt(QUESTIONS, [GENERAL, GENERAL], untrained=1, cache=tmp_path, **FAST)
    each = [live.receipt(QUESTIONS, GENERAL, untrained=1, **FAST) for live in experts]
    assert set(made.answers) == set(each[0].answers)
    for arm, answers in made.answers.items():
        np.testing.assert_array_equal(answers, [each[k].answers[arm][i] for i, k in enumerate(two)])
    asked = [two.count(k) for k in (0, 1)]
    assert [f"was the surest for {n} of {len(two)} questions" in str(made) for n in asked] == [True, True]
    with pytest.raises(ValueError, match="2 live experts need as many sets of anchors, but 1 were given"):
        es.LiveEnsemble(experts).receipt(QUESTIONS, [GENERAL], **FAST)


def test_what_cannot_steer_together_is_refused():
    target = tiny("llama")
    experts = experts_of(target)
    other = LiveExpert(layers=[(2, 1)]).fit(experts[0].expert_, build("llama", num_hidden_layers=5), GENERAL, **FAST)
    with pytest.raises(ValueError, match="These live experts cannot steer together"):
        es.LiveEnsemble([*experts, other])
    with pytest.raises(ValueError, match="needs at least one"):
        es.LiveEnsemble([])
    with pytest.raises(NotFittedError):
        es.LiveEnsemble([LiveExpert()])
