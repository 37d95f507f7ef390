"""The command line, on tiny models in folders: from contrast pairs to a steered text, a receipt and a file for other tools."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import tiny
import torch
from nnsight.modeling.transformers import TransformersModel
from typer.testing import CliRunner

import expertsteer_nnsight as es
from expertsteer_nnsight import cli
from expertsteer_nnsight.cli import app
from expertsteer_nnsight.interop.formats import from_gguf
from expertsteer_nnsight.measure.answers import AnswersReceipt

COMMANDS = ("fit", "generate", "receipt", "info", "export")
pytestmark = pytest.mark.filterwarnings("ignore:The direction's correlation with the labels")


def run(*args, fails=None):
    found = CliRunner().invoke(app, [str(a) for a in args])
    if fails is None:
        assert found.exit_code == 0, (found.output, found.exception)
        return found.stdout
    assert re.search(fails, str(found.exception)), found.exception
    return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, texts, and the plan that `fit` made of them."""
    folder = tmp_path_factory.mktemp("cli")
    for name, arch, seed in (("expert", "qwen2", 1), ("target", "llama", 2)):
        model = tiny.build(arch, seed=seed)
        model._module.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    small = tiny.build("llama", hidden_size=16)
    small._module.save_pretrained(folder / "small")
    small.tokenizer.save_pretrained(folder / "small")
    pairs = es.example("sentiment_pairs").split("train")[:12]
    rows = [{"positive": p, "negative": n} for p, n in zip(pairs.positive, pairs.negative, strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "anchors.txt").write_text("\n".join(es.example("general")[:60]))
    (folder / "neutral.jsonl").write_text('{"text": "the quick brown fox"}\n{"text": "a lazy dog jumps over"}\n')
    (folder / "effect.json").write_text(
        json.dumps(
            {"items": [[p, " good", " bad"] for p in ("the fox is", "a dog is", "this test is", "one model is")]}
        )
    )
    return folder


@pytest.fixture(scope="module")
def texts(place):
    return ["--pairs", place / "pairs.jsonl", "--anchors", place / "anchors.txt", "--neutral", place / "neutral.jsonl"]


@pytest.fixture(scope="module")
def plan(place, texts):
    out = place / "plan.safetensors"
    told = run(
        "fit", place / "expert", place / "target", "--out", out, "--kl", 0.05, "--cache", place / "states", *texts
    )
    assert "SteeringPlan for target" in told and "dose 1" in told and f"Wrote {out}" in told
    return out


def test_fit_makes_what_the_library_makes(place, plan):
    expert, target = (cli._model_of(str(place / name), None) for name in ("expert", "target"))
    pairs, anchors = es.ContrastPairs.from_jsonl(place / "pairs.jsonl"), (place / "anchors.txt").read_text().split("\n")
    made = es.ExpertSteer.recommended().fit(expert, target, pairs, anchors, progress=False)
    made = es.calibrate(made, target, ["the quick brown fox", "a lazy dog jumps over"], 0.05)
    read = es.SteeringPlan.load(plan)
    assert read.layers == made.layers and read.dose == 1
    for a, b in zip(read.vectors, made.vectors, strict=True):
        assert float(a.direction @ b.direction) == pytest.approx(1, abs=1e-4)
        assert a.strength == pytest.approx(b.strength, rel=1e-3)


def test_generate_steers_by_dose(place, plan, monkeypatch):
    told = run(
        "generate", plan, "the quick brown fox", "a dog", "--model", place / "target", "--tokens", 8, "--unsteered"
    )
    assert told.count("unsteered:") == told.count("steered:\n") - 2 == 2 and "the quick brown fox" in told
    alone = ["generate", plan, "the quick brown fox", "--model", place / "target", "--tokens", 8]
    none, strong = run(*alone, "--dose", 0), run(*alone, "--dose", 40)
    assert none != strong and none.strip() in told
    said = {dose: CliRunner().invoke(app, [*map(str, alone), "--dose", dose]).stderr for dose in ("1", "-3")}
    assert "Dose" not in said["1"] and "Dose -3: KL grows about as its square, here 9.0 times" in said["-3"]
    assert (
        run(*alone, "--sample", "--seed", 1)
        == run(*alone, "--sample", "--seed", 1)
        != run(*alone, "--sample", "--seed", 2)
    )
    # a model that ends the text at once
    with monkeypatch.context() as patched:
        patched.setattr("expertsteer_nnsight.measure.rollouts.completions", lambda model, made: [""])
        assert "(The model ended the text at once: --chat asks it as a user.)" in run(*alone)
    # the plan's own target, which is a folder's name and no id of the hub; without a network the hub is tried for long
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run("generate", plan, "a dog", fails="'target' is no folder and no packaged model .*, and the hub did not give it")


def test_info_prints_the_plan_and_its_header(plan):
    assert "not calibrated" not in run("info", plan) and "untested: no receipt" in run("info", plan)
    header = json.loads(run("info", plan, "--json"))
    assert header["vectors"][0]["strength"] == es.SteeringPlan.load(plan).vectors[0].strength
    assert {"op", "where", "from_step", "skip_special", "residual_norm"} < set(header["vectors"][0])
    assert re.search(
        r"layer pairs, expert>target: \d>\d \(R² -?\d\.\d\d, AUC \d\.\d\d, cosine -?\d\.\d\d\)", run("info", plan)
    )
    assert (
        header["target"]["n_layers"] == 4
        and [v["layer"] for v in header["vectors"]] == [1, 2]
        and "calibration" in header["info"]
    )


@pytest.mark.parametrize(("to", "name"), [("gguf", "v.gguf"), ("safetensors", "v.safetensors"), ("lm-eval", "v.pt")])
def test_export_writes_a_file(place, plan, to, name):
    extra = ["--model", place / "target"] if to != "safetensors" else []
    assert "Wrote" in run("export", plan, "--to", to, "--out", place / name, *extra)
    assert (place / name).stat().st_size > 256
    if to == "gguf":
        assert from_gguf(place / name).info["model_hint"] == "llama"
        run("export", plan, "--to", to, "--out", place / name, "--model", place / "small", fails="width 32, but")


def test_receipt_measures_the_plan_with_its_controls(place, plan, texts):
    out = place / "tested.safetensors"
    command = [
        "receipt", plan, "--effect", place / "effect.json", "--expert", place / "expert", "--model", place / "target",
        "--untrained", 2, "--draws", 3, "--cache", place / "states", "--out", out, *texts,
    ]  # fmt: skip
    told = run(*command)
    assert "untrained" in told and "text_features" in told and "3 draws" in told
    assert set(es.SteeringPlan.load(out).info["receipt"]["arms"]) >= {
        "expert",
        "native",
        "untrained",
        "random",
        "permuted",
    }
    assert "95 % interval" in run("info", out)
    run(*command, "--preset", "paper", fails="fitted with other settings")
    (place / "other.txt").write_text("\n".join(es.example("general")[:50]))
    other = [place / "other.txt" if a == place / "anchors.txt" else a for a in command]
    run(*other, fails="was fitted on other texts")


def test_wrong_input_is_one_sentence(place, plan, monkeypatch, capsys):
    uncalibrated = place / "uncalibrated.safetensors"
    read = es.SteeringPlan.load(plan)
    read.with_(strength=0.1).save(uncalibrated)
    run("generate", uncalibrated, "a dog", "--dose", 1, fails="the plan is not calibrated")
    (place / "wrong.json").write_text('{"words": []}')
    (place / "items.json").write_text('{"items": ["abc"]}')
    (place / "list.json").write_text("[]")
    for name, told in (
        ("wrong", "needs prompts"),
        ("items", "one is 'abc'"),
        ("list", "holds an object, but .* a list"),
    ):
        with pytest.raises(ValueError, match=told):
            cli._effect_of(place / f"{name}.json")
    run("fit", "gemma-3-270mm", place / "target", fails="no model 'gemma-3-270mm': is gemma-3-270m meant")
    run("fit", place / "expert", place / "target", "--kl", -1, fails="--kl is -1: a budget is above 0")
    es.SteeringPlan(read.vectors).save(place / "anyone.safetensors")
    run(
        "generate",
        place / "anyone.safetensors",
        "a dog",
        fails="does not say which model it is for: name it with --model",
    )
    run("receipt", place / "anyone.safetensors", fails="does not say which expert")
    monkeypatch.setattr(sys, "argv", ["expertsteer", "info", str(place / "nowhere.safetensors")])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert re.fullmatch(r"expertsteer: No plan at .*nowhere.safetensors\.\n", capsys.readouterr().err)


def test_an_effects_file(place):
    (place / "words.json").write_text('{"prompts": ["a"], "positive_words": [" good"], "negative_words": [" bad"]}')
    assert isinstance(cli._effect_of(place / "words.json"), es.Words)
    assert isinstance(cli._effect_of(place / "effect.json"), es.Choices)
    with pytest.raises(
        ValueError, match=r"needs prompts, positive_words and negative_words, or items, but .* has \['words'\]"
    ):
        cli._effect_of(place / "wrong.json")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_well(command):
    told = run(command, "--help")
    assert re.search(r"Usage: \S+ " + command, told) and "--help" in told
    assert all(len(line) < 132 for line in told.splitlines())


def test_it_is_installed_as_a_command():
    found = subprocess.run(
        [sys.executable, "-m", "expertsteer_nnsight.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in found.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["fit", "--help"], ["info", "PLAN"], ["info", "--json", "PLAN"]],
    ids=" ".join,
)
def test_what_needs_no_model_imports_neither_torch_nor_nnsight(arguments, tmp_path):
    v = es.SteeringVector(1, torch.ones(2, 4), torch.tensor([0.5, -1.0]), 2.0)
    receipt = es.Receipt({}, {"nll": 2.0}, 1.0, "nats").to_dict()
    plan = es.SteeringPlan([v], info={"receipt": receipt}).save(tmp_path / "plan.safetensors")
    code = """
import atexit, sys
from expertsteer_nnsight.cli import main
atexit.register(lambda: print(sorted({"torch", "nnsight", "transformers", "scipy", "sklearn"} & set(sys.modules))))
main()
"""
    command = [sys.executable, "-c", code, *(str(plan) if a == "PLAN" else a for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = done.stdout.rstrip().splitlines()
    assert told.pop() == "[]" and told
    if arguments[0] == "--version":
        assert told == [f"expertsteer_nnsight {es.__version__}"]
    if arguments == ["info", "PLAN"]:
        assert (
            "\n".join(told).startswith(repr(es.SteeringPlan.load(plan)))
            and "add per row residual norms (of 2)" in told[1]
        )
    if arguments == ["info", "--json", "PLAN"]:
        assert json.loads("\n".join(told))["vectors"][0]["strength"] == [0.5, -1.0]


def test_a_live_expert_is_fitted_used_and_measured(place, tmp_path):
    rows = [
        {"prompt": f"the fox {w} and", "options": [" a dog", " the fox jumps"], "answer": n % 2}
        for n, w in enumerate("abcd")
    ]
    questions, file = tmp_path / "questions.jsonl", tmp_path / "live.safetensors"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = run("live", "fit", place / "expert", place / "target", "--anchors", place / "anchors.txt", "--validation", questions,
               "--out", file)  # fmt: skip
    loaded = [
        TransformersModel(str(place / name), task="text-generation", dispatch=True) for name in ("expert", "target")
    ]
    asked = es.MultipleChoice([(row["prompt"], row["options"], row["answer"]) for row in rows])
    texts = (place / "anchors.txt").read_text().splitlines()
    live = es.LiveExpert().fit(*loaded, texts, asked, progress=False)
    assert f"Layers {live.layers_[0][0]}>{live.layers_[0][1]} (R² " in told and f"amount {live.amount_:g}." in told
    names = ["--expert", place / "expert", "--model", place / "target"]
    said = run("live", "generate", file, "the quick fox", "a dog", "--tokens", 5, "--unsteered", *names)
    for answer in live.generate(["the quick fox", "a dog"], 5):
        assert answer in said
    assert said.count("unsteered:") == said.count("with the live expert:") == 2
    out = tmp_path / "receipt.json"
    where = ["--questions", questions, "--out", out, "--untrained", 1, *names]
    printed = run("live", "receipt", file, "--anchors", place / "anchors.txt", *where)
    expected = live.receipt(asked, texts, untrained=1, progress=False)
    assert str(expected) in printed and AnswersReceipt.load(out).answers == expected.answers
    run("live", "receipt", file, *where, fails="fitted on other anchors than these")
    header = json.loads(run("info", live.plan(["a dog"]).save(tmp_path / "plan.safetensors"), "--json"))
    assert header["prompts"]["lengths"] == [2] and header["vectors"][0]["rows"] == 1
    named = [tmp_path / "plan.safetensors", "the fox", "--tokens", 2]
    run("generate", *named, "--model", place / "target", fails="made for other prompts")
    questions.write_text(json.dumps({**rows[0], "prompt": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert cli._questions_of(questions).items[0][0] == "a\u2028b"
    for line, told in (("{}", "Line 5 of .*: prompt: Field required"), ("[1", "Line 5 of .*: it: Invalid JSON"),
                       ('{"prompt": "a", "options": "b", "answer": 0}', "Line 5 of .*: options")):  # fmt: skip
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows) + line)
        run("live", "receipt", file, *where, fails=told)
