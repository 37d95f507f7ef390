"""Steer one language model with vectors made from another, in nnsight traces (after ExpertSteer, arXiv 2505.12313)."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from cloudpickle import register_pickle_by_value

from ._version import __version__

# name -> module: public names are imported when first used, so that `import expertsteer_nnsight` and the command line start fast
_HOMES = {
    "Activations": "states.activations",
    "collect": "states.collecting",
    "Aligner": "align.aligner",
    "AutoencoderAligner": "align.autoencoder",
    "CovarianceAligner": "align.closed_form",
    "IdentityAligner": "align.closed_form",
    "ProcrustesAligner": "align.closed_form",
    "RidgeAligner": "align.closed_form",
    "calibrate": "measure.calibration",
    "find_direction": "directions.find",
    "Choices": "measure.effects",
    "Judged": "measure.effects",
    "MultipleChoice": "measure.effects",
    "Words": "measure.effects",
    "ExpertSteer": "fit.expert_steer",
    "LiveExpert": "fit.live_expert",
    "untrained_like": "models.untrained",
    "ContrastPairs": "texts.labelled",
    "LabelledTexts": "texts.labelled",
    "example": "texts.labelled",
    "match_layers": "match.layer_matching",
    "receipt": "measure.measuring",
    "Positions": "models.positions",
    "Receipt": "measure.receipts",
    "RecursiveFeatureMachine": "directions.rfm",
    "Remote": "ndif.host",
    "Residual": "models.residual",
    "SteeringPlan": "steering.plan",
    "SteeringVector": "steering.vectors",
}
if TYPE_CHECKING:
    from .align.aligner import Aligner as Aligner
    from .align.autoencoder import AutoencoderAligner as AutoencoderAligner
    from .align.closed_form import (
        CovarianceAligner as CovarianceAligner,
    )
    from .align.closed_form import (
        IdentityAligner as IdentityAligner,
    )
    from .align.closed_form import (
        ProcrustesAligner as ProcrustesAligner,
    )
    from .align.closed_form import (
        RidgeAligner as RidgeAligner,
    )
    from .directions.find import find_direction as find_direction
    from .directions.rfm import RecursiveFeatureMachine as RecursiveFeatureMachine
    from .fit.expert_steer import ExpertSteer as ExpertSteer
    from .fit.live_expert import LiveExpert as LiveExpert
    from .match.layer_matching import match_layers as match_layers
    from .measure.calibration import calibrate as calibrate
    from .measure.effects import Choices as Choices
    from .measure.effects import Judged as Judged
    from .measure.effects import MultipleChoice as MultipleChoice
    from .measure.effects import Words as Words
    from .measure.measuring import receipt as receipt
    from .measure.receipts import Receipt as Receipt
    from .models.positions import Positions as Positions
    from .models.residual import Residual as Residual
    from .models.untrained import untrained_like as untrained_like
    from .ndif.host import Remote as Remote
    from .states.activations import Activations as Activations
    from .states.collecting import collect as collect
    from .steering.plan import SteeringPlan as SteeringPlan
    from .steering.vectors import SteeringVector as SteeringVector
    from .texts.labelled import ContrastPairs as ContrastPairs
    from .texts.labelled import LabelledTexts as LabelledTexts
    from .texts.labelled import example as example

# A server does not have this package: what a remote block needs of it travels with the request, by value. It must be known
# before nnsight writes a request, and nothing of ours runs between here and there. This is what `nnsight.register` does.
register_pickle_by_value(sys.modules[__name__])
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
