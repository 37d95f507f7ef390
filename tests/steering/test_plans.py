"""Plans: algebra, files, refusals, and the positions they steer."""

from __future__ import annotations

import json
import os
import pickle

import nnsight
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnsight.modeling.transformers import TransformersModel
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import PROMPTS, build, hooks, tiny

from expertsteer_nnsight.models.identity import ModelIdentity
from expertsteer_nnsight.models.positions import Positions, prefix_ids
from expertsteer_nnsight.models.prompts import Prompts
from expertsteer_nnsight.models.residual import Residual
from expertsteer_nnsight.steering import header
from expertsteer_nnsight.steering.plan import SteeringPlan
from expertsteer_nnsight.steering.plan_file import read_header
from expertsteer_nnsight.steering.vectors import OPS, SteeringVector


def direction(seed=0, rows=None):
    shape = (32,) if rows is None else (rows, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vector(layer=1, seed=0, **kwargs):
    return SteeringVector(layer, direction(seed, kwargs.pop("rows", None)), **{"strength": 2.0, **kwargs})


def single(v, target=None):
    return SteeringPlan([v], target)


def logits(model, prompts, plan=None, **kwargs):
    with torch.no_grad(), model.trace(prompts):
        if plan is not None:
            plan.apply(model, **kwargs)
        out = nnsight.save(model.output.logits[:, -1])
    return out


def tokens(model, prompts, n=8, **kwargs):
    with (
        torch.no_grad(),
        model.generate(prompts, max_new_tokens=n, do_sample=False, pad_token_id=0, **kwargs) as tracer,
    ):
        ids = nnsight.save(tracer.result)
    return ids


# -- which positions -----------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    left=st.booleans(),
    prefix=st.integers(0, 1),
    step=st.integers(0, 3),
    cached=st.booleans(),
)
def test_prompt_and_completion_part_the_real_positions(lengths, left, prefix, step, cached):
    width = max(lengths)
    if step > 0 and cached:
        real = torch.ones(len(lengths), 1, dtype=torch.bool)
        index = torch.tensor(lengths)[:, None] + step - 1
        past = width + step - 1
    else:
        cells = torch.arange(width + step)
        lengths = [n + step for n in lengths]
        real = torch.stack([(cells >= width + step - n) if left else (cells < n) for n in lengths])
        index, past = (real.long().cumsum(1) - 1), 0
    positions = Positions(real, real & (index < prefix), index, step, past)
    everything = positions.mask("all", skip_special=False)
    prompt, completion = (positions.mask(w, skip_special=False) for w in ("prompt", "completion"))
    assert torch.equal(everything, real)
    assert torch.equal(prompt | completion, real) and not (prompt & completion).any()
    assert (completion.sum(1) == (1 if step > 0 and cached else step + 1)).all()
    later = positions.mask("completion", from_step=1, skip_special=False)
    assert torch.equal(
        later, completion & (index > index.amax(1, keepdim=True) - step) if not cached or step == 0 else completion
    )
    assert not (positions.mask("all") & positions.prefix).any()


def test_special_tokens_that_the_tokenizer_prepends_are_left_alone():
    model = tiny("llama", bos=True)
    assert prefix_ids(model.tokenizer) == (1,) and prefix_ids(tiny("llama").tokenizer) == ()
    plan = single(vector(1))
    changed = {}
    for name, one in {"default": plan, "asked": plan.with_(skip_special=False), "none": None}.items():
        with torch.no_grad(), model.trace(PROMPTS):
            if one is not None:
                one.apply(model)
            changed[name] = nnsight.save(Residual(model).read(1))
    mask = model.tokenizer(PROMPTS, return_tensors="pt", padding=True)["attention_mask"].bool()
    first = mask & (mask.cumsum(1) == 1)
    default = (changed["default"] - changed["none"]).abs().amax(-1) > 0
    assert torch.equal(default, mask & ~first)
    assert ((changed["asked"] - changed["none"]).abs().amax(-1) > 0)[first].all()


def test_a_chat_keeps_its_own_bos_and_later_ones_are_steered():
    model = tiny("llama", bos=True)
    ids = torch.tensor([[1, 20, 1, 21]])  # an id equal to the prepended one, in the middle of the text
    with torch.no_grad(), model.trace(ids):
        positions = Positions.read(model)
        mask = nnsight.save(positions.mask())
    assert mask.tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma3"])
def test_generation_without_a_cache_is_steered_alike(arch):
    model = tiny(arch)
    for where in ("all", "prompt", "completion"):
        steered = SteeringPlan((vector(1, where=where), vector(2, 1, where=where))).attach(model)
        assert torch.equal(tokens(steered, PROMPTS), tokens(steered, PROMPTS, use_cache=False))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_generation_with_a_static_cache_is_steered_alike(arch):
    model = tiny(arch, bos=True)
    for where in ("all", "prompt", "completion"):
        steered = single(vector(1, where=where)).attach(model)
        assert torch.equal(tokens(steered, PROMPTS), tokens(steered, PROMPTS, cache_implementation="static"))


def test_prompt_lengths_mark_the_border_in_a_teacher_forced_trace():
    model = tiny("llama")
    for where, from_step in (("prompt", 0), ("completion", 0), ("completion", 2)):
        plan = single(vector(1, where=where, from_step=from_step, strength=4.0))
        ids = tokens(plan.attach(model), PROMPTS[:1])
        length = len(model.tokenizer(PROMPTS[0])["input_ids"])
        with torch.no_grad(), model.trace(ids):
            plan.apply(model, prompt_lengths=[length])
            forced = nnsight.save(model.output.logits[0, length - 1 : -1].argmax(-1))
        assert torch.equal(forced, ids[0, length:])
    with pytest.raises(ValueError, match="one number a row: 2 rows"), torch.no_grad(), model.trace(PROMPTS[:2]):
        plan.apply(model, prompt_lengths=[3])


def test_from_step_leaves_the_first_tokens():
    model = tiny("llama")
    plain = tokens(model, PROMPTS)
    ids = tokens(single(vector(1, where="completion", from_step=3, strength=30.0)).attach(model), PROMPTS)
    start = plain.shape[1] - 8
    assert torch.equal(ids[:, : start + 3], plain[:, : start + 3]) and not torch.equal(ids, plain)


# -- rows ----------------------------------------------------------------------------------------------------------


def test_per_row_vectors_and_strengths_equal_single_runs():
    model = tiny("llama")
    rows = single(SteeringVector(1, direction(0, 4), torch.tensor([0.0, 1.0, -2.0, 3.0]), 2.0))
    together = logits(model, PROMPTS, rows)
    attached = tokens(rows.attach(model), PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        one = single(SteeringVector(1, direction(0, 4)[i], float(rows.vectors[0].strength[i]), 2.0))
        torch.testing.assert_close(together[i], logits(model, [prompt], one)[0], rtol=1e-4, atol=1e-4)
        assert attached[i, -8:].tolist() == tokens(one.attach(model), [prompt])[0, -8:].tolist()
    with pytest.raises(ValueError, match="for 4 rows, but the batch has 2"):
        logits(model, PROMPTS[:2], rows)


def test_each_invoke_is_steered_by_its_own_plan():
    model = tiny("gpt2")
    plans = [single(vector(1, seed, where="completion")) for seed in (0, 1)]
    with torch.no_grad(), model.generate(max_new_tokens=8, do_sample=False, pad_token_id=0) as tracer:
        for plan, prompts in zip(plans, (PROMPTS[:1], PROMPTS[1:3]), strict=True):
            with tracer.invoke(prompts):
                for _ in tracer.iter[:]:
                    plan.apply(model)
        with tracer.invoke():
            ids = nnsight.save(tracer.result)
    alone = torch.cat(
        [tokens(plans[0].attach(model), PROMPTS[:1])[:, -8:], tokens(plans[1].attach(model), PROMPTS[1:3])[:, -8:]]
    )
    assert torch.equal(ids[:, -8:], alone)


def test_beams_are_steered_where_rows_are_alike_and_refused_where_not():
    model = tiny("llama")
    plan = single(vector(1, where="completion"))
    enc = model.tokenizer(PROMPTS[:1], return_tensors="pt")

    def edit(h, call):
        new = plan.vectors[0].edit(h)
        return new if call > 0 else torch.cat([h[:, :-1], new[:, -1:]], 1)

    with hooks(Residual(model).layers._module, {1: edit}), torch.no_grad():
        expected = model._module.generate(**enc, max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens(plan.attach(model), PROMPTS[:1], num_beams=3), expected)
    rows = single(SteeringVector(1, direction(0, 2), 2.0))
    with pytest.raises(ValueError, match="beams"):
        tokens(rows.attach(model), PROMPTS[:2], num_beams=3)
    with (
        pytest.raises(ValueError, match="beams"),
        torch.no_grad(),
        model.generate(max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0) as tracer,
    ):
        for prompt in PROMPTS[:2]:
            with tracer.invoke(prompt):
                for _ in tracer.iter[:]:
                    plan.apply(model)


def test_a_prompt_in_chunks_is_refused_unless_every_position_is_steered():
    model = tiny("llama")
    with pytest.raises(ValueError, match="chunked prefill"):
        tokens(single(vector(1, where="prompt")).attach(model), PROMPTS[1:2], prefill_chunk_size=4)
    length = len(model.tokenizer(PROMPTS[1])["input_ids"])
    with pytest.raises(ValueError, match="chunked prefill"):  # the last chunk holds one token, like a decode step
        tokens(single(vector(1, where="completion")).attach(model), PROMPTS[1:2], prefill_chunk_size=length - 1)
    everywhere = single(vector(1)).attach(model)
    assert torch.equal(tokens(everywhere, PROMPTS[1:2], prefill_chunk_size=4), tokens(everywhere, PROMPTS[1:2]))


# -- order ---------------------------------------------------------------------------------------------------------


def test_applying_too_late_says_so_in_the_first_step_and_in_later_ones():
    model, blocks = tiny("llama"), Residual(tiny("llama")).layers
    plan = single(vector(1))
    with pytest.raises(RuntimeError, match="layer 1, which the model has already run past in step 0"), torch.no_grad():
        with model.trace(PROMPTS):
            nnsight.save(blocks[2].output)
            plan.apply(model)
    with pytest.raises(RuntimeError, match="run past in step 2"), torch.no_grad():
        with model.generate(max_new_tokens=5, do_sample=False, pad_token_id=0) as tracer:
            with tracer.invoke(PROMPTS):
                for step in tracer.iter[:]:
                    if step == 2:
                        nnsight.save(blocks[2].output)
                    plan.apply(model)
    with pytest.raises(RuntimeError, match="before every layer"), torch.no_grad():
        with model.trace(PROMPTS):
            nnsight.save(blocks[0].output)
            plan.with_(where="prompt").apply(model)


def test_two_plans_are_merged_with_plus():
    model = tiny("llama")
    late, early = single(vector(2, 0)), single(vector(1, 1))
    with pytest.raises(RuntimeError, match=r"merge plans with \+"), torch.no_grad(), model.trace(PROMPTS):
        late.apply(model)
        early.apply(model)
    both = late + early
    assert both.layers == (1, 2)
    with torch.no_grad(), model.trace(PROMPTS):
        early.apply(model)
        late.apply(model)
        expected = nnsight.save(model.output.logits[:, -1])
    torch.testing.assert_close(logits(model, PROMPTS, both), expected)
    torch.testing.assert_close(logits(model, PROMPTS, both + -both), logits(model, PROMPTS), rtol=1e-4, atol=1e-4)


def test_positions_read_first_allow_reading_layers_before_the_plan():
    model = tiny("llama")
    plan = single(vector(2, where="completion"))
    with torch.no_grad(), model.trace(PROMPTS):
        positions = Positions.read(model)
        early = nnsight.save(Residual(model).read(0))
        plan.apply(model, positions)
        out = nnsight.save(model.output.logits[:, -1])
    torch.testing.assert_close(out, logits(model, PROMPTS, plan))
    assert early.shape[0] == 4


def test_outside_a_trace():
    with pytest.raises(RuntimeError, match="works inside a trace"):
        single(vector()).apply(tiny("llama"))


def test_statements_of_the_loop_keep_what_they_saved_when_it_ends():
    model, plan = tiny("llama"), single(vector(1))
    with torch.no_grad(), model.generate(max_new_tokens=3, do_sample=False, pad_token_id=0) as tracer:
        with tracer.invoke(PROMPTS):
            seen = nnsight.save([])
            for step in tracer.iter[:]:
                plan.apply(model)
                seen.append(step)
    assert seen == [0, 1, 2]


# -- composition ---------------------------------------------------------------------------------------------------


def test_an_attached_plan_composes_with_later_reads_and_leaves_the_model_as_it_was():
    model = tiny("llama")
    before = logits(model, PROMPTS)
    plan = single(vector(1))
    steered = plan.attach(model)
    with torch.no_grad(), steered.trace(PROMPTS):
        at1 = nnsight.save(Residual(steered).read(1))
        lens = nnsight.save(steered.lm_head(steered.model.norm(Residual(steered).read(3)))[:, -1])
        out = nnsight.save(steered.output.logits[:, -1])
    with torch.no_grad(), model.trace(PROMPTS):
        plain1 = nnsight.save(Residual(model).read(1))
    torch.testing.assert_close(at1, plan.vectors[0].edit(plain1))
    torch.testing.assert_close(lens, out)
    torch.testing.assert_close(out, logits(model, PROMPTS, plan))
    assert torch.equal(logits(model, PROMPTS), before)


def test_strength_zero_changes_no_bit():
    for op in ("add", "project_out"):
        assert torch.equal(
            logits(tiny("llama"), PROMPTS, single(vector(1, op=op, strength=0.0))), logits(tiny("llama"), PROMPTS)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_stream_keeps_its_dtype_and_sums_are_wide(dtype):
    h = torch.randn(2, 3, 32).to(dtype)
    v = SteeringVector(0, direction(), 1e-3)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (h.to(wide) + 1e-3 * v.direction.to(wide)).to(dtype)
    assert v.edit(h).dtype == dtype and torch.equal(v.edit(h), expected)


def test_norms_are_kept_and_components_set():
    h = torch.randn(2, 3, 32)
    kept = SteeringVector(0, direction(), 5.0, op="add_keep_norm").edit(h)
    torch.testing.assert_close(kept.norm(dim=-1), h.norm(dim=-1))
    clamped = SteeringVector(0, direction(), 0.5, 4.0, op="clamp")
    torch.testing.assert_close(clamped.edit(h) @ clamped.direction, torch.full((2, 3), 2.0))
    out = SteeringVector(0, direction(), op="project_out")
    torch.testing.assert_close(out.edit(h) @ out.direction, torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.edit(out.edit(h)), out.edit(h))


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"direction": torch.full((32,), float("nan"))}, "NaN or infinity"),
        ({"direction": torch.zeros(32)}, "zero vector"),
        ({"direction": torch.zeros(2, 2, 2)}, "must be"),
        ({"strength": float("nan")}, "finite"),
        ({"strength": torch.ones(3), "direction": torch.ones(2, 32)}, "2 directions but 3 strengths"),
        ({"residual_norm": 0.0}, "positive"),
        ({"layer": -1}, "count from 0"),
        ({"op": "multiply"}, "choose one of add"),
        ({"where": "everywhere"}, "choose one of all, prompt, completion"),
        ({"from_step": 2}, "completion"),
    ],
)
def test_vectors_that_make_no_sense(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SteeringVector(**{"layer": 1, "direction": direction(), **kwargs})


def test_the_wrong_model_is_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match="at least one"):
        SteeringPlan(())
    with pytest.raises(ValueError, match=r"width 16, but the model's residual stream has 32"):
        single(SteeringVector(1, torch.ones(16))).attach(model)
    with pytest.raises(ValueError, match="layer 7, but the model has layers 0 to 3"):
        single(vector(7)).attach(model)
    known = ModelIdentity.of(model)
    other = ModelIdentity("org/other", None, 32, 4, "llama")
    named = ModelIdentity("org/this", None, 32, 4, "llama")
    single(vector(1), known).attach(model)
    with pytest.raises(ValueError, match="id other against this"):
        other.check(named, "x")
    with pytest.raises(ValueError, match="any_id=True"):
        other.check(named, "x")
    other.check(named, "x", any_id=True)
    with pytest.raises(ValueError, match="number of layers 9 against 4"):
        single(vector(1), ModelIdentity(None, None, 32, 9, "llama")).attach(model)
    with pytest.raises(TypeError, match="wrap the model first"):
        single(vector(1)).attach(model._module)


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_file(tmp_path):
    model = tiny("llama")
    plan = SteeringPlan(
        (
            SteeringVector(1, direction(0, 4), torch.tensor([1.0, 2.0, 3.0, 4.0]), 2.5, "add", "completion", 1, False),
            vector(2, 1, op="clamp"),
        ),
        ModelIdentity.of(model),
        {"expert": {"id": "x"}, "pairs": [{"score": 0.5}]},
    )
    path = plan.save(tmp_path / "deep" / "plan.safetensors")
    loaded = SteeringPlan.load(path)
    assert loaded.target == plan.target and loaded.layers == plan.layers
    assert loaded.info["pairs"] == plan.info["pairs"] and "nnsight" in loaded.info["versions"]
    for a, b in zip(loaded.vectors, plan.vectors, strict=True):
        torch.testing.assert_close(a.direction, b.direction)
        assert (a.op, a.where, a.from_step, a.skip_special, a.residual_norm) == (
            b.op,
            b.where,
            b.from_step,
            b.skip_special,
            b.residual_norm,
        )
    assert torch.equal(tokens(loaded.attach(model), PROMPTS), tokens(plan.attach(model), PROMPTS))
    assert "layer   1" in repr(plan) and "residual norms" in repr(plan)


def test_a_layer_cannot_be_set_for_several_vectors_at_once():
    plan = SteeringPlan([vector(1), vector(2)])
    with pytest.raises(ValueError, match=r"steers layers \[1, 2\]"):
        plan.with_(layer=3)
    assert single(vector(1)).with_(layer=3).layers == (3,)
    assert "total strength 2.83" in repr(plan)


def test_a_changed_plan_drops_its_receipt():
    plan = SteeringPlan([vector()], None, {"expert": {"id": "x"}, "receipt": {"arms": {}}})
    assert (2 * plan).info == plan.with_(where="prompt").info == {"expert": {"id": "x"}}
    assert "expert" not in plan.with_directions([direction(1)]).info


def test_files_that_are_no_plans(tmp_path):
    from safetensors.torch import save_file

    path = single(vector()).save(tmp_path / "plan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        SteeringPlan.load(tmp_path / "cut.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no steering plan"):
        SteeringPlan.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        SteeringPlan.load(tmp_path / "none.safetensors")


def test_a_model_without_a_tokenizer_is_steered_too():
    wrapped = nnsight.NNsight(build("llama")._module)
    plan, ids = single(vector(1)), torch.tensor([[5, 6, 7]])
    with torch.no_grad(), wrapped.trace(ids):
        plan.apply(wrapped)
        out = nnsight.save(wrapped.output.logits)
    with torch.no_grad(), wrapped.trace(ids):
        plain = nnsight.save(wrapped.output.logits)
    assert not torch.equal(out, plain)


def test_a_dose_is_that_of_the_calibration_whatever_the_strength_is_now():
    vectors = [SteeringVector(k, torch.ones(4), s) for k, s in ((1, 0.2), (2, -0.4))]
    plan = SteeringPlan(vectors, None, {"calibration": {"strengths": [0.2, -0.4]}})
    for now in (plan, 3 * plan, 0 * plan):
        found = now.at_dose(0.5)
        assert [v.strength for v in found.vectors] == pytest.approx([0.1, -0.2]) and found.dose == pytest.approx(0.5)
    with pytest.raises(ValueError, match="Dose 2 was asked for, but the plan is not calibrated"):
        SteeringPlan(vectors).at_dose(2)


def test_strengths_a_row_of_several_layers_are_saved(tmp_path):
    plan = SteeringPlan([SteeringVector(k, torch.ones(4)) for k in (1, 2)]).with_(strength=torch.tensor([0.1, -0.1]))
    back = SteeringPlan.load((plan + plan).save(tmp_path / "plan.safetensors"))
    assert len(back.vectors) == 4 and all(torch.equal(v.strength, torch.tensor([0.1, -0.1])) for v in back.vectors)


def test_a_plan_takes_the_model_it_is_for_and_keeps_its_identity(tmp_path):
    model = tiny("llama")
    plan = SteeringPlan([SteeringVector(1, torch.randn(32), 0.5)], target=model)
    assert plan.target == ModelIdentity.of(model) and SteeringPlan.load(plan.save(tmp_path / "p")).target == plan.target
    with pytest.raises(ValueError, match=r"target must be a wrapped model or its ModelIdentity, got 'SmolLM2'"):
        SteeringPlan(plan.vectors, target="SmolLM2")


def test_a_file_is_readable_as_the_umask_says(tmp_path):
    plan = SteeringPlan([SteeringVector(1, torch.randn(32), 0.5)])
    mask = os.umask(0o027)
    try:
        assert plan.save(tmp_path / "p").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)


def test_a_map_that_predicts_nothing_is_told():
    def told(r2, aligner="RidgeAligner()"):
        pairs = [{"expert_layer": 2, "target_layer": 3, "held_out_r2": x, "held_out_auc": 0.8} for x in r2]
        info = {"pairs": pairs, "settings": {"aligner": aligner}}
        return repr(SteeringPlan([SteeringVector(3, torch.randn(32), 0.5)], info=info))

    assert "expert>target: 2>3 (R² 0.31, AUC 0.80), 2>3 (R² 0.01, AUC 0.80)" in told([0.31, 0.01])
    assert "predicts next to nothing" in told([0.04, -0.2]) and "predicts next to nothing" not in told([0.31, 0.01])
    assert "predicts next to nothing" not in told([-0.2], "CovarianceAligner()")  # which predicts no states


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        SteeringPlan([SteeringVector(1, torch.ones(4))]).save(tmp_path)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}*.partial"))


@pytest.mark.parametrize("target", [None, "model"])
def test_a_header_read_alone_is_the_plans_own(target, tmp_path):
    target = ModelIdentity("org/name", "main", 32, 4, "llama") if target else None
    rows = SteeringVector(2, torch.stack([direction(1), direction(2)]), torch.tensor([0.25, -2.0]), 3.0, where="prompt")
    by_direction = SteeringVector(3, torch.stack([direction(1), direction(2)]), 0.5, op="clamp")
    late = SteeringVector(1, direction(3), 0.1, 2.5, "project_out", "completion", 2, False)
    for vectors in ([late, rows, by_direction], [late, vector(2)]):
        plan = SteeringPlan(vectors, target, {"expert": {"id": "x"}, "pairs": [{"held_out_r2": 0.01}]})
        found = read_header(plan.save(tmp_path / "plan.safetensors"))
        loaded = SteeringPlan.load(tmp_path / "plan.safetensors")
        assert found == loaded.header and str(found) == repr(loaded)
        assert found.vectors == plan.header.vectors and found.target == plan.header.target
        assert str(found).startswith(f"SteeringPlan for {target or 'any model'}")
        assert [v.rows for v in found.vectors] == [v.rows for v in plan.vectors]


def test_a_header_knows_what_a_vector_may_be(tmp_path):
    assert tuple(OPS) == header.OPERATIONS
    known = Positions.of(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long), 3)
    found = {where: known.mask(where)[0].tolist() for where in header.WHERE if where != "given"}
    assert len(set(map(str, found.values()))) == 3 and found["last_prompt"] == found["completion"] == [
        False,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="find them with"):
        known.mask("given")
    path = single(vector()).save(tmp_path / "plan.safetensors")
    with safe_open(path, framework="pt") as file:
        meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - no mapping
    plan = json.loads(meta["plan"])
    wrong = {"op": "nonsense", "where": "nowhere", "layer": -1, "strength": float("nan"), "residual_norm": -2.0}
    for name, value in wrong.items():
        changed = {**plan, "vectors": [{**plan["vectors"][0], name: value}]}
        save_file(tensors, path, {**meta, "plan": json.dumps(changed)})
        for read in (read_header, SteeringPlan.load):
            with pytest.raises(ValueError, match=r"Unknown|count from 0|must be"):
                read(path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda plan: plan.update(prompts=3), "The prompts of .* are damaged"),
        (lambda plan: plan["prompts"].pop("lengths"), "The prompts of .* are damaged"),
        (lambda plan: plan["prompts"].update(lengths=["a", "b"]), "The prompts of .* are damaged"),
        (lambda plan: plan["prompts"].update(lengths=[1, 0]), "positive length and a checksum"),
        (lambda plan: plan["prompts"].update(checksums=[1, 2**70]), "positive length and a checksum"),
        (lambda plan: plan["vectors"][0].update(at=5), "places of vector 0 in .* are damaged"),
        (lambda plan: plan["vectors"][0].update(at=[["a"], []]), "places of vector 0 in .* are damaged"),
        (lambda plan: plan["vectors"][0].update(at=[[1, 1], []]), "each once a row"),
    ],
)
def test_damaged_places_and_prompts_of_a_file_are_refused(tmp_path, damage, told):
    v = SteeringVector(1, torch.randn(2, 8), op="blend", where="given", at=[[1, 2], []])
    path = SteeringPlan([v], prompts=Prompts.of([[1, 2, 3], [4]])).save(tmp_path / "plan.safetensors")
    with safe_open(path, framework="pt") as file:
        meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    plan = json.loads(meta["plan"])
    damage(plan)
    save_file(tensors, path, metadata={**meta, "plan": json.dumps(plan)})
    with pytest.raises(ValueError, match=told):
        SteeringPlan.load(path)


def test_copies_of_a_model_that_is_not_loaded_share_the_weights_that_the_first_of_them_loads(tmp_path):
    made = build("llama", seed=3)
    made._module.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    plan = single(vector(1, strength=5.0))
    expected = [tokens(one.attach(made), PROMPTS[:2]) for one in (plan, -plan)] + [tokens(made, PROMPTS[:2])]
    model = TransformersModel(str(tmp_path), task="text-generation")
    first, second = plan.attach(model), (-plan).attach(model)
    third = (0.0 * plan).attach(first)  # a copy of a copy
    found = [tokens(second, PROMPTS[:2]), tokens(model, PROMPTS[:2]), tokens(first, PROMPTS[:2])]
    assert [torch.equal(a, b) for a, b in zip(found, [expected[i] for i in (1, 2, 0)], strict=True)] == [True] * 3
    assert torch.equal(tokens(third, PROMPTS[:2]), expected[0])
    assert len({next(one._module.parameters()).data_ptr() for one in (model, first, second, third)}) == 1
    late = plan.attach(model)
    assert torch.equal(tokens(late, PROMPTS[:2]), expected[0])
    assert next(late._module.parameters()).data_ptr() == next(model._module.parameters()).data_ptr()
    far = plan.attach(TransformersModel(str(tmp_path), task="text-generation"))
    assert pickle.loads(pickle.dumps(far.dispatch)) is False and not far.dispatched
