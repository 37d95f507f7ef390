"""What `import expertsteer_nnsight` brings with it: no more than nnsight, until a part is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import expertsteer_nnsight as es

OPTIONAL = (
    "sklearn",
    "scipy",
    "matplotlib",
    "lm_eval",
    "transformer_lens",
    "datasets",
    "gguf",
    "typer",
    "xrfm",
    "rich",
)


def modules(code):
    made = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", made], capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def nnsight_alone():
    return modules("import nnsight")


def test_importing_the_package_imports_nothing_beyond_nnsight(nnsight_alone):
    mine = {m for m in modules("import expertsteer_nnsight") - nnsight_alone if not m.startswith("expertsteer_nnsight")}
    assert len(mine) < 20, sorted(mine)
    assert not {m.split(".")[0] for m in mine} & {*OPTIONAL, "jaxtyping", "einops", "safetensors", "tqdm"}


@pytest.mark.parametrize(
    "code",
    [
        "expertsteer_nnsight.SteeringPlan, expertsteer_nnsight.SteeringVector, expertsteer_nnsight.Positions",
        "expertsteer_nnsight.collect, expertsteer_nnsight.ContrastPairs, expertsteer_nnsight.calibrate",
        "import expertsteer_nnsight.interop.formats, expertsteer_nnsight.interop.hub, expertsteer_nnsight.plotting",
        "import expertsteer_nnsight.interop.transformer_lens",
    ],
)
def test_optional_libraries_come_with_what_uses_them(code):
    mine = modules(f"import expertsteer_nnsight\n{code}")
    assert not {m.split(".")[0] for m in mine} & set(OPTIONAL)


def test_public_names_are_few_and_there():
    names = set(es.__all__) - {"__version__"}
    assert len(names) <= 27 and names <= set(dir(es))
    assert all(getattr(es, name).__doc__ for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = es.Nothing
