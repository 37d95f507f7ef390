"""collect() keeps what plain PyTorch hooks see, runs no more than it must, and goes on where it was cut off."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from tiny import ARCHITECTURES, PROMPTS, build, hooks, tiny, watching
from torch import Tensor

from expertsteer_nnsight.models.positions import prefix_ids
from expertsteer_nnsight.models.residual import Residual
from expertsteer_nnsight.states.activations import Activations
from expertsteer_nnsight.states.collecting import collect
from expertsteer_nnsight.texts.word_ends import shared_ends

HELPERS = Path(__file__).parents[1] / "helpers"

TEXTS = [
    *PROMPTS,
    "fox",
    "one small model is a test of the lazy dog, and the quick fox jumps over it",
    "brown world",
    "this is this is this is",
    "hello hello hello hello hello",
    "a test",
]
CHATS = [
    [{"role": "user", "content": "hello world"}],
    [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "fox"}, {"role": "user", "content": "why"}],
]


def blocks(model):
    return Residual(model).layers._module


def hooked(model, ids):
    """Every layer's output for one text, `[layer][token, hidden]`, from an unpadded forward with PyTorch hooks."""
    seen = {}
    with torch.no_grad(), hooks(blocks(model), {i: lambda h, _, i=i: seen.setdefault(i, h.clone()) for i in range(4)}):
        model._module(torch.tensor([ids]))
    return [seen[i][0] for i in range(4)]


def token_ids(model, texts):
    return [model.tokenizer(t)["input_ids"] for t in texts]


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


def same(a, b, equal=torch.equal):
    assert a.layers == b.layers and a.n_texts == b.n_texts
    for layer in a:
        assert a[layer].shape == b[layer].shape
        assert equal(a[layer], b[layer]) is not False
        assert a.norm(layer) == pytest.approx(b.norm(layer), rel=1e-5)


@contextmanager
def counted(*modules, at=None, error=None):
    """How often each module starts to run; `error` is raised when the first one starts for the `at`-th time."""
    counts = [0] * len(modules)

    def hook(number):
        def run(*_):
            counts[number] += 1
            if error is not None and number == 0 and counts[0] == at:
                raise error

        return run

    handles = [m.register_forward_pre_hook(watching(hook(i))) for i, m in enumerate(modules)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# what is kept


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_last_token_equals_a_hook(arch):
    model = tiny(arch)
    found = collect(model, TEXTS, batch_size=4, progress=False)
    expected = [hooked(model, ids) for ids in token_ids(model, TEXTS)]
    assert list(found) == [0, 1, 2, 3] and found.n_layers == 4 and found.n_texts == len(TEXTS)
    for layer in range(4):
        assert found[layer].shape == (len(TEXTS), 32)
        close(found[layer], torch.stack([e[layer][-1] for e in expected]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["last", "mean"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batches_equal_one_by_one(arch, position):
    model = tiny(arch)
    batched = collect(model, TEXTS, position=position, batch_size=4, progress=False)
    alone = collect(model, TEXTS, position=position, batch_size=1, progress=False)
    same(batched, alone, close)


RULES = {
    "last": lambda own: own[-1],
    "mean": lambda own: own.mean(0),
    0: lambda own: own[0],
    1: lambda own: own[1],
    -2: lambda own: own[-2],
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("position", [*RULES, "middle"])
def test_positions_count_a_texts_own_tokens(position, bos):
    model = tiny("llama", bos=bos)
    texts = [t for t in TEXTS if t not in ("fox",)]
    rule = (lambda ids: len(ids) // 2) if position == "middle" else position
    found = collect(model, texts, position=rule, batch_size=4, progress=False)
    for i, ids in enumerate(token_ids(model, texts)):
        assert (ids[0] == 1) == bos
        for layer, h in enumerate(hooked(model, ids)):
            own = h[1:] if bos else h
            expected = own[len(own) // 2] if position == "middle" else RULES[position](own)
            close(found[layer][i], expected)


def test_the_mean_leaves_the_prefix_out():
    model = tiny("llama", bos=True)
    found = collect(model, TEXTS[:1], position="mean", progress=False)
    h = hooked(model, token_ids(model, TEXTS[:1])[0])[3]
    close(found[3][0], h[1:].mean(0))
    assert (found[3][0] - h.mean(0)).abs().max() > 1e-3


def test_a_function_gets_the_ids_of_the_text_itself():
    model, seen = tiny("llama", bos=True), []
    collect(model, TEXTS[:3], position=lambda ids: seen.append(ids) or -1, progress=False)
    assert seen == [ids[1:] for ids in token_ids(model, TEXTS[:3])]


@pytest.mark.parametrize("bos", [False, True])
def test_norm_is_the_median_over_texts_of_medians_over_own_tokens(bos):
    model = tiny("llama", bos=bos)
    found = collect(model, TEXTS, batch_size=4, progress=False)
    expected = [hooked(model, ids) for ids in token_ids(model, TEXTS)]
    for layer in range(4):
        medians = sorted(float(e[layer][int(bos) :].norm(dim=-1).median()) for e in expected)
        assert found.norm(layer) == pytest.approx(medians[(len(medians) - 1) // 2], rel=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_chats_go_through_the_template(bos):
    model = tiny("llama", bos=bos)
    last = collect(model, [*CHATS, "a dog"], batch_size=4, progress=False)
    mean = collect(model, [*CHATS, "a dog"], position="mean", batch_size=4, progress=False)
    for i, chat in enumerate(CHATS):
        written = "".join(f"<s>{m['role']} {m['content']}</s>" for m in chat) + "<s>assistant "
        h = hooked(model, model.tokenizer(written, add_special_tokens=False)["input_ids"])[2]
        close(last[2][i], h[-1])
        close(mean[2][i], (h[1:] if bos else h).mean(0))


def test_texts_from_a_file_or_a_dataset(tmp_path):
    model, file = tiny(), tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    expected = collect(model, TEXTS, progress=False)
    same(collect(model, file, progress=False), expected)
    same(collect(model, datasets.Dataset.from_dict({"text": TEXTS}), progress=False), expected)


def test_layers_are_sorted_counted_from_either_end_and_taken_once():
    model = tiny()
    every = collect(model, TEXTS, progress=False)
    some = collect(model, TEXTS, layers=[-1, 1, 3], progress=False)
    assert some.layers == (1, 3) and list(some) == [1, 3] and len(some) == 2 and some.n_layers == 4
    assert torch.equal(some[3], every[3]) and torch.equal(some[1], every[1])
    for ask in (some.__getitem__, some.norm):
        with pytest.raises(KeyError, match=r"Layer 2 was not collected; there are \[1, 3\]"):
            ask(2)
    assert "10 texts, layers 1, 3 of llama (4 layers, width 32), position last, in memory" in repr(some)


def test_dtype_of_what_is_stored(tmp_path):
    model = tiny()
    full = collect(model, TEXTS, progress=False)
    half = collect(model, TEXTS, dtype=torch.float16, progress=False)
    kept = collect(model, TEXTS, dtype=torch.float16, cache=tmp_path, progress=False)
    for layer in full:
        assert full[layer].dtype == torch.float32
        for found in (half, kept):
            assert found[layer].dtype == torch.float16 and torch.equal(found[layer], full[layer].half())
            assert found.norm(layer) == full.norm(layer)


def test_a_bfloat16_model_is_summed_in_float32():
    model = build()
    model._module.bfloat16()
    found = collect(model, TEXTS[:1], position="mean", progress=False)
    h = hooked(model, token_ids(model, TEXTS[:1])[0])[3]
    assert found[3].dtype == h.dtype == torch.bfloat16
    assert torch.equal(found[3][0], h.float().mean(0).bfloat16())
    assert found.norm(3) == pytest.approx(float(h.float().norm(dim=-1).median()), rel=1e-5)


def test_errors():
    model = tiny()
    for layer in (4, -5):
        with pytest.raises(IndexError, match=rf"Layer {layer} was asked for, but the model has 4 layers \(0 to 3\)"):
            collect(model, TEXTS, layers=[0, layer], progress=False)
    with pytest.raises(ValueError, match="No layers were asked for"):
        collect(model, TEXTS, layers=[], progress=False)
    with pytest.raises(ValueError, match="Position 40 was asked for, but a text has only"):
        collect(model, TEXTS, position=40, progress=False)
    with pytest.raises(ValueError, match='position must be "last", "mean", an index or a function'):
        collect(model, TEXTS, position="first", progress=False)
    with pytest.raises(ValueError, match="There are no texts"):
        collect(model, [], progress=False)
    with pytest.raises(ValueError, match="One string was given"):
        collect(model, "a dog", progress=False)


# what is run


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_behind_the_last_layer_asked_for_is_run(arch):
    model = tiny(arch)
    head = model._module.get_output_embeddings()
    with counted(*blocks(model), head) as counts:
        collect(model, TEXTS, batch_size=4, progress=False)
        assert counts == [3, 3, 3, 3, 0]
        collect(model, TEXTS, layers=[0, 1], batch_size=4, progress=False)
        assert counts == [6, 6, 3, 3, 0]
        with torch.no_grad():
            model._module(torch.tensor([[3, 4]]))
        assert counts == [7, 7, 4, 4, 1]  # the counter sees the head where it runs


# the cache


def test_cache_equals_memory_and_is_read_again(tmp_path):
    model = tiny()
    memory = collect(model, TEXTS, batch_size=2, progress=False)
    stored = collect(model, TEXTS, batch_size=2, cache=tmp_path / "new" / "c", shard_size=4, progress=False)
    same(stored, memory)
    assert stored._memory == {} and not any(isinstance(v, Tensor) for v in vars(stored).values())
    assert str(tmp_path) in repr(stored)
    files = sorted(f.name for f in (tmp_path / "new" / "c").iterdir())
    assert files[0] == "manifest.json" and len(files) == 4 and all(f.startswith("shard-") for f in files[1:])
    with counted(blocks(model)[0]) as counts:
        again = collect(model, TEXTS, batch_size=3, cache=str(tmp_path / "new" / "c"), shard_size=4, progress=False)
    assert counts == [0]
    same(again, memory)


def test_an_interrupted_run_goes_on(tmp_path):
    model = build(seed=1)
    settings = {"batch_size": 2, "shard_size": 4, "position": "mean", "progress": False}
    first = blocks(model)[0]
    with (
        counted(first, at=4, error=KeyboardInterrupt()) as counts,  # in the second shard of three
        pytest.raises(KeyboardInterrupt),
    ):
        collect(model, TEXTS, cache=tmp_path, **settings)
    assert counts == [4]
    shards = list(tmp_path.glob("shard-*"))
    assert len(shards) == 1
    written = shards[0].stat().st_mtime_ns
    with counted(first) as counts:
        found = collect(model, TEXTS, cache=tmp_path, **settings)
    assert counts == [3]  # two batches of the second shard, one of the third
    assert shards[0].stat().st_mtime_ns == written
    same(found, collect(model, TEXTS, **settings))


SCRIPT = """
import sys, time
sys.path[:0] = {tests!r}
import torch
torch.set_num_threads(1)
from tiny import build, watching
from test_activations import TEXTS, blocks
from expertsteer_nnsight.states.collecting import collect
model = build(seed=5)
blocks(model)[0].register_forward_pre_hook(watching(lambda *_: time.sleep(0.5)))
collect(model, TEXTS, cache=sys.argv[1], shard_size=2, batch_size=2, progress=False)
"""


def test_a_killed_process_leaves_whole_shards_and_its_run_goes_on(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(SCRIPT.format(tests=[str(HELPERS), str(Path(__file__).parent)]))
    process = subprocess.Popen([sys.executable, str(script), str(folder)])
    try:
        end = time.monotonic() + 240
        while len(list(folder.glob("*.safetensors"))) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}
    assert 2 <= len(before) < 5
    (folder / "shard-0123456789ab.77.partial").write_bytes(b"half a shard")
    model = build(seed=5)
    with counted(blocks(model)[0]) as counts:
        found = collect(model, TEXTS, cache=folder, shard_size=2, batch_size=2, progress=False)
    assert counts == [5 - len(before)]
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert len(list(folder.glob("*.safetensors"))) == 5
    same(found, collect(model, TEXTS, batch_size=2, progress=False))


def test_a_cache_of_something_else_is_refused(tmp_path):
    base = {"cache": tmp_path, "layers": [1, 2], "shard_size": 4, "progress": False}
    collect(tiny(), TEXTS, **base)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    fine_tuned = build()
    with torch.no_grad():
        fine_tuned._module.model.layers[3].mlp.up_proj.weight += 1e-3
    others = {
        "model": [(tiny(seed=1), TEXTS, {}), (fine_tuned, TEXTS, {}), (build(rope_theta=5.0), TEXTS, {})],
        "texts": [(tiny(), TEXTS[::-1], {}), (tiny(), TEXTS[:-1], {}), (tiny(), [*TEXTS[:-1], "A test"], {})],
        "layers": [(tiny(), TEXTS, {"layers": [1, 3]})],
        "position": [(tiny(), TEXTS, {"position": p}) for p in ("mean", 0, lambda ids: -1)],
        "dtype": [(tiny(), TEXTS, {"dtype": torch.float16})],
    }
    for what, calls in others.items():
        for model, texts, change in calls:
            with pytest.raises(ValueError, match=f"was made with another {what}: pass another folder, or delete this"):
                collect(model, texts, **{**base, **change})
    with pytest.raises(ValueError, match="was made with another texts, layers:"):
        collect(tiny(), TEXTS[:2], **{**base, "layers": [1]})
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before
    collect(tiny(), TEXTS, **base)


def test_a_cache_of_more_layers_serves_fewer(tmp_path):
    base = {"cache": tmp_path, "shard_size": 4, "progress": False}
    collect(tiny(), TEXTS, layers=[0, 1, 3], **base)
    next(iter(sorted(tmp_path.glob("shard-*")))).unlink()  # as if it had been interrupted
    some = collect(tiny(), TEXTS, layers=[1], **base)
    assert some.layers == (1,) and list(some) == [1]
    torch.testing.assert_close(some[1], collect(tiny(), TEXTS, layers=[1], progress=False)[1])
    files = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    same(collect(tiny(), TEXTS, layers=[0, 1, 3], **base), collect(tiny(), TEXTS, layers=[0, 1, 3], progress=False))
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == files  # nothing was read again


def test_a_run_goes_on_with_other_sizes_and_no_text_twice(tmp_path):
    model = build(seed=1)
    first = blocks(model)[0]
    with counted(first, at=3, error=KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        collect(model, TEXTS, cache=tmp_path, batch_size=2, shard_size=2, progress=False)
    with counted(first) as counts:
        found = collect(model, TEXTS, cache=tmp_path, batch_size=1, shard_size=3, progress=False)
    assert counts == [len(TEXTS) - 4]
    same(found, collect(model, TEXTS, progress=False), lambda a, b: torch.allclose(a, b, atol=1e-6))
    before, shards = found[0], sorted(tmp_path.glob("shard-*"))
    shutil.copy(shards[0], tmp_path / "shard-again.safetensors")  # as if two processes had been at it
    assert torch.equal(found[0], before)
    for shard in (shards[0], tmp_path / "shard-again.safetensors"):
        shard.unlink()
    with pytest.raises(ValueError, match=f"of {len(TEXTS)} texts, in dtypes.*delete the folder and collect"):
        found[0]


def test_functions_that_choose_the_same_tokens_share_a_cache(tmp_path):
    model = tiny()
    collect(model, TEXTS, position=lambda ids: len(ids) - 1, cache=tmp_path, progress=False)
    with counted(blocks(model)[0]) as counts:
        found = collect(model, TEXTS, position=lambda ids: -1, cache=tmp_path, progress=False)
    assert counts == [0]
    same(found, collect(model, TEXTS, progress=False))
    with pytest.raises(ValueError, match="was made with another position"):
        collect(model, TEXTS, position=lambda ids: 0, cache=tmp_path, progress=False)


def test_processes_share_a_new_cache(tmp_path):
    code = """
import os, sys, traceback
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import tiny
from expertsteer_nnsight import collect, example
model, texts = tiny.build(), example("general")[:60]
for n in range(4):
    out, into = os.pipe()
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                found = collect(model, texts, cache=f"{sys.argv[1]}/{n}", shard_size=2, batch_size=2, progress=False)
                os.write(into, f"{float(found[1].sum())!r} ".encode())
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    codes = [os.waitpid(child, 0)[1] for child in children]
    os.close(into)
    print(*codes, os.read(out, 1000).decode())
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(HELPERS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rounds = [line.split() for line in done.stdout.splitlines()]
    assert len(rounds) == 4
    for codes, sums in ((line[:2], line[2:]) for line in rounds):
        assert codes == ["0", "0"] and len(set(sums)) == 1 and len(sums) == 2, done.stderr


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="is not empty and holds no activations: pass an empty or a new one"):
        collect(tiny(), TEXTS, cache=tmp_path, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_that_was_cut_off_before_its_manifest_is_no_foreign_folder(tmp_path):
    (tmp_path / "manifest.77.partial").write_text('{"mod')
    found = collect(tiny(), TEXTS, cache=tmp_path, progress=False)
    same(found, collect(tiny(), TEXTS, progress=False))
    assert "texts" in json.loads((tmp_path / "manifest.json").read_text())


def test_memory_does_not_grow_with_the_texts_where_there_is_a_cache(tmp_path):
    model, peaks = build(seed=2), []

    def measure(*_):
        gc.collect()  # finished traces are cycles
        peaks[-1] = max(peaks[-1], sum(o.numel() for o in gc.get_objects() if type(o) is Tensor))

    gc.freeze()  # look at what is made from here on only
    handle = blocks(model)[0].register_forward_pre_hook(watching(measure))
    try:
        for n in (16, 64):
            for cache in (tmp_path / str(n), None):
                peaks.append(0)
                collect(model, ["a dog"] * n, batch_size=4, shard_size=8, cache=cache, progress=False)
    finally:
        handle.remove()
        gc.unfreeze()
    few_cached, few, many_cached, many = peaks
    assert many_cached - few_cached < 32  # numbers, not bytes: less than one state
    assert many - few > 40 * 32 * 4  # the measure sees what is kept in memory


def test_states_are_cut_and_joined(tmp_path):
    model = tiny("llama")
    a = collect(model, ["a dog", "the test"], cache=tmp_path, progress=False)
    b = collect(model, ["hello", "this", "world"], layers=[1, 2], progress=False)
    both = Activations.joined([a, b])
    assert both.layers == (1, 2) and both.n_texts == 5 and both.shards is None
    assert torch.equal(both[1], torch.cat([a[1], b[1]]))
    some = both.take([4, 0], layers=[2])
    assert torch.equal(some[2], torch.stack([b[2][2], a[2][0]])) and some.layers == (2,)
    assert some.norm(2) == float(torch.tensor([b._read("norm.2")[2], a._read("norm.2")[0]]).median())
    with pytest.raises(ValueError, match="one model"):
        Activations.joined([a, collect(tiny("gpt2"), ["a"], progress=False)])
    with pytest.raises(ValueError, match="no layer in common"):
        Activations.joined([b, collect(model, ["a"], layers=[0], progress=False)])


@pytest.mark.parametrize("bos", [False, True])
def test_states_at_further_ends_are_those_of_the_prefixes(bos, tmp_path):
    """A causal model has read the same at an end within a text as at the end of the shorter text."""
    other = tiny("gpt2", not bos)
    model = tiny("llama", bos)
    texts = ["the quick brown fox jumps over the lazy dog.", "hello world, this is a test", "a dog"]
    ends = shared_ends(texts, [(m.tokenizer, len(prefix_ids(m.tokenizer))) for m in (model, other)], 3)
    assert ends == shared_ends(texts, [(m.tokenizer, len(prefix_ids(m.tokenizer))) for m in (model, other)], 3)
    assert max(map(len, ends)) == 3 and all(e == sorted(set(e)) for e in ends)
    assert all(x < len(t) for e, t in zip(ends, texts, strict=True) for x in e)
    found = collect(model, texts, ends=ends, batch_size=2, progress=False)
    prefixes = [t[:e] for t, mine in zip(texts, ends, strict=True) for e in (*mine, len(t))]
    alone = collect(model, prefixes, progress=False)
    assert found.n_texts == len(prefixes) and found.text_of == tuple(
        i for i, e in enumerate(ends) for _ in range(len(e) + 1)
    )
    for layer in found:
        torch.testing.assert_close(found[layer], alone[layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            found.whole[layer], collect(model, texts, progress=False)[layer], rtol=1e-4, atol=1e-4
        )
    assert found.whole.text_of is None and found.whole.n_texts == 3
    # from disk, and after an interruption
    kept = collect(model, texts, ends=ends, cache=tmp_path / "c", shard_size=1, batch_size=1, progress=False)
    next((tmp_path / "c").glob("shard-*")).unlink()
    again = collect(model, texts, ends=ends, cache=tmp_path / "c", progress=False)
    for layer in found:
        torch.testing.assert_close(again[layer], found[layer], rtol=1e-4, atol=1e-4)
    assert kept.text_of == again.text_of == found.text_of
    with pytest.raises(ValueError, match="another ends"):
        collect(model, texts, cache=tmp_path / "c", progress=False)
    both = Activations.joined([found, collect(model, ["a dog"], progress=False)])
    assert both.text_of == (*found.text_of, 3) and both.whole.n_texts == 4


def test_ends_that_are_none_are_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match="No token of this model ends at character 2"):
        collect(model, ["the quick"], ends=[[2]], progress=False)
    with pytest.raises(ValueError, match='not with "mean"'):
        collect(model, ["the quick"], position="mean", ends=[[3]], progress=False)
    with pytest.raises(ValueError, match="for 2 texts"):
        collect(model, ["the quick"], ends=[[3], []], progress=False)
    assert shared_ends([[{"role": "user", "content": "the quick fox"}]], [(model.tokenizer, 0)], 2) == [[]]


def test_a_slow_tokenizer_gives_no_ends():
    class Slow:
        is_fast = False

    with pytest.warns(UserWarning, match="no character offsets"):
        assert shared_ends(["a dog"], [(Slow(), 0)], 2) == [[]]
