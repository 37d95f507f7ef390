"""The package's structure: what `lint-imports` cannot say, and that the page about it names what is there."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "expertsteer_nnsight"
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
PAGE = ROOT / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(
        PACKAGE.name, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def test_what_runs_on_a_server_imports_nothing_but_torch_and_nnsight(graph):
    contract = next(c for c in CONTRACTS if c["name"].startswith("What runs on a server"))
    for line in contract["ignore_imports"]:
        importer, imported = line.split(" -> ")
        graph.remove_import(importer=importer, imported=imported)
    found = set()
    for source in contract["source_modules"]:
        for module in {source} | graph.find_descendants(source):
            found |= graph.find_upstream_modules(module)
    outside = {module for module in found if not module.startswith(PACKAGE.name)}
    assert outside - sys.stdlib_module_names == {"torch", "nnsight", "greenlet"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_folder_says_what_lives_there(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert len(text.split()) > 30
    named = set(re.findall(r"`(\w+)`", text))
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    if folder.name != "interop":
        assert modules <= named | {folder.name}, f"{folder.name} does not name {modules - named}"


def test_the_page_names_every_folder_and_files_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    assert not [folder.name for folder in FOLDERS if f"`{folder.name}/`" not in text]
    for name in re.findall(r"(?:[a-z_]+/)*[a-z_]+\.py\b", text):
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name


def test_each_change_of_the_page_names_what_its_files_hold():
    rows = [line.split("|")[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| a ")]
    assert len(rows) >= 10
    for change, where, tests in rows:
        names = re.findall(r"`([^`]+)`", where)
        files = [name for name in names if name.endswith(".py")]
        held = "".join((PACKAGE / name).read_text(encoding="utf-8") for name in files)
        symbols = [name for name in names if name not in files]
        assert files and not [s for s in symbols if s.rpartition(".")[2].strip("()") not in held], change
        for name in re.findall(r"`([^`]+)`", tests):
            assert (ROOT / name).exists(), name
