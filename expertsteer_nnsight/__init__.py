"""Steer one language model with vectors made from another, in nnsight traces (after ExpertSteer, arXiv 2505.12313)."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

import nnsight

from ._version import __version__

# name -> module: public names are imported when first used, so that `import expertsteer_nnsight` costs what nnsight does
_HOMES = {
    "Activations": "activations",
    "collect": "collecting",
    "Aligner": "aligner",
    "AutoencoderAligner": "autoencoder",
    "CovarianceAligner": "alignment",
    "IdentityAligner": "alignment",
    "ProcrustesAligner": "alignment",
    "RidgeAligner": "alignment",
    "calibrate": "calibration",
    "find_direction": "directions",
    "Choices": "effects",
    "Judged": "effects",
    "Words": "effects",
    "ExpertSteer": "expert_steer",
    "untrained_like": "control_arms",
    "ContrastPairs": "labelled",
    "LabelledTexts": "labelled",
    "example": "labelled",
    "match_layers": "layer_matching",
    "receipt": "measuring",
    "Positions": "positions",
    "Receipt": "receipts",
    "RecursiveFeatureMachine": "rfm",
    "Remote": "remote",
    "Residual": "residual",
    "SteeringPlan": "steering",
    "SteeringVector": "vectors",
}
if TYPE_CHECKING:
    from .activations import Activations as Activations
    from .aligner import Aligner as Aligner
    from .alignment import (
        CovarianceAligner as CovarianceAligner,
    )
    from .alignment import (
        IdentityAligner as IdentityAligner,
    )
    from .alignment import (
        ProcrustesAligner as ProcrustesAligner,
    )
    from .alignment import (
        RidgeAligner as RidgeAligner,
    )
    from .autoencoder import AutoencoderAligner as AutoencoderAligner
    from .calibration import calibrate as calibrate
    from .collecting import collect as collect
    from .control_arms import untrained_like as untrained_like
    from .directions import find_direction as find_direction
    from .effects import Choices as Choices
    from .effects import Judged as Judged
    from .effects import Words as Words
    from .expert_steer import ExpertSteer as ExpertSteer
    from .labelled import ContrastPairs as ContrastPairs
    from .labelled import LabelledTexts as LabelledTexts
    from .labelled import example as example
    from .layer_matching import match_layers as match_layers
    from .measuring import receipt as receipt
    from .positions import Positions as Positions
    from .receipts import Receipt as Receipt
    from .remote import Remote as Remote
    from .residual import Residual as Residual
    from .rfm import RecursiveFeatureMachine as RecursiveFeatureMachine
    from .steering import SteeringPlan as SteeringPlan
    from .vectors import SteeringVector as SteeringVector

# A server does not have this package: what a remote block needs of it travels with the request, by value. It must be known
# before nnsight writes a request, and nothing of ours runs between here and there.
nnsight.register(__name__)
# what may be used inside a block
_IN_A_TRACE = ("Positions", "Residual", "SteeringPlan", "SteeringVector")


def _rebuilt(name: str, parts: dict[str, Any]) -> Any:
    """The package where it can be imported, such as in another process of this machine; its parts elsewhere."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return types.SimpleNamespace(**parts)


class _Package(types.ModuleType):
    """This module; in a remote block that names it (`es.Positions.read(model)`) only what may run there travels."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (__name__, {name: getattr(self, name) for name in _IN_A_TRACE})


sys.modules[__name__].__class__ = _Package

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
