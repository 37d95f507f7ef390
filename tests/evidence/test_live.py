"""The measurement of live experts: it goes on where it stopped, measures each item once, and draws its tables from lines alone."""

from __future__ import annotations

import functools

import nnsight
import pytest
import tiny
import torch
from question_sets import write_sets

import expertsteer_nnsight as es
from evidence.live import choices as study
from evidence.live import context, factors, generation, slopes
from evidence.live import texts as text_study
from evidence.live.__main__ import main
from evidence.live.results import Results
from expertsteer_nnsight.fit.live_controls import answered, live_arms


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of question sets, and a study of tiny models."""
    write_sets(tmp_path / "data", 40)
    named = {"gemma": functools.partial(tiny.tiny, "gemma3", bos=True), "smol": functools.partial(tiny.tiny, "llama")}
    monkeypatch.setattr(study, "model", lambda name: named[name]())
    for name, value in {
        "GENERAL": 10,
        "TRAINING": 6,
        "SCREENED": 12,
        "VALIDATION": 4,
        "CHUNK": 5,
        "LEAD": -1.0,
    }.items():
        monkeypatch.setattr(study, name, value)
    return tmp_path


def measured(small, tasks):
    """Lines of the study of some tasks."""
    results = Results(small / "out" / "live.jsonl")
    for task in tasks:
        study.measure("gemma-smol", task, small / "data", results, small / "out" / "states", 10)
    return results.lines


def test_a_study_goes_on_where_it_stopped_and_measures_each_item_once(small, monkeypatch):
    done, whole = [], study.answered

    def interrupted(*args, **how):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return whole(*args, **how)

    monkeypatch.setattr(study, "answered", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(small, ["arc_easy"])
    with (small / "out" / "live.jsonl").open("a") as file:
        file.write('{"version": 1, "pair"')  # cut off while it was written
    monkeypatch.setattr(study, "answered", whole)
    lines = measured(small, ["arc_easy"])
    assert [line["stage"] for line in lines] == ["screen", "chosen", "test", "test"]
    assert measured(small, ["arc_easy"]) == lines == Results(small / "out" / "live.jsonl").lines
    test = study.questions("arc_easy", "test", small / "data", 10)
    chosen = lines[1]
    for setting, how in study.SETTINGS.items():
        found = study.receipts(lines)["gemma-smol", "arc_easy", setting]
        assert list(found.right) == [right for _, _, right in test.items]
        settings = {"layers": [tuple(p) for p in chosen["layers"]], "amount": chosen["amount"], **how}
        texts = study.anchors("arc_easy", small / "data")
        live = es.LiveExpert(**settings).fit(study.model("gemma"), study.model("smol"), texts, progress=False)
        arms = {"live": live, **live_arms(live, texts, progress=False)}
        for start in (0, 5):
            expected = answered(live, arms, test[start : start + 5], progress=False)
            assert expected == {arm: list(mine[start : start + 5]) for arm, mine in found.answers.items()}


def test_a_gate_leaves_the_other_items_to_the_unsteered_target():
    answers = {"unsteered": [0, 0, 0], "live": [1, 1, 1], "another prompt": [2, 2, 2], "expert alone": [3, 3, 3]}
    line = {"pair": "p", "task": "t", "stage": "test", "start": 0, "right": [1, 0, 1], "heard": [True, False, True]}
    line["answers"] = {
        f"{s}: {n}": a for s in study.SETTINGS for n, a in answers.items() if n in ("live", "another prompt")
    }
    line["answers"] |= {"unsteered": answers["unsteered"], "expert alone": answers["expert alone"]}
    found = study.receipts([line])
    for setting in study.SETTINGS:
        assert dict(found["p", "t", setting].answers) == answers
        gated = dict(found["p", "t", f"{setting}, gated"].answers)
        assert gated == {**answers, "live": [1, 0, 1], "another prompt": [2, 0, 2]}
    assert len(found) == 2 * len(study.SETTINGS) and len(study.receipts([{**line, "heard": None}])) == len(
        study.SETTINGS
    )


def test_no_labelled_answer_is_among_the_anchors_and_no_item_serves_twice(small):
    texts = study.anchors("arc_easy", small / "data")
    asked = study.questions("arc_easy", "train", small / "data", study.TRAINING)
    for prompt, options, _ in asked.items:
        assert {f"{prompt}{o}" for o in options} <= set(texts)  # right and wrong alike
    prompts = {p for p, _, _ in asked.items}
    others = (
        study.screened("arc_easy", small / "data").items + study.questions("arc_easy", "test", small / "data", 99).items
    )
    assert not prompts & {p for p, _, _ in others}


def test_an_expert_that_does_not_lead_is_screened_alone(small, monkeypatch):
    monkeypatch.setattr(study, "LEAD", 1.01)
    lines = measured(small, ["arc_easy", "piqa"])
    assert [line["stage"] for line in lines] == ["screen", "screen"]
    assert "no" in study.tables(lines)["screen"] and study.receipts(lines) == {}


def test_a_page_is_drawn_from_lines_alone(small, capsys):
    measured(small, ["arc_easy"])
    page = small / "page.md"
    page.write_text("<!-- table: screen -->\n<!-- end -->\n<!-- table: test -->\n<!-- end -->\n")
    main(["--out", str(small / "out"), "--redraw", "--publish", str(page)])
    told = page.read_text()
    assert "| gemma-smol | arc_easy | last prompt token | 10 |" in told and "another prompt" in capsys.readouterr().out
    main(["--out", str(small / "page"), "--redraw", "--publish", str(page)])  # from what stands beside it
    assert page.read_text() == told


# -- any text ----------------------------------------------------------------------------------------------------------

STORIES = [
    "The doctor listened to the chest of the child and wrote down what she had heard there.",
    "A profit of nine millions was reported by the bank for the last quarter of the year.",
    "For every number there is one that is larger, so that no number is the largest of all.",
    "When the river froze over, the ferryman sat at home and mended the nets of his brother.",
]


@pytest.fixture
def texts():
    """Four texts and two tiny models with tokenizers of their own."""
    return text_study.Texts(STORIES, tiny.tiny("gemma3", bos=True), tiny.tiny("llama"))


def test_what_is_predicted_are_the_same_characters_for_both_models(texts):
    for who in (texts.expert, texts.target):
        tokenizer = text_study.tokenizer_of(who)
        for text, ends, made in zip(STORIES, texts.ends, texts.encoded(who), strict=True):
            assert tokenizer.decode(made.ids[made.prompt :]) == text[ends[0] :]
    assert [len(t) for t in STORIES] == [n + e[0] for n, e in zip(texts.characters, texts.ends, strict=True)]


def test_the_negative_gradient_is_what_a_small_vector_takes_off_the_loss(texts):
    layers, step = [1, 2], 1e-2
    slopes = texts.gradients(layers)
    columns, encoded = texts.columns(texts.target), texts.encoded(texts.target)
    starts = [0]
    for at in columns:
        starts.append(starts[-1] + len(at))
    for layer in layers:
        assert slopes[layer].shape == (starts[-1], 32)
        v = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(layer)), dim=0)
        for text, at in enumerate(columns):
            places = [at[0], at[-1]]
            arms = [
                es.SteeringPlan([es.SteeringVector(layer, sign * v, step, where="given", at=[places])], texts.target)
                for sign in (1, -1)
            ]
            _, up, down = text_study.likelihoods(
                texts.target, arms, [encoded[text]._replace(prompt=max(1, encoded[text].prefix))]
            ).double()
            told = slopes[layer][[starts[text], starts[text + 1] - 1]].double().sum(0) @ v.double()
            assert float((up - down) / (2 * step)) == pytest.approx(float(told), rel=0.05, abs=0.02)


def test_a_map_of_both_activations_adds_what_its_formula_says(texts):
    gen = torch.Generator().manual_seed(0)
    x, h, slope = (torch.randn(200, n, generator=gen) for n in (6, 32, 32))
    made = text_study.fitted(x, h, slope, norm=3.0, layer=1, alpha=0.5)
    z = x @ made.expert + h @ made.own + made.bias
    assert float(0.2 * made.size * z.square().sum(1).mean().sqrt()) == pytest.approx(0.6, rel=1e-4)
    vector = made.vectors(x[:5], [1, 2, 3, 5, 6], 0.2)
    stream = torch.randn(1, 8, 32, generator=gen)
    with texts.target.trace(torch.arange(8)[None]) as tracer:
        positions = es.Positions.read(texts.target)
        new = nnsight.save(vector.edit_at(stream, positions))
        tracer.stop()
    at = [1, 2, 3, 5, 6]
    expected = stream.clone()
    expected[0, at] += 0.2 * made.size * (x[:5] @ made.expert + stream[0, at] @ made.own + made.bias)
    torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-4)


def test_a_kind_of_text_is_measured_once_and_its_splits_share_no_document(small, monkeypatch):
    for name, value in {
        "TRAIN": 20,
        "VALIDATION": 3,
        "TEST": 4,
        "LENGTH": 90,
        "ALPHAS": (1.0,),
        "SIZES": (0.1, 0.3),
    }.items():
        monkeypatch.setattr(text_study, name, value)
    named = {"gemma": ("gemma3", 0), "smol": ("llama", 0), "gemma~1": ("gemma3", 5)}
    monkeypatch.setattr(
        text_study, "model", lambda name: tiny.tiny(named[name][0], named[name][0] == "gemma3", named[name][1])
    )
    monkeypatch.setattr(
        text_study, "documents", lambda kind, data: [f"{text} {i} {text}" for i in range(9) for text in STORIES]
    )
    made = text_study.splits("code", small)
    for a, b in ((a, b) for a in made for b in made if a < b):
        assert not set(made[a]) & set(made[b])
    results = Results(small / "out" / "live.jsonl")
    text_study.measure("gemma-smol", "code", small, results, small / "states")
    (line,) = results.lines
    assert line["texts"] == {"test": 4, "validation": 3, "train": 20} and len(line["bits"]["expert"]) == 4
    monkeypatch.setattr(text_study, "Domain", lambda *a: pytest.fail("measured again"))
    text_study.measure("gemma-smol", "code", small, Results(small / "out" / "live.jsonl"), small / "states")
    assert "| gemma-smol | code |" in text_study.tables([line])["text"]


def test_a_share_of_the_lead_is_of_bits_a_character():
    bits = {"unsteered": [20.0, 60.0], "expert alone": [10.0, 30.0], "own": [15.0, 55.0], "both": [10.0, 50.0]}
    line = {"pair": "p", "kind": "k", "stage": "text", "characters": [10, 30], "bits": bits}
    assert text_study.rate(line, "unsteered") == 2.0
    assert text_study.share(line, "own") == pytest.approx(0.25) and text_study.share(
        line, "both", below="own"
    ) == pytest.approx(0.25)


# -- factors -----------------------------------------------------------------------------------------------------------


def test_every_level_is_measured_once_on_items_that_served_for_nothing_else(small, monkeypatch):
    monkeypatch.setattr(factors, "model", study.model)
    small_sets = {"general texts alone": (10, 0, True), "twice as many questions": (10, 12, True)}
    sizes = {"GENERAL": 10, "TRAINING": 6, "SCREENED": 4, "ITEMS": 6, "ANSWERED": 5, "VALIDATION": 3}
    for name, value in {**sizes, "ANCHORS": small_sets}.items():
        monkeypatch.setattr(factors, name, value)
    monkeypatch.setitem(factors.SETTINGS, "aligner", {"ridge of rank 8": {"aligner": es.RidgeAligner(max_rank=8)}})
    measured(small, ["arc_easy"])
    results, data = Results(small / "out" / "live.jsonl"), small / "data"
    chosen = results.find(stage="chosen")
    items = factors.held_out("arc_easy", data)
    most = max(asked for _, asked, _ in small_sets.values())
    served = {p for p, _, _ in study.questions("arc_easy", "train", data, most).items}
    served |= {p for p, _, _ in study.questions("arc_easy", "validation", data, study.VALIDATION).items}
    assert len(items) == 6 and not served & {p for p, _, _ in items.items}
    fitted, whole = [], es.LiveExpert.fit

    def kept(live, expert, target, texts, **how):
        fitted.append((live.get_params(deep=False), texts))
        return whole(live, expert, target, texts, **how)

    monkeypatch.setattr(es.LiveExpert, "fit", kept)
    factors.measure("gemma-smol", "arc_easy", data, results, small / "out" / "states")
    found = {(line["factor"], line["level"]): line for line in results.lines if line["stage"] == "factor"}
    base = {
        **es.LiveExpert().get_params(deep=False),
        "layers": [tuple(p) for p in chosen["layers"]],
        "amount": chosen["amount"],
    }
    usual = study.anchors("arc_easy", data)
    assert len(fitted) == len(found) == sum(line["stage"] == "factor" for line in results.lines)
    read = {}
    for place, (settings, texts) in zip(found, fitted, strict=True):
        factor, level = place
        changed = {k: v for k, v in settings.items() if repr(v) != repr(base[k])}
        if factor == "layers":  # as many pairs as it says, of other target layers, with the amount among them
            assert len({t for _, t in changed["layers"]}) == len(changed["layers"]) == int(level[0])
            assert changed["amount"] == pytest.approx(chosen["amount"] / int(level[0]))
        elif factor == "map":
            target = chosen["layers"][0][1]
            wanted = {} if level.startswith("centred") else {"op": "add"}
            wanted |= {"layers": [(target, target)]} if level.startswith("the same") else {}
            assert changed == {k: v for k, v in wanted.items() if v != base[k]}
        else:
            wanted = factors.SETTINGS.get(factor, {}).get(level, {})
            assert repr(changed) == repr({k: v for k, v in wanted.items() if v != base[k]})
        expected = factors.anchors("arc_easy", data, *small_sets[level]) if factor == "anchors" else usual
        assert texts == expected
        read[place] = settings
    texts = factors.anchors("arc_easy", data, 4, 3, False)
    assert texts == es.example("general")[:4] + [p for p, _, _ in study.questions("arc_easy", "train", data, 3).items]
    place = ("follow", "blend, 0.5")
    live = whole(es.LiveExpert(**read[place]), *map(study.model, ("gemma", "smol")), usual, progress=False)
    scores = items.options(study.model("smol"), [live], progress=False)
    assert found[place]["answers"]["live"] == [int(x[1].argmax()) for x in scores]
    assert "| arc_easy | follow | blend, 0.5 | 6 |" in factors.tables(results.lines)["factors"]
    monkeypatch.setattr(es.LiveExpert, "fit", lambda *a, **k: pytest.fail("measured again"))
    factors.measure("gemma-smol", "arc_easy", data, results, small / "out" / "states")


def test_the_gradient_is_what_a_small_vector_adds_to_the_right_answer():
    target, step = tiny.tiny("llama"), 1e-2
    items = es.MultipleChoice(
        [("Where do bees live?", [" In a hive", " In the sea", " On ice"], 0), ("Rain is", [" wet", " dry"], 1)]
    )
    for prompt, options, right in items.items:
        slope = slopes.gradient(target, 1, prompt, options, right).double()
        v = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
        plans = [
            es.SteeringPlan([es.SteeringVector(1, sign * v, step, where="last_prompt")], target) for sign in (1, -1)
        ]
        (found,) = es.MultipleChoice([(prompt, options, right)]).options(target, plans)
        up, down = torch.log_softmax(found[1:].double(), -1)[:, right]
        assert float((up - down) / (2 * step)) == pytest.approx(float(slope @ v.double()), rel=0.02, abs=2e-3)


def test_a_map_to_the_gradient_raises_the_answers_that_it_was_fitted_on(monkeypatch):
    expert, target = tiny.tiny("gemma3", bos=True), tiny.tiny("llama")
    items = es.MultipleChoice(
        [(f"{story} Then", [" it rained", " they slept"], i % 2) for i, story in enumerate(STORIES)]
    )
    found = torch.stack([slopes.gradient(target, 1, *item) for item in items.items])
    live = es.LiveExpert(layers=[(2, 1)], op="add").fit(expert, target, STORIES, progress=False)
    monkeypatch.setattr(slopes, "ALPHAS", (0.01,))
    monkeypatch.setattr(slopes, "SHARES", (0.001, 0.02))
    made = slopes.best_map(live, items, found, items)
    assert made.amount_ == 0.02 and made.layers_ == [(2, 1)] and live.amount_ == 1.0
    unsteered, steered = items.score(target, [made]).mean(1)
    assert steered > unsteered
    z = made.maps_[2, 1](es.collect(expert, [p for p, _, _ in items.items], [2], progress=False)[2])
    size = 0.02 * z.square().sum(1).mean().sqrt()
    assert float(size) == pytest.approx(0.02 * live.maps_[2, 1].norm, rel=1e-3)


def test_a_centred_map_has_the_mean_of_the_targets_own_activations():
    expert, target = tiny.tiny("gemma3", bos=True), tiny.tiny("llama")
    live = es.LiveExpert(layers=[(2, 1)]).fit(expert, target, STORIES, progress=False)
    asked = [f"Question: {story}" for story in STORIES[:7]]
    x, y = (es.collect(m, asked, [n], progress=False)[n] for m, n in ((expert, 2), (target, 1)))
    made, before = slopes.centred(live, asked).maps_[2, 1], live.maps_[2, 1]
    torch.testing.assert_close(made(x).mean(0), y.mean(0), rtol=1e-4, atol=1e-4)
    shift = made(x) - before(x)  # the same everywhere, and what is expected of it moves along
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.mean - before.mean, shift[0], rtol=1e-4, atol=1e-4)
    own = torch.cat([y, torch.ones(len(y), 1)], 1)
    torch.testing.assert_close(own @ made.predictor - own @ before.predictor, shift, rtol=1e-4, atol=1e-4)


# -- free answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" The plant takes in carbon dioxide.\nQuestion: oxygen", [1]),
        ("\n\nCarbon Dioxide, not oxygen", [0, 1]),
        (" monoxide", []),
        (" 3.5 apples", [3]),
        (" 35", []),
        (" 3.50, or so", [3]),
        (" heavy water", [5]),
        ("", []),
        (" it is 1,200.", [6]),
        (" 200", []),
    ],
)
def test_an_answer_names_options_as_whole_words_in_its_first_line(answer, expected):
    assert (
        generation.named(
            answer, [" oxygen", " carbon dioxide", " mono", " 3.5", " water", " heavy water", " 1200", " °"]
        )
        == expected
    )


def test_free_answers_are_those_of_the_live_expert_that_the_choice_task_chose(small, monkeypatch):
    monkeypatch.setattr(generation, "model", study.model)
    for name, value in {"TEST": 4, "NEW_TOKENS": 5}.items():
        monkeypatch.setattr(generation, name, value)
    results = Results(small / "out" / "live.jsonl")
    generation.measure("gemma-smol", "arc_easy", small / "data", results, small / "states")
    assert results.lines == []  # nothing was chosen yet
    chosen = results.add({"version": study.VERSION, "pair": "gemma-smol", "task": "arc_easy", "stage": "chosen",
                          "layers": [[1, 2]], "amount": 0.5})  # fmt: skip
    generation.measure("gemma-smol", "arc_easy", small / "data", results, small / "states")
    line = results.lines[-1]
    test = study.questions("arc_easy", "test", small / "data", 4)
    texts = study.anchors("arc_easy", small / "data")
    for setting, how in generation.SETTINGS.items():
        live = es.LiveExpert(layers=[(1, 2)], amount=chosen["amount"], **how)
        said = live.fit(study.model("gemma"), study.model("smol"), texts, progress=False).generate(
            [p for p, _, _ in test.items], 5
        )
        assert line["right"][f"{setting}: live"] == [
            int(generation.named(s, options) == [right])
            for s, (_, options, right) in zip(said, test.items, strict=True)
        ]
    assert "the prompt: mean" in line["right"] and "and what is written: mean" not in line["right"]
    assert generation.tables(results.lines)["generation"].count("| gemma-smol | arc_easy |") == 2


# -- private context ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", context.KINDS)
def test_only_the_sentence_tells_the_place_and_no_item_is_an_anchor(kind):
    made = context.splits(kind)
    asked = {name: {q for _, q, _, _ in some} for name, some in made.items()}
    assert not asked["train"] & asked["test"] and not asked["validation"] & asked["test"]
    for sentence, question, options, right in made["test"]:
        assert options[right] in sentence and not any(o in question for o in options)
        assert len(set(options)) == 4 and not any(o in sentence for o in options if o != options[right])
    places = {name: {o for *_, options, _ in some for o in options} for name, some in made.items()}
    assert bool(places["train"] & places["test"]) == (kind == "known places")


def test_the_expert_alone_reads_the_sentence(small, monkeypatch):
    for name, value in {"GENERAL": 8, "TRAINING": 8, "VALIDATION": 3, "TEST": 5, "UNTRAINED": 1}.items():
        monkeypatch.setattr(context, name, value)
    named = {"gemma": functools.partial(tiny.tiny, "gemma3", bos=True), "smol": functools.partial(tiny.tiny, "llama")}
    monkeypatch.setattr(context, "model", lambda name: named[name]())
    # an expert without a sliding window, which would hide the sentence from the last token
    live = es.LiveExpert(layers=[(1, 2)]).fit(tiny.tiny("gpt2"), named["smol"](), STORIES, progress=False)
    some = context.splits("known places")["test"]
    reads = context.Reads(live, [s for s, *_ in some])
    asked = [(q, o) for _, q, options, _ in some for o in options]
    plans = reads.for_texts(*zip(*asked, strict=True))
    for number, (sentence, question, options, _) in enumerate(some):
        expected = live.plan([question], reads=[sentence + question]).vectors[0].direction[0]
        assert not torch.allclose(expected, live.plan([question]).vectors[0].direction[0], rtol=1e-3)
        for plan in plans[number * len(options) : (number + 1) * len(options)]:
            torch.testing.assert_close(plan.vectors[0].direction, expected)
    results = Results(small / "out" / "live.jsonl")
    context.measure("gemma-smol", "known places", results, small / "states")
    (line,) = results.lines
    arms = {"live", "another sentence", "no sentence", "untrained, seed 1"}
    assert line["validation"]["items"] == 3 and len(line["validation"]["settings"]) > 2
    assert {name.split(": ")[1] for name in line["answers"] if ": " in name} == arms and len(line["right"]) == 5
    monkeypatch.setattr(context, "splits", lambda kind: pytest.fail("measured again"))
    context.measure("gemma-smol", "known places", Results(small / "out" / "live.jsonl"), small / "states")
    assert context.tables([line])["context"].count("| gemma-smol | known places |") == 2
