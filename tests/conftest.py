import beartype  # noqa: F401 - before nnsight: it cannot be imported once nnsight has mounted `.save` on object
import torch

torch.set_num_threads(1)  # the models of the fast tests are too small to share
