"""Files of results: a JSON object a line, each written at once, so that what was measured is not measured again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.domain_tables import read_lines

Line = dict[str, Any]


class Lines:
    """A file of JSON lines; one that was cut off while it was written is taken out.

    Args:
        path: of the file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[Line] = read_lines(path)

    def write(self, lines: Iterable[Line]) -> None:
        """Adds lines, in the file at once."""
        new = list(lines)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in new))
        self.lines += new
