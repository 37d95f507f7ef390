"""The notebooks run from top to bottom on the packaged pair, and what is stored in them is what they give."""

from __future__ import annotations

import base64
import os
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    return [
        output.data["image/png"]
        for cell in code(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


def kinds(notebook):
    """Each cell's sorts of output in order. Where a stream breaks in two depends on when the kernel sends it, not on the cell."""
    found = []
    for cell in code(notebook):
        sorts = [output.output_type for output in cell.outputs if output.get("name") != "stderr"]
        found.append([sort for sort, _ in groupby(sorts)])
    return found


def test_a_stream_in_two_parts_is_one_output():
    def notebook(*outputs):
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=list(outputs))])

    def stream(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    result = nbformat.v4.new_output("execute_result")
    parts = notebook(stream("stdout", "a"), stream("stderr", "a bar"), stream("stdout", "b"), result)
    assert kinds(parts) == kinds(notebook(stream("stdout", "ab"), result)) == [["stream", "execute_result"]]
    assert kinds(notebook(result)) != kinds(parts)


def test_there_are_six():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_kept_and_small(path):
    notebook = nbformat.read(path, 4)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert path.stat().st_size < 300_000
    assert not [
        o for cell in code(notebook) for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"
    ]
    text = path.read_text()
    assert "/root" not in text and "/home" not in text and "/tmp" not in text
    assert notebook.cells[0].cell_type == "markdown" and len(pictures(notebook)) >= (
        0 if path.stem.startswith("4") else 1
    )
    assert all(len(base64.b64decode(picture)) > 3000 for picture in pictures(notebook))


@pytest.mark.real
@pytest.mark.recipes
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path, monkeypatch):
    stored = nbformat.read(path, 4)
    again = nbformat.read(path, 4)
    monkeypatch.delenv("NDIF_HOST", raising=False)
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
    NotebookClient(again, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert len(pictures(again)) == len(pictures(stored))
    assert kinds(again) == kinds(stored)
