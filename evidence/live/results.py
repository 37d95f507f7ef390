"""Lines of the measurements of live experts; what is there is not measured again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence.lines import Line, Lines


def of_setting(arms: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """The arms of one setting by their own names, and those that all settings share; "SETTING: NAME" is one of a setting."""
    mine = {name.removeprefix(f"{setting}: "): found for name, found in arms.items()}
    return {name: found for name, found in mine.items() if ": " not in name}


class Results(Lines):
    """Lines that are found by any of their values."""

    def find(self, **place: Any) -> Line | None:
        """The line of a place."""
        return next((line for line in self.lines if place.items() <= line.items()), None)

    def add(self, line: Line) -> Line:
        """Writes a line at once."""
        self.write([line])
        return line
