"""Tests against a real NDIF server: `make ndif` starts one and runs them with a client in which the package is installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from lab import REPOSITORY


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.ndif)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def host():
    if "NDIF_STACK_DIR" not in os.environ:
        pytest.fail("There is no NDIF server: run these tests with `make ndif`.")
    return os.environ["NDIF_HOST"]


@pytest.fixture(scope="session")
def actor():
    """How the server runs a block: `process` (with the model) or `sandbox` (apart from it)."""
    return os.environ["NDIF_ACTOR"]


@pytest.fixture(scope="session")
def stack(host):
    """Calls the launcher of the running server: `stack("restart", "api")`."""

    def call(*command):
        line = [os.environ["NDIF_SERVER_PYTHON"], "-m", "ndif_server", *command]
        done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.fixture(scope="session")
def models(host):
    """(remote, local) by repository id; the remote one has no weights here."""
    from nnsight.modeling.transformers import TransformersModel

    made = {}

    def get(repo):
        if repo not in made:
            far = TransformersModel(repo, task="text-generation")
            near = TransformersModel(repo, task="text-generation", dispatch=True, dtype=torch.float32)
            near._module.requires_grad_(False)
            made[repo] = far, near
        return made[repo]

    return get


@pytest.fixture
def lean(actor):
    """Calls that leave a case to the other actor: a sandboxed job starts a process of five seconds on these cores."""

    def skip(case):
        if case and actor == "sandbox":
            pytest.skip("the other actor does")

    return skip


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path / "cache"))
