"""Steer one language model with vectors made from another, inside nnsight traces."""

from ._version import __version__

__all__ = ["__version__"]
