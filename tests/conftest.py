import os

import beartype  # noqa: F401 - before nnsight: it cannot be imported once nnsight has mounted `.save` on object
import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request):
    # the models of the fast tests are too small to share between cores
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(2 if alone and request.node.get_closest_marker("real") else 1)


def pytest_collection_modifyitems(items):
    # modules with the longest tests first, so that no process of several is left alone with one at the end
    slow = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in slow)
