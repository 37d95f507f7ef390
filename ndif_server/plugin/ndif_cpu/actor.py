"""Model actors that run on the CPU, named to NDIF by NDIF_DEFAULT_MODEL_ACTOR_CLASS.

NDIF's own actors load a model onto CUDA devices, check that it is there, and synchronize CUDA after every request.
These override just those steps. Taking requests, unpickling and running blocks, errors and results stay NDIF's.
"""

import gc
import logging
from typing import Any

import ray
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

logger = logging.getLogger("ndif.modeling")

# A sandbox process inherits only the variables on this list, and builds a weightless model of its own. Without the first
# two it would look for that model on the public hub; by the last two the launcher finds the process when it stops.
host.RUNNER_ENV = (*host.RUNNER_ENV, "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "NDIF_STACK_ID", "NDIF_STACK_SERVICE")


class OnCPU:
    """Replaces the steps of a model actor that need CUDA."""

    CACHEABLE = False  # NDIF parks idle models in CPU memory, where these already are

    def __init__(self, *args: Any, gpu_mem_bytes_by_id: dict[int, int] | None = None, **kwargs: Any) -> None:
        # The one GPU that the launcher declares exists in Ray's books only: with no device assigned, NDIF's helpers
        # that measure and limit CUDA memory have nothing to loop over.
        super().__init__(*args, gpu_mem_bytes_by_id={}, **kwargs)

    def load_from_disk(self) -> HuggingFaceModel:
        """Load the weights into CPU memory, in the server's number format."""
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        logger.info("Loaded %s on the CPU as %s", self.model_key, self.dtype_name)
        return model

    def cleanup(self) -> None:
        """Reset what a request leaves behind, as NDIF does, without the CUDA calls."""
        if hasattr(self, "discard_sandbox"):
            self.discard_sandbox()
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


@ray.remote(num_cpus=0, max_restarts=-1)
class CPUProcessActor(OnCPU, BaseModelDeployment):
    """Runs a request's block in the process that holds the model, as NDIF does for trusted users."""


@ray.remote(num_cpus=0, max_restarts=-1)
class CPUSandboxActor(OnCPU, SandboxModelDeployment):
    """Runs a request's block in a process of its own, as NDIF does for ordinary users."""

    async def run(self, request: Any) -> None:
        """Take the request as one from an ordinary user: without keys NDIF would trust everyone."""
        request.trusted = False
        await super().run(request)
