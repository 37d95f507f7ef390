"""Several experts that read along: each prompt is steered as by its surest expert alone."""

import nnsight
import pytest
import torch
from planted import GENERAL
from sklearn.exceptions import NotFittedError
from tiny import PROMPTS, bridge, build, tiny

import expertsteer_nnsight as es
from expertsteer_nnsight.fit.live_expert import LiveExpert
from expertsteer_nnsight.fit.surest_expert import SurestExpert

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
        assert SurestExpert(mine).surest(PROMPTS) == surest(mine)


@pytest.mark.parametrize("layers", [((2, 1), (2, 1)), ((1, 2), (2, 0))])
@pytest.mark.parametrize("follow", [False, True])
def test_each_prompt_is_steered_as_by_its_expert_alone(layers, follow, tmp_path):
    target = tiny("llama")
    experts = experts_of(target, layers, follow=follow)
    together, two = SurestExpert(experts), surest(experts)

    def logits(plan):
        with torch.no_grad(), plan.attach(target).trace(PROMPTS):
            found = nnsight.save(target.output.logits[:, -1])
        return found

    alone = torch.stack([logits(live.plan(PROMPTS)) for live in experts])
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    plan = together.plan(PROMPTS)
    steered = logits(plan)
    torch.testing.assert_close(steered, alone[two, range(len(PROMPTS))], rtol=1e-4, atol=1e-4)
    again = es.SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))
    torch.testing.assert_close(logits(again), steered)
    assert again.info["surest"] == two and "surest" in str(again)
    said = [live.generate(PROMPTS, 5) for live in experts]
    assert together.generate(PROMPTS, 5) == [said[k][i] for i, k in enumerate(two)]
    scores = QUESTIONS.score(target, [together, *experts])
    torch.testing.assert_close(scores[1], scores[2:][two, range(len(QUESTIONS))], rtol=1e-4, atol=1e-5)


def test_the_gate_of_the_surest_expert_counts():
    target = tiny("llama")
    silent, free = experts_of(target)
    two = surest([silent, free])
    silent.gate_ = -100.0  # steers nothing
    plan = SurestExpert([silent, free]).plan(PROMPTS)
    strengths = torch.stack([v.strength for v in plan.vectors])
    assert strengths.tolist() == [[0.0] * len(PROMPTS), [float(k == 1) for k in two]]


def test_a_receipt_has_each_expert_on_its_own_questions(tmp_path):
    target = tiny("llama")
    experts = experts_of(target)
    two = surest(experts)
    made = SurestExpert(experts).receipt(QUESTIONS, [GENERAL, GENERAL], untrained=1, cache=tmp_path, **FAST)
    for number, live in enumerate(experts):
        mine = [i for i, k in enumerate(two) if k == number]
        assert len(mine) > 1
        # another prompt, the mean and all else are of the questions that are this expert's
        some = es.MultipleChoice([QUESTIONS.items[i] for i in mine])
        each = live.receipt(some, GENERAL, untrained=1, **FAST)
        for arm, answers in each.answers.items():
            assert [made.answers[arm][i] for i in mine] == list(answers)
        everywhere = [int(x[1].argmax()) for x in QUESTIONS.options(target, [live])]
        assert made.answers[f"every prompt by live expert {number}"] == everywhere
        assert f"live expert {number} is the surest of {len(mine)} of {len(two)} questions" in str(made)
    assert set(made.controls) == {"another prompt", "mean", "untrained, seed 1", "own layer"}
    with pytest.raises(ValueError, match="2 live experts need as many sets of anchors, but 1 were given"):
        SurestExpert(experts).receipt(QUESTIONS, [GENERAL], **FAST)


def test_an_expert_that_is_never_the_surest_takes_no_part_in_the_receipt():
    target = tiny("llama")
    experts = experts_of(target)
    two = surest(experts)
    some = es.MultipleChoice([item for item, k in zip(QUESTIONS.items, two, strict=True) if k == 0])
    made = SurestExpert(experts).receipt(some, [GENERAL, GENERAL], untrained=1, **FAST)
    each = experts[0].receipt(some, GENERAL, untrained=1, **FAST)
    assert made.answers["live"] == list(each.answers["live"]) and "live expert 1 is the surest of 0 of" in str(made)


def test_what_cannot_steer_together_is_refused(tmp_path):
    target = tiny("llama")
    experts = experts_of(target)
    other = LiveExpert(layers=[(2, 1)]).fit(experts[0].expert_, build("llama", seed=5), GENERAL, **FAST)
    with pytest.raises(ValueError, match="Live expert 2 steers another model than the first"):
        SurestExpert([*experts, other])
    again = LiveExpert(layers=[(1, 1)]).fit(experts[0].expert_, target, GENERAL, **FAST)
    with pytest.raises(ValueError, match="Live expert 2 reads the same model as one before it"):
        SurestExpert([*experts, again])
    again.expert_ = nnsight.NNsight(bridge(target, tmp_path))
    with pytest.raises(ValueError, match="Live expert 0 reads a TransformerBridge"):
        SurestExpert([again])
    with pytest.raises(ValueError, match="give at least one"):
        SurestExpert([])
    with pytest.raises(NotFittedError):
        SurestExpert([LiveExpert()])
