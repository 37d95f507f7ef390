import os

import beartype  # noqa: F401 - before nnsight: it cannot be imported once nnsight has mounted `.save` on object
import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request):
    # the models of the fast tests are too small to share between cores
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(2 if alone and request.node.get_closest_marker("real") else 1)


# Modules with the longest tests, the longest first, so that no process of several is left alone with one at the end. A process
# that gets a module of few tests gets the next but one as well, so a short one stands third.
FIRST = ("test_demo.py", "test_evidence.py", "test_transformer_lens.py", "test_readme.py", "test_harness_real.py")


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("real")}
    place = {path: FIRST.index(path.name) if path.name in FIRST else len(FIRST) for path in slow}
    items.sort(key=lambda item: place.get(item.path, len(FIRST) + 1))
