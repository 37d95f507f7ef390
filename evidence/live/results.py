"""Lines of the measurements of live experts; what is there is not measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.domain_tables import read_lines

Line = dict[str, Any]


def of_setting(arms: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """The arms of one setting by their own names, and those that all settings share; "SETTING: NAME" is one of a setting."""
    mine = {name.removeprefix(f"{setting}: "): found for name, found in arms.items()}
    return {name: found for name, found in mine.items() if ": " not in name}


class Results:
    """A file of JSON lines.

    Args:
        path: of the file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[Line] = read_lines(path)

    def find(self, **place: Any) -> Line | None:
        """The line of a place."""
        return next((line for line in self.lines if place.items() <= line.items()), None)

    def add(self, line: Line) -> Line:
        """Writes a line at once."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line
