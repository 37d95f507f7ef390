"""What `import expertsteer_nnsight` brings with it: cloudpickle alone, until a part is used."""

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


USES = [
    "expertsteer_nnsight.SteeringPlan, expertsteer_nnsight.SteeringVector, expertsteer_nnsight.Positions",
    "expertsteer_nnsight.collect, expertsteer_nnsight.ContrastPairs, expertsteer_nnsight.calibrate",
    "import expertsteer_nnsight.interop.formats, expertsteer_nnsight.interop.hub, expertsteer_nnsight.plotting",
    "import expertsteer_nnsight.interop.transformer_lens",
]


@pytest.fixture(scope="module")
def modules():
    """What is imported after each of some lines, which one process runs in this order."""
    lines = ["pass", "import expertsteer_nnsight", "import nnsight", *USES]
    made = ["import json, sys", "found = []"]
    for line in lines:
        made += [line, "found.append(sorted(sys.modules))"]
    made.append("print(json.dumps(found))")
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(lines, map(set, json.loads(done.stdout.splitlines()[-1])), strict=True))


def test_importing_the_package_imports_nothing_beyond_nnsight(modules):
    roots = {m.split(".")[0] for m in modules["import expertsteer_nnsight"] - modules["pass"]}
    # which nnsight imports too; the command line starts with this, before torch or a model is needed
    assert roots - sys.stdlib_module_names == {"expertsteer_nnsight", "cloudpickle"}


@pytest.mark.parametrize("code", USES)
def test_optional_libraries_come_with_what_uses_them(code, modules):
    assert not {m.split(".")[0] for m in modules[code]} & set(OPTIONAL)


def test_public_names_are_few_and_there():
    names = set(es.__all__) - {"__version__"}
    assert len(names) <= 30 and names <= set(dir(es))
    assert all(getattr(es, name).__doc__ for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = es.Nothing
