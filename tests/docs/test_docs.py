"""The documentation: its code runs, its names exist, every public name is documented, and the site builds without a warning."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.main import get_command

import expertsteer_nnsight as es
from expertsteer_nnsight.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# what is public beside the names of the package
MODULES = (
    "interop.formats",
    "interop.hub",
    "interop.transformer_lens",
    "interop.lm_eval",
    "plotting",
    "align.controls",
)
FURTHER = ("fit.layer_sweep.Validation", "measure.judge.SentenceJudge", "steering.plan.with_total")


def text_of(page):
    return page.read_text(encoding="utf-8")


def in_place(page, wanted=lambda mark: True):
    """A page's code with everything else left blank, so that errors tell the page's own lines."""
    text, lines = text_of(page), [""] * (text_of(page).count("\n") + 1)
    for match in BLOCK.finditer(text):
        if wanted(match[1].strip()):
            first = text.count("\n", 0, match.start(2))
            for i, line in enumerate(match[2].split("\n")[:-1]):
                lines[first + i] = line
    return "\n".join(lines)


def runnable(page):
    return in_place(page, lambda mark: mark == "run")


# -- the code -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given():
    """What the pages take for granted, small and random."""
    probe = es.example("sentiment_probe")
    pairs, anchors = es.example("sentiment_pairs").split("train")[:40], es.example("general")[:120]
    words = [f" {word}" for word in (*probe["positive_words"], *probe["negative_words"])]
    # an effect's words must differ in their first token
    known = tiny.tokenizer().train_new_from_iterator([*pairs.texts, *anchors, *words * 50], 1200, show_progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "tokenizer", lambda bos=False: known)
        expert = tiny.build("qwen2", seed=1, max_position_embeddings=2048)
        target = tiny.build("llama", seed=2, max_position_embeddings=2048)
        second = tiny.build("llama", seed=3, max_position_embeddings=2048)
    texts = {"pairs": pairs, "anchors": anchors, "neutral": probe["neutral_texts"][:3]}
    return {"expert": expert, "second": second, "target": target, **texts}


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page).strip()], ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:No strength up to")  # a random model this small cannot be moved by a nat
def test_a_pages_code_runs(page, given, tmp_path, monkeypatch, capsys):
    names = dict(given)
    if page.stem == "transformer_lens":
        names["bridge"] = tiny.bridge(given["target"], tmp_path / "model")
    file = tmp_path / f"{page.stem}.py"  # nnsight reads a block's source from its file
    file.write_text(runnable(page), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(file), names)


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_a_pages_code_compiles_and_its_names_exist(page):
    for node in ast.walk(ast.parse(in_place(page), str(page))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("expertsteer_nnsight"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
        if isinstance(node, ast.Attribute):
            path, value = [], node
            while isinstance(value, ast.Attribute):
                path.insert(0, value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id == "es":
                found = es
                for name in path:
                    assert hasattr(found, name), f"line {node.lineno}: es.{'.'.join(path)}"
                    found = getattr(found, name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            _check_keywords(node)


def _check_keywords(call):
    """Keywords of `es.f(...)` and `es.C.f(...)` are those of the function."""
    name = ast.unparse(call.func)
    if re.fullmatch(r"es(\.\w+)+", name):
        parameters = inspect.signature(eval(name, {"es": es})).parameters  # plain names, of our own pages
        taken = {k.arg for k in call.keywords if k.arg}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert taken <= set(parameters), f"line {call.lineno}: {name} takes no {taken - set(parameters)}"


def test_most_code_runs():
    marks = [match[1].strip() for page in PAGES for match in BLOCK.finditer(text_of(page))]
    assert marks.count("run") >= 0.8 * len(marks)


# -- names and docstrings -------------------------------------------------------------------------------------------


def public():
    """Every documented object: (name, object)."""
    found = {name: getattr(es, name) for name in es.__all__ if name != "__version__"}
    for name in FURTHER:
        module, _, last = name.rpartition(".")
        found[name] = getattr(importlib.import_module(f"expertsteer_nnsight.{module}"), last)
    for name in MODULES:
        module = importlib.import_module(f"expertsteer_nnsight.{name}")
        for key, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and not key.startswith("_") and key != "main":
                found[f"{name}.{key}"] = value
    return found


def test_every_public_name_is_in_the_api_page():
    text = text_of(ROOT / "docs" / "api.md")
    shown = set(re.findall(r"^::: expertsteer_nnsight\.(\S+)$", text, flags=re.MULTILINE))
    for name in public():
        assert name in shown or name.rpartition(".")[0] in shown, name
    assert "`es.__version__`" in text


def _functions(value):
    """An object's own functions, by name: itself, or a class's public methods."""
    if not inspect.isclass(value):
        return {"": value}
    own = {k: v for k, v in vars(value).items() if not k.startswith("_") or k == "__call__"}
    own = {k: v.fget if isinstance(v, property) else getattr(v, "__func__", v) for k, v in own.items()}
    return {k: v for k, v in own.items() if inspect.isfunction(v)}


_SHAPE = re.compile(r"\[\w+( [+-] \w+)?(, [\w +*-]+)*\]")
_SHAPED = re.compile(r"\b(Float|Float64|Num)\[(Tensor|np\.ndarray), [^\]]*\]")  # jaxtyping's
_TENSOR = re.compile(r"\b(Tensor|ndarray)\b")


@pytest.mark.parametrize("name", sorted(public()))
def test_a_public_name_has_a_docstring_that_tells_shapes(name):
    value = public()[name]
    if not callable(value):
        return
    assert inspect.getdoc(value), name
    for own, function in _functions(value).items():
        doc = function.__doc__ or ""
        assert doc or own == "__call__", f"{name}.{own}"
        for parameter in [*inspect.signature(function).parameters.values(), None]:
            hint = inspect.signature(function).return_annotation if parameter is None else parameter.annotation
            hint = hint if isinstance(hint, str) else getattr(hint, "__name__", "")
            # a shape stands in the annotation (jaxtyping) or in the docstring
            if _TENSOR.search(_SHAPED.sub("", hint)):
                assert _SHAPE.search(doc), f"{name}.{own} takes or gives a tensor ({hint}), and tells no shape"


# -- the command line -----------------------------------------------------------------------------------------------


def commands():
    """Options by command."""
    group: Any = get_command(app)
    every = {}
    for name, c in group.commands.items():
        every |= {f"{name} {sub}": inner for sub, inner in c.commands.items()} if hasattr(c, "commands") else {name: c}
    return {
        name: {o for p in c.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
        for name, c in every.items()
    }


def called(page):
    """(command, options) of each call of `expertsteer` in a page."""
    text = re.sub(r"\\\n\s*", " ", text_of(page))
    lines = [line.strip() for line in text.split("\n")] + re.findall(r"`(expertsteer [^`]+)`", text)
    for line in lines:
        if re.match(r"expertsteer [a-z]", line):
            words = shlex.split(line)
            several = len(words) > 2 and any(name.startswith(f"{words[1]} ") for name in commands())
            named = " ".join(words[1:3]) if several else words[1]
            if "|" not in named:  # several commands at once
                yield named, {w.split("=")[0] for w in words[2:] if w.startswith("--")}


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_the_commands_of_a_page_exist(page):
    for command, options in called(page):
        assert command in commands(), command
        assert options <= {*commands()[command], "--help"}, (command, options)


def test_every_command_and_option_is_on_its_page():
    page = ROOT / "docs" / "cli.md"
    for command, options in commands().items():
        assert f"## {command.split()[0]}\n" in text_of(page) and f"expertsteer {command}" in text_of(page)
        assert options <= set(re.findall(r"--[a-z-]+[a-z]", text_of(page))), command


# -- the site -------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in PAGES:
        assert (tmp_path / "site" / ("" if page.stem == "index" else page.stem) / "index.html").exists()
    html = (tmp_path / "site" / "mathematics" / "index.html").read_text(encoding="utf-8")
    assert "$" not in re.sub(r"<(script|code)\b.*?</\1>", "", html, flags=re.DOTALL)  # every formula was recognised
    # no fence was taken for text
    assert not [page for page in PAGES if page.stem != "index" and "```" in
                (tmp_path / "site" / page.stem / "index.html").read_text(encoding="utf-8")]  # fmt: skip


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\w+\.md)$", text_of(ROOT / "mkdocs.yml"), flags=re.MULTILINE))
    assert listed == {page.name for page in PAGES}


# in the same words wherever the two are compared
SHARED = "fixed vectors are for behaviour, a live expert is for knowledge"


def test_no_sentence_stands_on_two_pages_but_one():
    def sentences(page):
        plain = re.sub(r"```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
        plain = re.sub(r"^    .*$", "", plain, flags=re.MULTILINE)
        found = re.split(r"(?<=[.:?])\s+|\n\n|\|", plain)
        return {" ".join(s.split()).lower() for s in found if len(s.split()) > 7}

    seen, said = {}, []
    for page in [README, *PAGES]:
        plain = " ".join(text_of(page).lower().split())
        if SHARED in plain:
            said.append(page.name)
        for sentence in sentences(page):
            if sentence.strip(".:") == SHARED:
                continue
            assert sentence not in seen, f"{page.name} and {seen[sentence]}: {sentence}"
            seen[sentence] = page.name
    assert {"README.md", "live.md", "benchmarks.md", "evidence.md"} <= set(said)
