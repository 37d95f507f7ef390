"""Numbers that a user gives: checked where they come in, with the argument's name."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def number(
    name: str,
    value: Any,
    *,
    above: float | int | None = None,
    least: float | int | None = None,
    most: float | int | None = None,
) -> float:
    """A finite number in a range.

    Args:
        name: of the argument.
        value: of it.
        above: it must be more.
        least: it must be this or more.
        most: it must be this or less.

    Raises:
        ValueError: it is not.
    """
    given = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    fits = math.isfinite(given) and (above is None or given > above) and (least is None or given >= least)
    if not fits or (most is not None and given > most):
        raise ValueError(f"{name} is {value!r:.60}: it must be a finite number{_range(above, least, most)}.")
    return given


def count(name: str, value: Any, least: int = 0) -> int:
    """A whole number.

    Args:
        name: of the argument.
        value: of it.
        least: it must be this or more.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r:.60}: it must be a whole number{_range(None, least, None)}.")
    return int(value)


def _range(above: float | int | None, least: float | int | None, most: float | int | None) -> str:
    told = [f" above {above:g}"] if above is not None else [f" of {least:g} or more"] if least is not None else []
    if most is not None:
        told.append(f"{' and' if told else ''} at most {most:g}")
    return "".join(told)
