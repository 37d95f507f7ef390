"""An expert that reads on while the target writes: with caches, without, and by plain hooks it is the same."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from nnsight.modeling.transformers import TransformersModel
from planted import GENERAL
from tiny import ARCHITECTURES, PROMPTS, hooks

import expertsteer_nnsight as es
from expertsteer_nnsight.fit import live_generation
from expertsteer_nnsight.fit.live_generation import Reader
from expertsteer_nnsight.models.residual import Residual


@functools.cache
def expert_of(arch):
    """A model whose tokenizer cuts words in other places than the targets' does."""
    other = tiny.tokenizer(bos=True).train_new_from_iterator(
        ["the lazier foxes, hello testing smaller worlds"] * 9, 290
    )
    other.chat_template = tiny.CHAT
    model = tiny.build(arch, bos=True, seed=7)
    return TransformersModel(model._module, tokenizer=other, task="text-generation")


def live_of(expert, target, **settings):
    settings = {"layers": [(2, 1)], "follow": True, "follow_amount": 0.8, **settings}
    return es.LiveExpert(**settings).fit(expert, target, GENERAL, progress=False)


def follow(live, prompts, new, **how):
    return live_generation.follow(live._setting(), prompts, new, **how)


def activation(model, text, layer):
    kept = []
    with (
        hooks(Residual(model).layers._module, {layer: lambda h, call: (kept.append(h[0, -1].clone()), h)[1]}),
        torch.no_grad(),
    ):
        model._module(**model.tokenizer(text, return_tensors="pt"))
    return kept[0]


def by_hooks(live, prompt, new):
    """One prompt, everything read again in each step."""
    expert, target, one = live.expert_, live.target_, live.maps_[2, 1]
    ids, zs, written = target.tokenizer(prompt)["input_ids"], {}, []
    zs[len(ids) - 1] = activation(expert, prompt, 2) @ one.weight + one.bias
    for _ in range(new):

        def edit(h, call):
            put = h.clone()
            for column, z in zs.items():
                own = h[0, column]
                known = own if column < len(ids) else own @ one.predictor[:-1] + one.predictor[-1]
                put[0, column] = own + (1.0 if column < len(ids) else live.follow_amount) * (z - known)
            return put

        with hooks(Residual(target).layers._module, {1: edit}), torch.no_grad():
            logits = target._module(torch.tensor([[*ids, *written]])).logits[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] == target.tokenizer.eos_token_id:
            return written[:-1]
        text = target.tokenizer.decode(written, skip_special_tokens=True)
        if text and not text.endswith("\ufffd"):
            zs[len(ids) + len(written) - 1] = activation(expert, prompt + text, 2) @ one.weight + one.bias
    return written


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_targets_write_what_hooks_write(arch):
    live = live_of(expert_of("qwen2"), tiny.tiny(arch))
    expected = [by_hooks(live, prompt, 8) for prompt in PROMPTS]
    assert follow(live, PROMPTS, 8) == follow(live, PROMPTS, 8, cached=False) == expected
    assert follow(live, PROMPTS[:1], 8) == expected[:1]
    texts = [live.target_.tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert live.generate(PROMPTS, 8) == live.generate(PROMPTS, 8, batch_size=3) == texts
    deaf = live_of(expert_of("qwen2"), tiny.tiny(arch), follow=False)
    assert deaf.generate(PROMPTS, 8) != texts


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "qwen2"])
def test_experts_are_read_as_hooks_read_them(arch):
    live = live_of(expert_of(arch), tiny.tiny("llama"))
    assert follow(live, PROMPTS, 8) == [by_hooks(live, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_growing_texts_are_read_as_whole_ones(arch):
    model = expert_of(arch)
    steps = [
        ["the", "hello wor", "a"],
        ["the lazi", "hello world", "a d"],
        ["the lazier fox", "hello worlds te", "a dog, testing small"],
    ]
    reader, plain = Reader(model, [1, 3]), Reader(model, [1, 3], cached=False)
    changed = 0
    for before, texts in zip([[""] * 3, *steps], steps, strict=False):
        ids = [model.tokenizer(text)["input_ids"] for text in texts]
        changed += sum(
            model.tokenizer(old)["input_ids"] != new[: len(model.tokenizer(old)["input_ids"])]
            for old, new in zip(before, ids, strict=True)
        )
        found, known = reader(ids), plain(ids)
        for layer in (1, 3):
            torch.testing.assert_close(found[layer], known[layer], rtol=1e-4, atol=1e-4)
            for row, text in enumerate(texts):
                torch.testing.assert_close(found[layer][row], activation(model, text, layer), rtol=1e-4, atol=1e-4)
    assert changed  # tokens that were read are others when more is written


@pytest.mark.parametrize("settings", [{"op": "innovation", "follow_op": "blend"}, {"op": "add", "follow_op": "add"},
                                      {"where": "shared_ends"}, {"layers": [(2, 1), (3, 2)]}], ids=str)  # fmt: skip
def test_caches_change_nothing_whatever_is_put_in(settings):
    live = live_of(expert_of("gemma3"), tiny.tiny("qwen3"), **settings)
    assert follow(live, PROMPTS, 8) == follow(live, PROMPTS, 8, cached=False)


def test_chats_are_followed_and_samples_refused():
    live = live_of(expert_of("qwen2"), tiny.tiny("llama"))
    chats = [[{"role": "user", "content": p}] for p in PROMPTS[:2]]
    assert follow(live, chats, 6) == follow(live, chats, 6, cached=False)
    with pytest.raises(ValueError, match="leave do_sample out"):
        live.generate(PROMPTS, 4, do_sample=True)
