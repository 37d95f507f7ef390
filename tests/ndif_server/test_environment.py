"""What the other tests rest on: the server lacks the package, and the client has it installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import nnsight
from lab import REPOSITORY, TINY

import expertsteer_nnsight as es

ABSENT = ["expertsteer_nnsight", "jaxtyping", "sklearn", "einops"]


def test_the_servers_environment_lacks_the_package():
    for name in ABSENT:
        code = f"import {name}"
        python = os.environ["NDIF_SERVER_PYTHON"]
        done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, cwd="/")
        assert "ModuleNotFoundError" in done.stderr, name


def test_the_running_server_lacks_the_package(models):
    far, _ = models(TINY)
    names = ABSENT
    with far.trace("hello", remote=True):
        there = nnsight.save([name for name in names if importlib.util.find_spec(name) is not None])
        python = nnsight.save(str(sys.executable))
        states = nnsight.save(far.model.layers[0].output.shape[0])
    assert there == [] and states == 1
    assert python != sys.executable


def test_the_client_is_installed():
    distribution = importlib.metadata.distribution("expertsteer_nnsight")
    file = Path(es.__file__).resolve()
    assert file.is_relative_to(sysconfig.get_path("purelib"))
    assert not file.is_relative_to(REPOSITORY / "expertsteer_nnsight")
    assert file in {Path(str(distribution.locate_file(f))).resolve() for f in distribution.files}
    assert str(REPOSITORY) not in sys.path and "" not in sys.path
