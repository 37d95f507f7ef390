"""Effects and rollouts against plain forwards of each text by itself."""

from __future__ import annotations

import nnsight
import pytest
import torch
from tiny import PROMPTS, hooks, tiny

from expertsteer_nnsight.measure.effects import Choices, Effect, Judged, Words
from expertsteer_nnsight.measure.rollouts import completions, rollouts, variety
from expertsteer_nnsight.measure.rows import Encoded
from expertsteer_nnsight.steering.plan import SteeringPlan
from expertsteer_nnsight.steering.vectors import SteeringVector

ITEMS = [
    ("hello world", " this is a test", " the lazy dog"),
    ("", "the quick brown fox", "a dog jumps over"),
    ("a small model", " the", " over the lazy dog"),
]


def plan(seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    return SteeringPlan([SteeringVector(i, torch.randn(32, generator=g), 0.5, 5.0, **changes) for i in (1, 2)])


def likelihood(model, text, start, steer=None, lengths=None):
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad(), model.trace(ids):
        if steer is not None:
            steer.apply(model, prompt_lengths=lengths)
        out = nnsight.save(model.output.logits[0].float().log_softmax(-1))
    found = out[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return float(found[start - 1 :].sum()), len(found) - start + 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("where", ["all", "completion"])
def test_choices_are_differences_of_log_likelihood_per_token(bos, where):
    model, steer = tiny("llama", bos), plan(where=where)
    found = Choices(ITEMS).score(model, [steer, -steer])
    sums = Choices(ITEMS, per_token=False).score(model, [steer])
    for column, (prompt, *both) in enumerate(ITEMS):
        start = len(model.tokenizer(prompt)["input_ids"]) if prompt else max(1, int(bos))
        for row, p in enumerate([None, steer]):
            lengths = [start] if p is not None and where == "completion" else None
            (a, n), (b, m) = (likelihood(model, prompt + text, start, p, lengths) for text in both)
            assert abs(float(found[row, column]) - (a / n - b / m)) < 1e-3
            assert abs(float(sums[row, column]) - (a - b)) < 2e-3
    assert found.shape == (3, 3)


def test_an_effect_without_plans_is_the_models_own_score():
    model = tiny("llama")
    for effect in (Choices(ITEMS), Words(PROMPTS, ["the", "dog"], ["test"])):
        torch.testing.assert_close(effect.score(model, []), effect.score(model, [plan()])[:1], rtol=1e-3, atol=1e-4)
        assert isinstance(effect, Effect) and len(effect[:2]) == 2


def test_chat_prompts_are_scored_after_their_template():
    model = tiny("llama")
    chat = [{"role": "user", "content": "hello"}]
    found = Choices([(chat, " the dog", " a test")]).score(model, [])
    text = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    same = Choices([(text, " the dog", " a test")]).score(model, [])
    torch.testing.assert_close(found, same, rtol=1e-3, atol=1e-4)


def test_an_instruction_stands_before_every_prompt():
    words = Words(["hello"], ["the"], ["test"]).instructed("Be quick.")
    assert words.prompts == ("Be quick.\n\nhello",)
    assert Choices(ITEMS[:2]).instructed("Be.").items[1][0] == "Be.\n\n"
    chat = [{"role": "user", "content": "hello"}]
    assert Judged([chat], len).instructed("Be.").prompts[0][0] == {"role": "system", "content": "Be."}


def test_a_judge_sees_the_continuations_alone():
    model, seen = tiny("llama"), []

    def judge(texts):
        seen.append(texts)
        return [len(t) for t in texts]

    found = Judged(PROMPTS, judge, max_new_tokens=4).score(model, [plan()])
    assert found.shape == (2, 4) and found[0].tolist() == [len(t) for t in seen[0]]
    assert all(not t.startswith(p) for t, p in zip(seen[0], PROMPTS, strict=True))
    with pytest.raises(ValueError, match="one each"):
        Judged(PROMPTS, lambda texts: [1.0], 2).score(model, [])


@pytest.mark.parametrize("bos", [False, True])
def test_rollouts_equal_a_plain_hook_and_a_batch_equals_single_texts(bos):
    model, steer = tiny("llama", bos), plan()
    made = rollouts(model, PROMPTS, steer, 6, batch_size=3)

    def add(vector):
        def edit(h, _call):
            new = h + vector.length * vector.direction.to(h)
            if bos and h.shape[1] > 1:
                new[:, 0] = h[:, 0]
            return new

        return edit

    edits = {v.layer: add(v) for v in steer.vectors}
    for prompt, text in zip(PROMPTS, made, strict=True):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        with hooks(model._module.model.layers, edits), torch.no_grad():
            row = model._module.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
        new = row[ids.shape[1] :]
        end = new.index(2) if 2 in new else len(new)
        assert text.ids == row[: ids.shape[1] + end] and text.prompt == ids.shape[1]
    assert len(completions(model, made)) == 4


def test_variety_counts_n_grams():
    same = Encoded([9, 1, 1, 1, 1], 0, 1)
    fresh = Encoded([9, 1, 2, 3, 4], 0, 1)
    assert variety([fresh]) == {"repetition": 0.0, "distinct": 1.0}
    found = variety([same, fresh])
    assert found["repetition"] == pytest.approx((2 / 3) / 2) and found["distinct"] == pytest.approx(4 / 6)
    assert variety([Encoded([9], 0, 1)])["repetition"] == 0


def test_items_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match="needs items"):
        Choices([])
    with pytest.raises(ValueError, match=r"Words needs a list of positive, but got one string: write \['good'\]"):
        Words(["a"], "good", ["b"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs prompts"):
        Words([], ["a"], ["b"])
    with pytest.raises(ValueError, match="As many positive as negative"):
        Choices.statements(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="no token that the model predicts"):
        Choices.statements(["a"], ["b"]).score(tiny("llama"), [])
