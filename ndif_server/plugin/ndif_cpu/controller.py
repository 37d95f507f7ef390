"""NDIF's controller, named to it by NDIF_CONTROLLER_IMPORT_PATH, made to fit nnsight 0.8.1.

ndif 0.1.2 passes trust_remote_code= to three class methods of nnsight's Remotable. nnsight 0.8.1 reads it from the model
key instead and takes no such argument, so that every deployment would end in a TypeError.
"""

import functools
import inspect
from typing import Any

import ray
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from nnsight.modeling.mixins.remotable import Remotable


def drop_trust_remote_code(name: str) -> None:
    """Let a class method of Remotable accept trust_remote_code, and ignore it, where it does not know the argument."""
    method = getattr(Remotable, name)
    if "trust_remote_code" in inspect.signature(method).parameters:
        return
    function = method.__func__

    @functools.wraps(function)
    def call(cls: type, *args: Any, trust_remote_code: bool = False, **kwargs: Any) -> Any:
        return function(cls, *args, **kwargs)

    setattr(Remotable, name, classmethod(call))


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class CPUController(_ControllerActor):
    """NDIF's controller with the argument dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("describe_checkpoint", "max_tp_size", "estimate_bytes"):
            drop_trust_remote_code(name)
        super().__init__(*args, **kwargs)
