"""lm-evaluation-harness on traces: the numbers of its own `hf` model, unsteered and steered by a plain hook."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import nnsight
import pytest
import tiny
import torch
from harness import CONTEXTS, ENDS, choices, close, ours, plain, plan_for, requests
from lm_eval.models.huggingface import HFLM
from planted import GENERAL

import expertsteer_nnsight as es
from expertsteer_nnsight.interop.lm_eval import SteeredLM
from expertsteer_nnsight.measure import continuations


@pytest.fixture(params=[1, 10**9], ids=["shared contexts", "no shared contexts"])
def worth(request, monkeypatch):
    monkeypatch.setitem(continuations.WORTH, "cpu", request.param)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_unsteered_numbers_are_those_of_hf(arch, worth):
    model = tiny.build(arch, bos=arch in ("gemma3", "llama"))
    hf, mine = plain(model), ours(model)
    asked = choices()
    close(mine.loglikelihood(asked, disable_tqdm=True), hf.loglikelihood(asked, disable_tqdm=True))
    texts = requests("loglikelihood_rolling", [(" ".join(CONTEXTS),), ("a dog",), (" ".join(CONTEXTS * 6),)])
    found, known = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (mine, hf))
    assert found == pytest.approx(known, abs=1e-3)
    until = requests("generate_until", [(c or "a", {"until": [" the"], "max_gen_toks": 12}) for c in CONTEXTS])
    assert mine.generate_until(until, disable_tqdm=True) == hf.generate_until(until, disable_tqdm=True)


class Border:
    """A hook's edit of the positions that a plan's `where` names, in `hf`'s right-padded batches."""

    def __init__(self, vector, lm):
        self.vector, self.lm = vector, lm

    def __call__(self, h, call):
        v = self.vector
        new = h + v.strength * v.residual_norm * v.direction / v.direction.norm()
        if v.where == "all":
            return new
        columns = torch.arange(h.shape[1])
        borders = torch.tensor(self.lm.borders[call])[:, None]
        inside = columns < borders - 1 if v.where == "prompt" else columns >= borders - 1 + v.from_step
        return torch.where(inside[..., None], new, h)


class Bordered(HFLM):
    """`hf` that remembers where the continuations of each batch begin; one request a row."""

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        order = sorted(requests, key=lambda r: (-len(r[1] + r[2]), tuple(r[1] + r[2])))
        self.borders = [[len(r[1]) for r in order[i : i + 4]] for i in range(0, len(order), 4)]
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


WHERE = [{}, {"where": "prompt"}, {"where": "completion"}, {"where": "completion", "from_step": 2}]


@pytest.mark.parametrize("more", WHERE, ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "mixtral"])
def test_steered_numbers_are_those_of_a_hook_inside_hf(arch, more, worth):
    model = tiny.build(arch)
    plan = plan_for(model, **more)
    # distinct: equal requests would lie in any order
    asked = requests("loglikelihood", sorted({r.args for r in choices(60)}))
    hf = Bordered(model._module, tokenizer=model.tokenizer, batch_size=4, max_length=100, logits_cache=False)
    unsteered = hf.loglikelihood(asked, disable_tqdm=True)
    edits = {v.layer: Border(v, hf) for v in plan.vectors}
    with tiny.hooks(es.Residual(model).layers._module, edits):
        known = hf.loglikelihood(asked, disable_tqdm=True)
    close(ours(model, plan).loglikelihood(asked, disable_tqdm=True), known)
    assert max(abs(a[0] - b[0]) for a, b in zip(known, unsteered, strict=True)) > 0.1


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_is_too_long_is_cut_on_the_left_as_in_hf(arch, worth):
    model = tiny.build(arch)
    rows = [(" ".join(CONTEXTS * k), end) for k in (1, 2, 3) for end in ENDS]
    hf = HFLM(model._module, tokenizer=model.tokenizer, batch_size=3, max_length=24)
    mine = SteeredLM(model, batch_size=3, max_length=24)
    asked = requests("loglikelihood", rows)
    close(mine.loglikelihood(asked, disable_tqdm=True), hf.loglikelihood(asked, disable_tqdm=True))
    with pytest.raises(ValueError, match=r"A continuation has .* tokens, more than the model's 4"):
        SteeredLM(model, max_length=4).loglikelihood(requests("loglikelihood", [("a", CONTEXTS[1])]), disable_tqdm=True)


def test_shared_contexts_take_fewer_tokens_through_the_model(monkeypatch):
    model = tiny.build("llama")
    asked = requests("loglikelihood", [(" ".join(CONTEXTS), end) for end in ENDS])
    tokens = {}
    for worth in (1, 10**9):
        monkeypatch.setitem(continuations.WORTH, "cpu", worth)
        mine, seen = ours(model), []
        mine.loglikelihood(asked, disable_tqdm=True)  # where the way is tried once
        with tiny.hooks(
            es.Residual(model).layers._module, {0: lambda h, _, seen=seen: seen.append(h.shape[:2].numel()) or h}
        ):
            mine.loglikelihood(asked, disable_tqdm=True)
        tokens[worth] = sum(seen)
    assert tokens[1] < tokens[10**9] / 2


def test_a_model_whose_cache_cannot_be_shared_is_scored_without(monkeypatch):
    monkeypatch.setitem(continuations.WORTH, "cpu", 1)
    model = tiny.build("llama")
    known = ours(model, share_contexts=False).loglikelihood(choices(), disable_tqdm=True)
    context = continuations._context

    def spoilt(*args):
        cache = context(*args)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys * 3, layer.values * 3
        return cache

    monkeypatch.setattr(continuations, "_context", spoilt)
    mine = ours(model)
    close(mine.loglikelihood(choices(), disable_tqdm=True), known)
    assert mine._score.share is False
    monkeypatch.setattr(continuations, "_context", lambda *args: object())
    close(ours(model).loglikelihood(choices(), disable_tqdm=True), known)


def test_steered_generation_is_that_of_a_hook_inside_hf():
    model = tiny.build("llama")
    plan = plan_for(model)
    until = requests("generate_until", [(c or "a", {"until": [" the"], "max_gen_toks": 12}) for c in CONTEXTS])
    hf = plain(model)
    unsteered = hf.generate_until(until, disable_tqdm=True)
    with tiny.hooks(es.Residual(model).layers._module, {v.layer: Border(v, hf) for v in plan.vectors}):
        known = hf.generate_until(until, disable_tqdm=True)
    assert ours(model, plan).generate_until(until, disable_tqdm=True) == known != unsteered


def test_sampling_options_are_passed_on():
    model = tiny.build("llama")
    how = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_k": 5}
    until, found = requests("generate_until", [("a dog", how)]), []
    for lm in (ours(model), plain(model)):
        torch.manual_seed(3)
        found.append(lm.generate_until(until, disable_tqdm=True))
    assert found[0] == found[1]


def test_no_requests_give_no_answers():
    assert SteeredLM(tiny.build("llama"), batch_size="auto").loglikelihood([], disable_tqdm=True) == []


def test_the_largest_batch_can_be_found():
    model = tiny.build("llama")
    auto = SteeredLM(model, batch_size="auto", max_batch_size=16, max_length=100)
    close(auto.loglikelihood(choices(), disable_tqdm=True), plain(model).loglikelihood(choices(), disable_tqdm=True))


def test_a_plan_from_a_file_and_its_dose(tmp_path):
    model = tiny.build("llama")
    plan = plan_for(model)
    file = plan.save(tmp_path / "plan.safetensors")
    info = ours(model, file).get_model_info()
    assert info["plan_layers"] == [1, 2] and info["plan"] == ours(model, plan).get_model_info()["plan"]
    assert ours(model).get_model_info()["plan"] is None
    with pytest.raises(ValueError, match="Dose 2 was asked for, but the plan is not calibrated"):
        ours(model, file, dose=2)
    calibrated = es.calibrate(plan, model, tiny.PROMPTS, kl_budget=0.05)
    file = (3 * calibrated).save(tmp_path / "calibrated.safetensors")
    found = ours(model, str(file), dose=2).loglikelihood(choices(), disable_tqdm=True)
    close(found, ours(model, 2 * calibrated).loglikelihood(choices(), disable_tqdm=True))
    assert found != ours(model, file).loglikelihood(choices(), disable_tqdm=True)
    assert ours(model, file).get_model_info()["plan_dose"] == pytest.approx(3)


def test_a_request_cache_serves_one_plan(tmp_path):
    from lm_eval.api.model import CachingLM

    model, file = tiny.build("llama"), str(tmp_path / "cache.db")
    plan = plan_for(model)
    found = CachingLM(ours(model, plan), file).loglikelihood(choices())
    again = ours(model, plan)
    again._score = None  # nothing is left to score
    assert [tuple(x) for x in CachingLM(again, file).loglikelihood(choices())] == found
    for other in (None, 2 * plan):
        with pytest.raises(ValueError, match=r"This request cache was made with .*: name another file"):
            CachingLM(ours(model, other), file)
    # a model of the same name and shape with other weights
    with pytest.raises(ValueError, match=r"This request cache was made with .*: name another file"):
        CachingLM(ours(tiny.build("llama", seed=1), plan), file)


def test_what_cannot_be_done_is_said():
    model = tiny.build("llama")
    with pytest.raises(ValueError, match="takes no peft"):
        SteeredLM(model, peft="somewhere")
    with pytest.raises(ValueError, match="name a number for a remote model"):
        SteeredLM(model, remote="http://localhost:1", batch_size="auto")
    with pytest.raises(ValueError, match="width 16"):
        SteeredLM(model, es.SteeringPlan([es.SteeringVector(1, torch.ones(16), 1.0)]))
    rows = es.SteeringPlan([es.SteeringVector(1, torch.ones(32), torch.tensor([1.0, 2.0]))])
    with pytest.raises(ValueError, match="a strength or a vector for each row, and lm-eval makes its own batches"):
        SteeredLM(model, rows)
    with pytest.raises(ValueError, match="add_bos_token=True puts a token before each text"):
        SteeredLM(model, plan_for(model), add_bos_token=True)
    SteeredLM(model, plan_for(model).with_(skip_special=False), add_bos_token=True)
    hidden = "import sys; sys.modules['lm_eval'] = None; import expertsteer_nnsight.interop.lm_eval"
    told = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False).stderr
    assert "needs the extra: pip install" in told


def test_the_command_line_runs_a_task_steered_and_unsteered(tmp_path):
    model = tiny.build("llama")
    model._module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    plan = es.SteeringPlan(plan_for(model).vectors).save(tmp_path / "plan.safetensors")
    (tmp_path / "tasks").mkdir()
    rows = [{"question": c, "choices": ENDS[k : k + 3], "answer": k % 3} for c in CONTEXTS if c for k in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "small.yaml").write_text(
        f"""
task: small
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
"""
    )
    found = {}
    kinds = {"hf": ("hf", ""), "expertsteer": ("expertsteer", ""), "steered": ("expertsteer", f",plan={plan}")}
    commands = {
        name: [
            *(
                "--model",
                kind,
                "--model_args",
                f"pretrained={tmp_path / 'model'},dtype=float32{more}",
                "--device",
                "cpu",
            ),
            *("--tasks", "small", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / name)),
            *("--log_samples", "--batch_size", "4"),
        ]
        for name, (kind, more) in kinds.items()
    }
    # as `python -m` runs it, in one process for all three: its imports take longest
    code = f"""
import runpy, sys
from pathlib import Path
import lm_eval
from lm_eval.tasks._index import TaskIndex
build, own = TaskIndex.build, Path(lm_eval.__file__).parent
def few(paths, **options):  # lm-eval's own tasks are thousands of files, and take longer than all else
    return build([path for path in paths if not Path(path).is_relative_to(own)], **options)
TaskIndex.build = staticmethod(few)
for command in {list(commands.values())!r}:
    sys.argv[1:] = command
    runpy.run_module("expertsteer_nnsight.interop.lm_eval", run_name="__main__", alter_sys=True)
"""
    quick = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }  # where there is no network the hub is tried for long
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=quick)
    assert ran.returncode == 0, ran.stderr
    for name in commands:
        (samples,) = (tmp_path / name).rglob("samples_small_*.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        found[name] = [float(x[0]) for line in lines for x in line["filtered_resps"]]
    assert found["expertsteer"] == pytest.approx(found["hf"], abs=1e-4)
    assert found["steered"] != pytest.approx(found["hf"], abs=0.1)


@pytest.mark.parametrize(
    "settings", [{}, {"follow": True}, {"where": "shared_ends", "follow": True, "op": "innovation"}], ids=str
)
def test_a_live_expert_has_the_numbers_of_its_effect(settings, worth, tmp_path):
    expert, target = tiny.tiny("gemma3", bos=True), tiny.tiny("llama")
    live = es.LiveExpert(layers=[(2, 1)], **settings).fit(expert, target, GENERAL, progress=False)
    options = [" a", " b", " the lazy dog.", " the lazy fox", " world, this"]
    questions = es.MultipleChoice([(c + " and", options, 0) for c in CONTEXTS if c], per="text")
    asked = requests(
        "loglikelihood", [(prompt, option) for prompt, options, _ in questions.items for option in options]
    )
    expected = torch.cat([x[1] for x in questions.options(target, [live])]).tolist()
    plainly = torch.cat([x[0] for x in questions.options(target, [])]).tolist()
    lm = ours(target, live=live)
    found = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    assert (
        found == pytest.approx(expected, abs=1e-3)
        and max(abs(a - b) for a, b in zip(found, plainly, strict=True)) > 0.01
    )
    # spaces at a context's end are the continuation's
    rows = [(prompt + " ", option.strip()) for prompt, options, _ in questions.items for option in options]
    moved = lm.loglikelihood(requests("loglikelihood", rows), disable_tqdm=True)
    assert [value for value, _ in moved] == pytest.approx(expected, abs=1e-3)
    prompts = [c for c in CONTEXTS if c]
    until = requests("generate_until", [(c, {"until": ["\n\n"], "max_gen_toks": 8}) for c in prompts])
    said = [text.split("\n\n")[0] for text in live.generate(prompts, 8)]
    assert lm.generate_until(until, disable_tqdm=True) == said
    # from its file
    again = ours(target, live=live.save(tmp_path / "live.safetensors"), expert=expert)
    assert [value for value, _ in again.loglikelihood(asked, disable_tqdm=True)] == pytest.approx(expected, abs=1e-3)
    assert again._plan_hash() == lm._plan_hash() != ours(target)._plan_hash()
    assert lm.get_model_info()["live_layers"] == [[2, 1]]


def test_what_a_live_expert_cannot_read_is_refused(tmp_path):
    expert, target = tiny.tiny("gemma3", bos=True), tiny.tiny("llama")
    live = es.LiveExpert(layers=[(2, 1)], follow=True).fit(expert, target, GENERAL, progress=False)
    with pytest.raises(ValueError, match="only one of them can steer"):
        ours(target, plan_for(target), live=live)
    with pytest.raises(ValueError, match=r"cannot steer the model.*width 32 against 64"):
        ours(tiny.build("llama", hidden_size=64), live=live)
    with pytest.raises(ValueError, match="does not name its expert"):
        ours(target, live=live.save(tmp_path / "live.safetensors"))
    lm = ours(target, live=live)
    with pytest.raises(ValueError, match="a request has no context"):
        lm.loglikelihood(requests("loglikelihood", [("", " a dog")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="a request has no context"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("a dog",)]), disable_tqdm=True)
    with pytest.raises(ValueError, match="or cuts it at 100"):
        lm.loglikelihood(requests("loglikelihood", [(" ".join(CONTEXTS * 6), " a dog")]), disable_tqdm=True)


def test_a_live_expert_reads_a_chat_in_its_own_template():
    expert, target = tiny.tiny("gemma3", bos=True), tiny.tiny("llama")
    live = es.LiveExpert(layers=[(2, 1)]).fit(expert, target, GENERAL, progress=False)
    lm, chats = ours(target, live=live), [[{"role": "user", "content": c}] for c in CONTEXTS if c]
    written = [lm.apply_chat_template(chat) for chat in chats]
    asked = requests("loglikelihood", [(text, option) for text in written for option in (" a dog", " the fox")])
    found = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    for (text, option), value in zip([a.args for a in asked], found, strict=True):
        chat = chats[written.index(text)]
        # the space at the template's end counts to the continuation
        whole, prompt = (
            target.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text + option, text.rstrip())
        )
        ids, border = torch.tensor([whole]), len(prompt)
        plan = es.SteeringPlan(live.plan([chat]).vectors)  # the expert has read the messages
        with torch.no_grad(), target.trace(ids):
            plan.apply(target, prompt_lengths=[border])
            logits = nnsight.save(target.output.logits[0].log_softmax(-1))
        new = ids[0, border:]
        assert value == pytest.approx(float(logits[border - 1 : -1].gather(1, new[:, None]).sum()), abs=1e-3)
    with pytest.raises(ValueError, match=r"begins the answer itself \(gen_prefix\)"):
        lm.apply_chat_template([*chats[0], {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    following = es.LiveExpert(layers=[(2, 1)], follow=True).fit(expert, target, GENERAL, progress=False)
    lm = ours(target, live=following)
    text = lm.apply_chat_template(chats[0])
    with pytest.raises(ValueError, match="reads the prompt alone"):
        lm.loglikelihood(requests("loglikelihood", [(text, " a dog")]), disable_tqdm=True)


def test_a_gate_reads_a_chat_once_with_its_special_tokens():
    expert, target = tiny.tiny("llama"), tiny.tiny("gemma3", bos=True)  # whose template begins with what it prepends
    live = es.LiveExpert(layers=[(2, 1)], gate=0.0).fit(expert, target, GENERAL, progress=False)
    chats = [[{"role": "user", "content": c}] for c in CONTEXTS if c]
    gaps = live._setting().read.gaps(chats, chats)
    live.gate_ = float(gaps.double().quantile(0.5))
    heard = (gaps <= live.gate_).tolist()
    assert len(set(heard)) == 2

    def said(made):
        lm = ours(target, live=made)
        asked = [(lm.apply_chat_template(chat), " a dog") for chat in chats]
        found = [value for value, _ in lm.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)]
        until = [(text, {"until": ["</s>"], "max_gen_toks": 4}) for text, _ in asked]
        return found, lm.generate_until(requests("generate_until", until), disable_tqdm=True)

    gated = said(live)
    live.gate_ = None
    free, unsteered = said(live), said(None)
    for mine, steered, alone in zip(gated, free, unsteered, strict=True):
        expected = [s if on else a for on, s, a in zip(heard, steered, alone, strict=True)]
        assert mine == (expected if isinstance(mine[0], str) else pytest.approx(expected, abs=1e-3))
    assert free[0] != pytest.approx(unsteered[0], abs=1e-2)


def test_plans_that_differ_in_what_they_predict_differ_in_a_request_cache():
    model, g = tiny.tiny("llama"), torch.Generator().manual_seed(1)
    hashes = set()
    for _ in range(2):
        vector = es.SteeringVector(1, torch.ones(32), op="innovation", predictor=torch.randn(33, 32, generator=g))
        hashes.add(ours(model, es.SteeringPlan([vector]))._plan_hash())
    assert len(hashes) == 2
