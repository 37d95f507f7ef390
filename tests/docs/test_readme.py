"""The README's code runs as it stands, on the packaged pair and with fewer anchors."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from expertsteer_nnsight.models.packaged import model_path


@pytest.mark.real
@pytest.mark.timeout(1200)
def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL))
    changes = {
        '"google/gemma-3-270m"': repr(str(model_path("gemma-3-270m"))),
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(model_path("SmolLM2-135M-Instruct"))),
        'anchors=es.example("general")': 'cache="states", anchors=es.example("general")[:120]',
        '.split("train")  #': '.split("train")[:60]  #',
        'es.example("general")[:400]': 'es.example("general")[:120]',
        "[:300]": "[:90]",
        "[300:]": "[90:]",
    }
    changes["print(receipt)"] = 'assert receipt.arms["untrained"]["draws"] == 3; print(receipt)'
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    # the first fit keeps nothing; what the second read serves its controls
    code = code.replace('cache="states", ', "", 1)
    (tmp_path / "readme.py").write_text(code, encoding="utf-8")  # nnsight reads a block's source from its file
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(tmp_path / "readme.py"))
    assert found["plan"].layers and found["by_hand"].layers == (14,)
    assert found["ids"].shape[1] > 20 and found["scores"].null.shape[0] == 20
    out = capsys.readouterr().out
    assert "SteeringPlan for SmolLM2-135M-Instruct" in out and "1.0 0.5" in out and "untested: no receipt" in out
    assert found["receipt"].contributed is not None and (tmp_path / "plan.safetensors").exists()
