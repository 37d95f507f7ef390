"""Texts that begin alike are read as `collect` reads them, and what they have in common once."""

import pytest
import tiny
import torch
from tiny import ARCHITECTURES

import expertsteer_nnsight as es
from expertsteer_nnsight.states import continued
from expertsteer_nnsight.states.continued import continued_states

CONTEXTS = [
    "the quick brown fox jumps over a lazy dog and hello to the world of this test",
    "hello world",
    "a dog and the fox",
]
TEXTS = [c + more for c in CONTEXTS for more in (" a dog", " hello", " the fox jumps over", "")] + ["one more test"]
ENDS = [[text.index(" ")] * (" " in text) + ([text.rindex(" ")] if text.count(" ") > 1 else []) for text in TEXTS]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(continued, "WORTH", 8)


def tokens_read(model):
    """How many tokens pass the first layer, and a function that stops counting."""
    seen = []
    block = es.Residual(model).layers._module[0]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    return seen, handle.remove


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_activations_are_those_of_whole_texts(arch, batch_size):
    model = tiny.build(arch, bos=arch == "gemma3")
    found = continued_states(model, TEXTS, [0, 2], ENDS, batch_size)
    expected = es.collect(model, TEXTS, [0, 2], ends=ENDS, progress=False)
    assert sorted(found) == [0, 2]
    for layer, states in found.items():
        torch.testing.assert_close(states, expected[layer], rtol=1e-4, atol=1e-4)
    assert model.__dict__[continued.KNOWN] is True


def test_a_shared_beginning_is_read_once():
    model = tiny.build("llama")
    texts = [CONTEXTS[0] * 3 + more for more in (" a dog", " hello", " the fox", " and")]
    seen, stop = tokens_read(model)
    es.collect(model, texts, [1], ends=[[] for _ in texts], progress=False)
    whole, seen[:] = sum(seen), []
    continued_states(model, texts, [1], [[] for _ in texts])
    first, seen[:] = sum(seen), []
    continued_states(model, texts, [1], [[] for _ in texts])
    stop()
    assert (
        sum(seen) < 0.4 * whole and first < 0.7 * whole
    )  # the first time one of them is read whole beside it, as a check


def test_a_model_whose_cache_gives_other_values_is_read_whole(monkeypatch):
    model = tiny.build("llama")
    texts = [CONTEXTS[0] + more for more in (" a dog", " hello", " the fox", " and", " it")]
    ends = [[] for _ in texts]
    whole, calls = continued._read, []

    def spoilt(model, residual, layers, rows, cache, past=0):
        calls.append(past)
        states, made = whole(model, residual, layers, rows, cache, past)
        return (states + 1, made) if past else (states, made)

    monkeypatch.setattr(continued, "_read", spoilt)
    expected = es.collect(model, texts, [1], ends=ends, progress=False)
    for _ in range(2):
        found = continued_states(model, texts, [1], ends)
        torch.testing.assert_close(found[1], expected[1])
    assert calls.count(0) == 2 and model.__dict__[continued.KNOWN] is False  # tried once


def test_a_model_that_keeps_no_keys_is_read_whole(monkeypatch):
    model = tiny.build("llama")
    texts = [CONTEXTS[0] + more for more in (" a dog", " hello", " the fox", " and", " it")]
    ends = [[] for _ in texts]

    def none(*args, **how):
        raise AttributeError("no cache")

    monkeypatch.setattr(continued, "_read", none)
    found = continued_states(model, texts, [1], ends)
    torch.testing.assert_close(found[1], es.collect(model, texts, [1], ends=ends, progress=False)[1])


def test_an_edited_model_is_read_whole(monkeypatch):
    model = tiny.build("llama")
    plan = es.SteeringPlan([es.SteeringVector(0, torch.ones(32), strength=2.0)])
    steered = plan.attach(model)
    monkeypatch.setattr(continued, "_read", lambda *a, **k: pytest.fail("shared"))
    texts = [CONTEXTS[0] + more for more in (" a dog", " hello", " the fox", " and", " it")]
    ends = [[] for _ in texts]
    found = continued_states(steered, texts, [1], ends)
    torch.testing.assert_close(found[1], es.collect(steered, texts, [1], ends=ends, progress=False)[1])
    assert not torch.allclose(found[1], es.collect(model, texts, [1], ends=ends, progress=False)[1], atol=1e-2)
