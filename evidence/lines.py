"""Files of results: a JSON object a line, each written at once, so that what was measured is not measured again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from expertsteer_nnsight.files import whole_file

Line = dict[str, Any]


class Lines:
    """A file of JSON lines; one that was cut off while it was written is taken out.

    Args:
        path: of the file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[Line] = []
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            with suppress(json.JSONDecodeError):  # cut off while it was written
                self.lines.append(json.loads(line))
        whole = "".join(json.dumps(line) + "\n" for line in self.lines)
        if whole != text:
            whole_file(path, lambda to: to.write_text(whole))

    def write(self, lines: Iterable[Line]) -> None:
        """Adds lines, in the file at once."""
        new = list(lines)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in new))
        self.lines += new
