"""The notebook on NDIF, with everything on the server."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

from lab import REPOSITORY, SMOL


def test_it_runs_there_and_says_what_it_says_here(host, lean, tmp_path):
    lean(True)
    stored = json.loads((REPOSITORY / "notebooks" / "4_steering_ndif.ipynb").read_text())
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(cell["source"]).replace("%matplotlib inline", "") for cell in cells))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=REPOSITORY / "notebooks", env={**os.environ, "NDIF_TARGET": SMOL},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"runs on {host}" in done.stdout and "jobs" in done.stdout.splitlines()[-1]
    here = "".join(text for cell in cells for output in cell["outputs"] for text in output.get("text", []))

    def texts(told):
        return [ast.literal_eval(line.split(": ", 1)[1]) for line in told.splitlines() if "steered: " in line]

    assert len(texts(here)) == 4 and texts(done.stdout)[:2] == texts(here)[:2]
