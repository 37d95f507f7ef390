"""What `import expertsteer_nnsight` costs beside `import nnsight`.

    python -m benchmarks.imports

Both in new processes, in turns; medians of user and system time.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

RUNS = 15


def seconds(module: str) -> float:
    """CPU time of a process that imports a module."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints both medians and the ratio."""
    names = ("nnsight", "expertsteer_nnsight")
    for name in names:
        seconds(name)  # files that are read for the first time
    found = [[seconds(name) for name in names] for _ in range(RUNS)]
    base, mine = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(b / a for a, b in found)
    print(f"nnsight {base:.2f} s, expertsteer_nnsight {mine:.2f} s, ratio {ratio:.2f} (median of {RUNS})")


if __name__ == "__main__":
    main()
