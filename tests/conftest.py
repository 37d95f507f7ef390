import beartype  # noqa: F401 - before nnsight: it cannot be imported once nnsight has mounted `.save` on object
import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request):
    # the models of the fast tests are too small to share between cores
    torch.set_num_threads(2 if request.node.get_closest_marker("real") else 1)
